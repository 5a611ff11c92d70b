"""The whole loop on the shipped policy, at a size of seconds."""

import itertools
import json
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax import config as configs
from mixgrpo_jax import evaluate, train
from mixgrpo_jax.runtime.mesh import virtual_devices
from mixgrpo_jax.sample import sample
from tests.python import ROOT, run_program

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
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())  # none is half written
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


SIZES = (
    dict(data=8),
    dict(data=1, fsdp=8),
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
    run_program(MESHES, tmp_path, cwd=ROOT, **virtual_devices(8))
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


class Recorded(NamedTuple):
    """A run's programs, wrapped so that a test sees what they are given and give."""

    calls: list[str]  # "rollout", "decode", "update", in order
    rollouts: list  # (parameters on the host, Rollout)
    decoded: list  # pictures
    updates: list  # (parameters on the host, rows)


@pytest.fixture
def recorded(monkeypatch):
    seen = Recorded([], [], [], [])

    def make(*args):
        programs = make_programs(*args)

        def rollout(trained, *rest):
            seen.calls.append("rollout")
            before = jax.tree.map(np.array, trained)
            result = programs.rollout(trained, *rest)
            seen.rollouts.append((before, result))
            return result

        def decode(*args):
            seen.calls.append("decode")
            seen.decoded.append(programs.decode(*args))
            return seen.decoded[-1]

        def update(state, base, rows, *rest):
            seen.calls.append("update")
            seen.updates.append((jax.tree.map(np.array, state.params), rows))
            return programs.update(state, base, rows, *rest)

        rollout._cache_size, update._cache_size = programs.rollout._cache_size, programs.update._cache_size
        return programs._replace(rollout=rollout, decode=decode, update=update)

    make_programs = train.make_programs
    monkeypatch.setattr(train, "make_programs", make)
    return seen


def fast(folder, iterations=1, **changes):
    """A run of that policy whose only reward is a function that a test may set, `slow_reward`."""
    config = tiny(iterations=iterations)
    config.model.folder = str(folder)
    config.rewards, config.watched = dict(slow=1.0), ()
    config.reward_options = dict(slow=dict(kind="function", path=f"{__name__}:slow_reward"))
    config.plan.num_steps, config.plan.length = 3, 1
    config.evaluation.prompts = config.evaluation.batch = 2
    config.evaluation.num_steps = 1
    config.optimizer.learning_rate = 1e-3
    config.update(changes)
    return config


def brightness(images, prompts, metadata):
    return np.asarray(images, np.float32).mean((1, 2, 3)) / 255


during = [brightness]  # what `slow_reward` is now


def slow_reward(images, prompts, metadata):
    return during[-1](images, prompts, metadata)


def wait_for(ready, what, seconds=60):
    """Return once `ready()`, while nothing but what is under way already can make it so."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not happen while a reward was computed"
        time.sleep(0.01)


def test_the_next_pictures_are_decoded_while_the_first_are_scored(small_policy, recorded, tmp_path, monkeypatch):
    sizes = []

    def score(images, prompts, metadata):
        if recorded.decoded and "update" not in recorded.calls:  # a chunk of the iteration, not held-out pictures
            sizes.append(len(images))
            after = len(sizes)  # the chunk behind this one
            if after < 4:
                wait_for(lambda: len(recorded.decoded) > after and recorded.decoded[after].is_ready(), "decoding")
        return brightness(images, prompts, metadata)

    monkeypatch.setattr(sys.modules[__name__], "during", [score])
    config = fast(small_policy)
    config.batch.decode = 2
    train.train(config, tmp_path)
    assert sizes == [2, 2, 2, 2] and recorded.calls == ["rollout", *["decode"] * 4, "update"]


def test_off_policy_the_next_rollout_is_drawn_while_rewards_are_computed(small_policy, recorded, tmp_path, monkeypatch):
    finished = []

    def score(images, prompts, metadata):
        done = recorded.calls.count("update")
        if recorded.decoded and done < 2:
            wait_for(lambda: len(recorded.rollouts) == done + 2, "the next rollout")
            wait_for(recorded.rollouts[done + 1][1].x0.is_ready, "the next rollout")
            finished.append(done)
        return brightness(images, prompts, metadata)

    monkeypatch.setattr(sys.modules[__name__], "during", [score])
    train.train(fast(small_policy, 3, one_step_off_policy=True), tmp_path)
    assert finished == [0, 1]
    step = ["rollout", "decode", "update"]
    assert recorded.calls == ["rollout", "decode", *step, *step, "update"]


def test_off_policy_an_update_gets_the_rollout_of_the_parameters_before_the_last(small_policy, recorded, tmp_path):
    config = fast(small_policy, 4, one_step_off_policy=True)
    config.ratio_tolerance, config.optimizer.learning_rate = 1e-5, 1e-2
    train.train(config, tmp_path)
    parameters = [before for before, _ in recorded.updates]  # by iteration
    for iteration, (drawn_by, rollout) in enumerate(recorded.rollouts):
        assert recorded.updates[iteration][1] is rollout.rows
        jax.tree.map(np.testing.assert_array_equal, drawn_by, parameters[max(iteration - 1, 0)])
    leaves = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in parameters]
    assert all((a != b).any() for a, b in itertools.pairwise(leaves))
    deviations = [line["ratio/max_deviation"] for line in lines(tmp_path)[1:]]
    assert deviations[0] < 1e-5 < min(deviations[1:])  # stale, and not refused
    assert lines(tmp_path)[-1]["compilations"] == 2


def test_off_policy_stopped_and_resumed_gives_the_same_run(small_policy, tmp_path, monkeypatch):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train.train(fast(small_policy, 4, one_step_off_policy=True), straight)
    calls, advantages = [], train.advantages

    def stop_in_the_third(*args):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return advantages(*args)

    monkeypatch.setattr(train, "advantages", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.train(fast(small_policy, 4, one_step_off_policy=True), resumed)
    assert [line["iteration"] for line in lines(resumed)] == [0, 1, 2]
    monkeypatch.undo()
    train.train(fast(small_policy, 4, one_step_off_policy=True), resumed)  # from the checkpoint at 2
    assert lines(resumed) == lines(straight)


@pytest.mark.parametrize("off_policy", [False, True])
def test_a_reward_that_fails_stops_the_run_with_its_own_words(
    small_policy, off_policy, recorded, tmp_path, monkeypatch
):
    def score(images, prompts, metadata):
        if recorded.decoded and recorded.calls.count("update") == off_policy:
            raise RuntimeError(f"the scorer is out of paper at {len(images)} pictures")
        return brightness(images, prompts, metadata)

    monkeypatch.setattr(sys.modules[__name__], "during", [score])
    config = fast(small_policy, 3, one_step_off_policy=off_policy)
    config.batch.decode = 4
    with pytest.raises(RuntimeError, match="out of paper at 4 pictures"):
        train.train(config, tmp_path)
    assert recorded.calls.count("update") == off_policy
