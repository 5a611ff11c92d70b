"""Checkpoints of an earlier version go on, and those of a later one are refused."""

import json
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax import evaluate, train
from mixgrpo_jax.convert import convert
from mixgrpo_jax.engine import loading
from mixgrpo_jax.models.io import orbax_io
from mixgrpo_jax.rl.update import TrainState
from mixgrpo_jax.runtime.checkpoint import Checkpoints
from mixgrpo_jax.sample import sample
from tests.test_train import fast, lines, stopped


class FirstState(NamedTuple):
    """The train state of version 1."""

    params: Any
    opt_state: Any
    ema: Any
    step: Any


def as_first(workdir, kept=True, samples=None):
    """Write the newest checkpoint anew, as version 1 had it: the average a field, and the planner's state a window."""
    checkpoints = Checkpoints(workdir)
    latest, host = checkpoints.latest, checkpoints.restore_host()
    tree = checkpoints._manager.restore(latest)["state"]
    checkpoints.close()
    shutil.rmtree(workdir / "checkpoints" / str(latest))
    ema = tree["averages"]["ema"] if kept else None
    checkpoints = Checkpoints(workdir)
    state = FirstState(tree["params"], tree["opt_state"], ema, tree["step"])
    checkpoints.save(latest, state, {"window": host["planned"]}, samples, force=True)
    checkpoints.close()


def run(folder, rank=0, average=True, **changes):
    config = fast(folder, 4, **changes)
    config.model.lora.rank = rank
    if not average:
        config.averages.ema.decay, config.evaluation.average = 0.0, ""
    return config


@pytest.mark.parametrize(
    ("rank", "average"),
    [(0, True), *(pytest.param(*other, marks=pytest.mark.slow) for other in ((2, True), (0, False)))],
)
def test_a_run_of_the_first_version_goes_on_as_if_it_were_of_this(small_policy, tmp_path, rank, average):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train.train(run(small_policy, rank, average), straight)
    stopped(run(small_policy, rank, average), resumed, 4)
    as_first(resumed, average)
    evaluate.evaluate(run(small_policy, rank, average), resumed)  # reads a part of it
    train.train(run(small_policy, rank, average), resumed)
    assert lines(resumed) == lines(straight)
    for part in [("params",), ("averages", "ema")][: 1 + average]:
        ends = [orbax_io.lazy_restore(path / "checkpoints" / "4" / "state", part) for path in (straight, resumed)]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[()], b[()]), *ends)
    host = json.loads(next((resumed / "checkpoints" / "4" / "host").glob("*")).read_text())
    assert host["version"] == loading.VERSION == 2 and host["planned"]["iteration"] == 4


def test_samples_of_the_first_version_are_drawn_anew_where_they_are_removed(small_policy, tmp_path):
    config = run(small_policy, one_step_off_policy=True)
    stopped(config, tmp_path, 4)
    as_first(tmp_path, samples={"x": np.zeros(3)})
    with pytest.raises(ValueError, match=r"checkpoints/2: version 1 .*samples.*Remove its folder samples/"):
        train.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "samples")
    train.train(config, tmp_path)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_what_the_first_version_had_not_is_asked_for_in_vain(small_policy, tmp_path):
    config = run(small_policy)
    stopped(config, tmp_path, 4)
    as_first(tmp_path)
    config.averages.old = configs.average("old")
    with pytest.raises(ValueError, match=r"version 1 .* has no averages.old: begin the run anew"):
        train.train(config, tmp_path)


def test_a_later_version_is_refused_by_name(small_policy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loading, "VERSION", 99)
        stopped(run(small_policy), tmp_path, 4)
    for command in (train.train, evaluate.evaluate):
        with pytest.raises(ValueError, match=r"2 is version 99 of mixgrpo_jax's checkpoints, and this is 2: install"):
            command(run(small_policy), tmp_path)


def test_parameters_that_are_not_finite_are_refused_wherever_they_are_read(small_policy, tmp_path):
    config = run(small_policy)
    config.iterations, config.checkpoint.every = 2, 1
    train.train(config, tmp_path)
    checkpoints = Checkpoints(tmp_path)
    tree, host = checkpoints._manager.restore(2)["state"], checkpoints.restore_host()
    checkpoints.close()
    for part in (tree["params"], tree["averages"]["ema"]):
        part["final_out"]["bias"] = np.full_like(part["final_out"]["bias"], np.nan)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, TrainState(**tree), host, force=True)
    checkpoints.close()
    message = r"checkpoints/2 holds parameters that are not finite: remove it"
    for read in (
        lambda: train.train(config, tmp_path),
        lambda: evaluate.evaluate(config, tmp_path),
        lambda: sample(config, tmp_path, ["a blue sign that says 4270 in white"]),
        lambda: convert(tmp_path, tmp_path / "out", "diffusers"),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    train.train(config, tmp_path)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2]
