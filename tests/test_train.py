"""The whole loop on the shipped policy, at a size of seconds."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax import config as configs
from mixgrpo_jax import evaluate, train
from mixgrpo_jax.sample import sample

CONFIGS = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")


def tiny(recipe="mixgrpo", iterations=4):
    config = configs.load(recipe, CONFIGS)
    config.iterations = iterations
    config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 2, 4, 2, 4
    config.plan.num_steps, config.plan.length, config.plan.iterations_per_window = 5, 2, 1
    config.evaluation.prompts = config.evaluation.batch = 8
    config.evaluation.num_steps = 2
    config.checkpoint.every = 2
    return config


def lines(workdir):
    """metrics.jsonl without what a clock says."""
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in text]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    scores = train.train(tiny(), workdir)
    return workdir, scores


def test_what_a_run_leaves(straight):
    workdir, scores = straight
    log = lines(workdir)
    assert [line["iteration"] for line in log] == [0, 1, 2, 3, 4]
    assert [line["window/start"] for line in log[1:]] == [0, 1, 2, 2]
    for line in log[1:]:
        start = line["window/start"]
        assert line["nfe/rollout"] == start * 2 + (5 - start) * 8
        assert line["nfe/update"] == 2 * 8
        assert line["compilations"] == 2
        assert line["ratio/max_deviation"] < 1e-4
        assert line["ratio/drift"] >= line["ratio/max_deviation"]
        assert 0 <= line["reward/ocr/mean"] <= 1
    assert log[-1]["held_out/strict/mean"] == scores["strict"].mean()
    assert log[0]["held_out/ocr/mean"] >= 0
    for name in ("before_after.png", "rewards.png"):
        assert np.asarray(Image.open(workdir / name)).std() > 1


def test_the_same_command_gives_the_same_run(straight, tmp_path):
    train.train(tiny(), tmp_path)
    assert lines(tmp_path) == lines(straight[0])


def test_stopped_and_resumed_gives_the_same_run(straight, tmp_path, monkeypatch):
    calls = []

    def stop_in_the_fourth(*args):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return advantages(*args)

    advantages = train.advantages
    monkeypatch.setattr(train, "advantages", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(), tmp_path)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    monkeypatch.undo()
    train.train(tiny(), tmp_path)  # from the checkpoint at 2; line 3 is written anew
    assert lines(tmp_path) == lines(straight[0])


def test_evaluate_and_sample_read_the_checkpoint(straight):
    workdir, scores = straight
    config = tiny()
    assert evaluate.evaluate(config, workdir)["strict"] == pytest.approx(scores["strict"].mean())
    assert evaluate.evaluate(config, workdir)["colour"] == pytest.approx(scores["colour"].mean())
    config.evaluation.ema = False
    assert evaluate.evaluate(config, workdir)["colour"] != pytest.approx(scores["colour"].mean())
    prompts = ["a blue sign that says 4270 in white", "a pink sign that says 8 in black"]
    both = sample(config, workdir, prompts)
    assert both.shape == (2, 16, 48, 3)
    alone = sample(config, workdir, prompts[:1])[0].astype(int)
    np.testing.assert_allclose(alone, both[0], atol=1)  # another batch sums in another order, and a pixel rounds
    assert (workdir / "samples" / "001.png").is_file()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mixgrpo_flash_star", "dancegrpo", "mixgrpo_cps")]


@pytest.mark.parametrize("recipe", ["mixgrpo_flash", "flow_grpo", *SLOW])
def test_recipes_train(recipe, tmp_path):
    config = tiny(recipe, iterations=2)
    if recipe == "flow_grpo":
        config.plan.bound = 5
    train.train(config, tmp_path)
    log = lines(tmp_path)
    assert log[-1]["compilations"] == 2
    assert log[-1]["ratio/max_deviation"] < 1e-4
    assert ("kl/reference" in log[-1]) == (recipe == "flow_grpo")


def test_a_ratio_that_is_not_one_stops_the_run(tmp_path):
    config = tiny(iterations=1)
    config.ratio_tolerance = 0.0
    config.objective.reduce = "sum"
    with pytest.raises(RuntimeError, match=r"rollout and update disagree.* at step \d \(sigma"):
        train.train(config, tmp_path)


def test_a_reward_that_fails_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "score_all", lambda *_: {"ocr": 1 / 0})
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(iterations=1), tmp_path)


SIZES = (
    dict(data=8),
    dict(data=4, tensor=2),
    dict(data=1, fsdp=4, context=2),
    dict(data=1, fsdp=4, tensor=2, rollout_fsdp=2),
)
MESHES = """
import pathlib, sys
sys.path.insert(0, "tests")
from mixgrpo_jax import train
from test_train import SIZES, smooth
for index, sizes in enumerate(SIZES):
    config = smooth()
    config.mesh.update(sizes)
    train.train(config, pathlib.Path(sys.argv[1]) / str(index))
"""


def smooth():
    """A run whose rewards do not read text: what is read jumps where a rounding error moves a pixel."""
    config = tiny()
    config.rewards, config.watched = dict(colour=1.0), ("ocr",)
    return config


@pytest.mark.slow
def test_every_mesh_of_eight_devices_gives_the_single_devices_metrics(tmp_path):
    train.train(smooth(), tmp_path / "one")
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", MESHES, str(tmp_path)], check=True, env=env, cwd=root)
    one = lines(tmp_path / "one")
    for index in range(len(SIZES)):
        log = lines(tmp_path / str(index))
        assert log[-1]["compilations"] == 2
        for ours, theirs in zip(log, one, strict=True):
            for name in ("reward/colour/mean", "loss/total", "grad_norm", "held_out/colour/mean"):
                if name in theirs:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), (index, name)


def test_a_bucket_is_refused_before_a_folder_of_its_name_is_made():
    with pytest.raises(configs.ConfigError, match="workdir='gs://bucket/run' is no folder: mount the bucket"):
        train.train(tiny(), "gs://bucket/run")
