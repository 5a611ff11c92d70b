"""An iteration's samples: what stands in their table, and that each is drawn again as it was."""

import csv
import re

import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.engine.drawn import redraw
from mixgrpo_jax.sample import again
from tests import test_train
from tests.test_train import brightness, fast


@pytest.fixture(scope="module", params=[False, True], ids=["on_policy", "one_step_off_policy"])
def run(request, small_policy, tmp_path_factory):
    """A run's config, its workdir, and its pictures by iteration."""
    workdir, pictures = tmp_path_factory.mktemp("run"), []

    def score(images, prompts, metadata):
        pictures.append(np.array(images))
        return brightness(images, prompts, metadata)

    config = fast(small_policy, 4, one_step_off_policy=request.param)
    config.checkpoint.every, config.checkpoint.keep = 1, 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_train, "during", [score])
        train.train(config, workdir)
    return config, workdir, dict(enumerate((each for each in pictures if len(each) == 8), 1))


def table(workdir, iteration):
    with (workdir / "drawn" / f"{iteration}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_says_what_the_run_scored(run):
    _, workdir, pictures = run
    assert sorted(path.name for path in (workdir / "drawn").iterdir()) == ["1.csv", "2.csv", "3.csv", "4.csv"]
    for iteration, images in pictures.items():
        rows = table(workdir, iteration)
        assert list(rows[0]) == ["id", "prompt", "slow", "advantage"] and [row["id"] for row in rows] == list(
            "01234567"
        )
        assert np.array_equal(np.float32([row["slow"] for row in rows]), np.float32(brightness(images, [], [])))
        assert len({row["prompt"] for row in rows}) == 2
        assert np.allclose(np.float64([row["advantage"] for row in rows]).reshape(2, 4).mean(1), 0, atol=1e-6)


def test_a_sample_is_drawn_again_as_it_was(run):
    config, workdir, pictures = run
    for iteration, sample in ((1, 0), (4, 6)):
        image = again(config, workdir, iteration, sample)
        assert np.abs(image.astype(int) - pictures[iteration][sample]).max() <= 1
        row = table(workdir, iteration)[sample]
        assert brightness(image[None], [], [])[0] == pytest.approx(float(row["slow"]), abs=1e-4)
        assert redraw(configs.resolve(config), workdir, iteration, sample)[1] == row["prompt"]
        assert (workdir / "samples" / f"{iteration}_{sample}.png").exists()


def test_what_cannot_be_drawn_again_is_said(run):
    config, workdir, _ = run
    settings = configs.resolve(config)
    for iteration, sample, message in ((0, 0, "iteration=0: a run's first is 1"), (1, 8, "id=8: .* samples 0 to 7")):
        with pytest.raises(configs.ConfigError, match=message):
            redraw(settings, workdir, iteration, sample)
    lag = 2 if config.one_step_off_policy else 1
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    drew = ", ".join(map(str, [*range(1, lag + 1), *(step + lag for step in kept)]))
    with pytest.raises(ValueError, match=re.escape(f"Of iterations {drew} there are; checkpoint.every, keep")):
        redraw(settings, workdir, 9, 0)
