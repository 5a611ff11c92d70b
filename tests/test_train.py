"""The whole loop on the shipped policy, at a size of seconds."""

import collections
import itertools
import json
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax import config as configs
from mixgrpo_jax import evaluate, train
from mixgrpo_jax.convert import convert
from mixgrpo_jax.engine.collect import Collector
from mixgrpo_jax.flow import plans
from mixgrpo_jax.flow.kernels import by_sample
from mixgrpo_jax.models import families, lora, lora_files
from mixgrpo_jax.models.io import orbax_io
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.rewards.contract import Incomplete, Missing
from mixgrpo_jax.rewards.function import function_reward
from mixgrpo_jax.rl.samples import Objective
from mixgrpo_jax.runtime import page
from mixgrpo_jax.runtime.files import place
from mixgrpo_jax.runtime.mesh import virtual_devices
from mixgrpo_jax.runtime.metrics import compilations
from mixgrpo_jax.sample import sample
from tests.python import ROOT, run_program
from tests.test_docs import undocumented

CONFIGS = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")


def tiny(recipe="mixgrpo", iterations=4):
    config = configs.load(recipe, CONFIGS)
    config.iterations = iterations
    config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 2, 4, 2, 4
    config.plan.num_steps = 5
    if "length" in config.plan:
        config.plan.length = 2
    if "iterations_per_window" in config.plan:
        config.plan.iterations_per_window = 1
    if recipe == "flow_grpo":
        config.plan.bound = 5
    config.evaluation.prompts = config.evaluation.batch = 8
    config.evaluation.num_steps = 2
    config.checkpoint.every = 2
    return config


def lines(workdir):
    """metrics.jsonl without what a clock says."""
    text = (place(workdir) / "metrics.jsonl").read_text().splitlines()
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
        assert line["window/length"] == 2
        assert line["nfe/rollout"] == line["nfe/rollout_used"] == start * 2 + (5 - start) * 8
        assert line["nfe/update"] == line["nfe/gradient"] == 2 * 8
        assert line["compilations"] == 2
        for name in ("reward/ocr", "reward/colour", "watched/strict"):
            assert 0 <= line[f"{name}/mean"] <= 1 and 0 < line[f"{name}/std"] <= 0.5
            assert line[f"{name}/within"] <= line[f"{name}/std"] + 1e-6
        assert 0.1 < line["advantage/abs_mean"] <= 5
        assert line["ratio/max_deviation"] < 5e-5 and line["ratio/max_deviation"] < line["ratio/drift"] < 0.1
        assert 0 <= line["ratio/clip_fraction"] < 1 and line["ratio/mean"] == pytest.approx(1, abs=0.01)
        assert line["loss/total"] == line["loss/policy"] and 0 < abs(line["loss/total"]) < 5
        assert 0 < line["grad_norm"] < 10
        assert not [name for name in line if name.startswith(("kl/", "mse/", "velocity/"))]  # nobody asked for them
    for line, held_out in ((log[0], True), *((line, False) for line in log[1:-1]), (log[-1], True)):
        assert [name for name in line if name.startswith("held_out/")] == [
            f"held_out/{name}/{what}" for what in ("mean", "std") for name in scores if held_out
        ]
    assert all(log[-1][f"held_out/{name}/mean"] == values.mean() for name, values in scores.items())
    rate, last = tiny().optimizer.learning_rate, tiny().optimizer.final_rate  # of 8 updates, falling from the second on
    rates = [rate * (1 - (1 - last) * fallen / 7) for fallen in (0, 2, 4, 6)]
    assert [line["optimizer/learning_rate"] for line in log[1:]] == pytest.approx(rates)
    clock = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert not undocumented({name for line in clock for name in line})
    assert (walls := [line["time/wall"] for line in clock]) == sorted(walls) and walls[0] > 0
    assert ["time/left" in line for line in clock] == [False, False, True, True, True] and clock[-1]["time/left"] == 0
    timed = clock[-1]
    phases = [timed[f"time/{phase}"] for phase in ("rollout", "decode", "reward", "update")]
    assert min(phases) > 0 and timed["time/iteration"] == pytest.approx(sum(phases))
    assert timed["time/images_per_second"] == pytest.approx(8 / sum(phases))
    assert json.loads((workdir / "config.json").read_text())["seed"] == 714
    for name in ("before_after.png", "rewards.png"):
        assert np.asarray(Image.open(workdir / name)).std() > 1


def test_the_same_command_gives_the_same_run(straight, tmp_path):
    train.train(tiny(), tmp_path)
    assert lines(tmp_path) == lines(straight[0])


def stopped(config, workdir, iteration):
    """Train, and be interrupted in an iteration, when its samples are scored."""
    calls, learn = [], Collector.learn

    def stop(*args):
        calls.append(0)
        if len(calls) == iteration:
            raise KeyboardInterrupt
        return learn(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Collector, "learn", stop)
        train.train(config, workdir)
    assert [line["iteration"] for line in lines(workdir)] == list(range(iteration))
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())  # none is half written


def test_stopped_and_resumed_gives_the_same_run(straight, tmp_path):
    stopped(tiny(), tmp_path, 4)
    train.train(tiny(), tmp_path)  # from the checkpoint at 2; line 3 is written anew
    assert lines(tmp_path) == lines(straight[0])


def test_evaluate_and_sample_read_the_checkpoint(straight):
    workdir, scores = straight
    config = tiny()
    assert evaluate.evaluate(config, workdir)["strict"] == pytest.approx(scores["strict"].mean())
    assert evaluate.evaluate(config, workdir)["colour"] == pytest.approx(scores["colour"].mean())
    config.evaluation.average = ""
    assert evaluate.evaluate(config, workdir)["colour"] != pytest.approx(scores["colour"].mean())
    prompts = ["a blue sign that says 4270 in white", "a pink sign that says 8 in black"]
    both = sample(config, workdir, prompts)
    assert both.shape == (2, 16, 48, 3)
    alone = sample(config, workdir, prompts[:1])[0].astype(int)
    np.testing.assert_allclose(alone, both[0], atol=1)  # another batch sums in another order, and a pixel rounds
    assert (workdir / "samples" / "001.png").is_file()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mixgrpo_flash_star", "dancegrpo", "mixgrpo_cps")]


@pytest.mark.parametrize("recipe", ["mixgrpo_flash", *SLOW])
def test_recipes_train(recipe, tmp_path):
    config = tiny(recipe, iterations=2)
    train.train(config, tmp_path)
    check_costs(recipe, lines(tmp_path))


# By recipe, at T=5, w=2 with 2 prompts x 4: steps after the window's last (e), places trained, evaluations of an update
# in samples beside the trained ones.
COSTS = {
    "mixgrpo": (lambda e: 5 - e, 2, 0),
    "mixgrpo_cps": (lambda e: 5 - e, 2, 0),
    "mixgrpo_flash": (lambda e: max(int(0.4 * (6 - e)), 2) - 1, 2, 0),
    "mixgrpo_flash_star": (lambda e: max(int(0.2 * (6 - e)), 2) - 1, 2, 0),
    "flow_grpo_fast": (lambda e: 5 - e, 2, 0),
    "dancegrpo": (lambda e: 1, 2, 0),  # 0.6 of 4 steps, rounded down
    "flow_grpo": (lambda e: 0, 4, 8 * 4),  # the base, at 0.99 of 5 steps
    "nft": (lambda e: 5, 1, 8 + 8),  # "old", at 0.3 of 5 steps, and at the recorded step
}


def check_costs(recipe, log):
    """Two programs, an exact number of evaluations, and a first update that is on policy, in every iteration."""
    suffix, places, others = COSTS[recipe]
    for line in log[1:]:
        start = line.get("window/start", 0)
        length = line.get("window/length", 0)
        assert length == {"dancegrpo": 4, "flow_grpo": 5, "nft": 0}.get(recipe, 2)
        assert line["nfe/rollout"] == line["nfe/rollout_used"] == 2 * start + 8 * (length + suffix(start + length))
        assert (line["nfe/gradient"], line["nfe/update"]) == (8 * places, 8 * places + others), line["iteration"]
        assert line["compilations"] == 2
        assert ("kl/base" in line) == (recipe == "flow_grpo")
        if recipe == "nft":
            assert line["velocity/rollout_deviation"] < 1e-4 and line["velocity/moved"] > 0
        else:
            assert line["ratio/max_deviation"] < 5e-5
        assert line["grad_norm"] > 0


def test_a_ratio_that_is_not_one_stops_the_run(tmp_path):
    config = tiny(iterations=1)
    config.ratio_tolerance = 0.0
    config.objective.reduce = "sum"
    with pytest.raises(RuntimeError, match=r"rollout and update disagree.* at step \d \(sigma"):
        train.train(config, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantage.spread": "map"}, "spread='map': none of the rewards slow gives a map; choose 'even'"),
        (
            {"advantage.spread": "routes", "advantage.routes": ("slow:audio",)},
            "has no tokens 'audio'; choose from image",
        ),
        ({"mesh.rollout_fsdp": 3}, "mesh.rollout_fsdp=3 does not divide mesh.fsdp=1: choose a divisor"),
        ({"model.text_length": 3}, "model.text_length=3: prompt 'a .*' has [0-9]+ tokens; the model takes 3"),
    ],
)
def test_what_only_the_parts_of_a_run_know_is_refused_before_it_compiles(small_policy, tmp_path, fields, message):
    config = fast(small_policy)
    config.update_from_flattened_dict(fields)
    before = compilations("draw_samples", "update_policy")
    with pytest.raises(configs.ConfigError, match=message):
        train.train(config, tmp_path)
    assert compilations("draw_samples", "update_policy") == before


@pytest.mark.parametrize("iterations", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_parameters_that_are_not_finite_are_never_saved(small_policy, tmp_path, iterations):
    config = fast(small_policy, iterations)
    config.checkpoint.every, config.optimizer.learning_rate, config.batch.updates = 1, 1e25, 1
    with pytest.raises(
        RuntimeError, match=r"iteration 1, update 1: param_norm is not finite, with grad_norm=\d.*saved"
    ):
        train.train(config, tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())
    config.optimizer.learning_rate = 1e-5
    train.train(config, tmp_path)
    assert lines(tmp_path)[-1]["iteration"] == iterations


def test_what_is_not_finite_is_named():
    learned = {"grad_norm": np.array([1.0, np.inf]), "loss/total": np.zeros(2), "nfe/update": np.int32(3)}
    with pytest.raises(RuntimeError, match="iteration 7, update 2: grad_norm is not finite, with grad_norm=inf"):
        train.check_finite(learned, 7)
    train.check_finite(learned | {"grad_norm": np.ones(2)}, 7)


def test_a_gradient_far_above_those_before_stops_the_run():
    norms = collections.deque([0.0, 1e9], maxlen=50)
    train.check_norms(norms, np.array([2.0, 1.0, 150.0] * 5), 100.0, 1)  # too few to tell, and then within the bound
    message = r"iteration 3, update 2: grad_norm=201 is 100 times the median of the last 18, 2, over optimizer.max_grad"
    with pytest.raises(RuntimeError, match=message):
        train.check_norms(norms, np.array([1.5, 201.0]), 100.0, 3)
    train.check_norms(norms, np.array([1e9]), 0.0, 3)
    train.check_norms(collections.deque(np.zeros(20)), np.ones(1), 100.0, 3)  # groups without spread have no gradient


def test_a_score_that_is_missing_is_no_lesson_and_no_number(small_policy, recorded, tmp_path):
    def score(images, prompts, metadata):
        missing = {1: Missing("http://a: out of memory", passing=False)} if len(images) == 8 else {}
        return Incomplete(brightness(images, prompts, metadata) + 9 * bool(missing), missing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.during", [score])
        train.train(fast(small_policy), tmp_path)
        with pytest.raises(ConnectionError, match=r"1 images.*missing_share allows 0\.8: http://a: out of memory"):
            train.train(fast(small_policy, missing_share=0.1), tmp_path / "strict")
    line, batch = lines(tmp_path)[1], recorded.updates[0][2]
    assert line["advantage/missing"] == 1 and 9 < line["reward/slow/mean"] < 10
    assert batch.weight.tolist() == [1, 0, 1, 1, 1, 1, 1, 1] and np.isnan(batch.advantage[0, 1])
    others = batch.advantage[0, [0, 2, 3], 0]
    assert others.sum() == pytest.approx(0, abs=1e-5) and np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0


@pytest.mark.slow
def test_while_servers_are_away_what_is_finished_is_saved_and_the_run_goes_on(small_policy, tmp_path):
    turns, saved = [], lambda iteration: (tmp_path / "away" / "checkpoints" / str(iteration)).exists()

    def score(images, prompts, metadata):
        turns.append(len(images))
        if turns.count(8) == 2:  # the second iteration's
            assert not saved(1)
            return Incomplete(np.zeros(8), dict.fromkeys(range(8), Missing("http://a: refused", passing=True)))
        if turns.count(8) == 3:
            wait_for(lambda: saved(1), "a save")
        return brightness(images, prompts, metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixgrpo_jax.rewards.scoring.PAUSE", 0.0)
        patch.setattr(f"{__name__}.during", [score])
        for name in ("away", "straight"):
            config = fast(small_policy, 3, one_step_off_policy=True)
            config.checkpoint.every = 25
            train.train(config, tmp_path / name)
            patch.setattr(f"{__name__}.during", [brightness])
    assert turns.count(8) == 4 and lines(tmp_path / "away") == lines(tmp_path / "straight")


SIZES = (
    dict(data=8),
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
def test_meshes_of_eight_devices_give_the_single_devices_metrics(tmp_path):
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


def test_a_url_of_no_known_kind_is_refused_before_a_folder_of_its_name_is_made():
    with pytest.raises(ValueError, match="'ftp://bucket/run' is no URL that is known here: give a folder"):
        train.train(tiny(), "ftp://bucket/run")


class Recorded(NamedTuple):
    """A run's programs, wrapped so that a test sees what they are given and give."""

    calls: list[str]  # "rollout", "decode", "update", in order
    rollouts: list  # (parameters on the host, Rollout)
    decoded: list  # pictures
    updates: list  # (parameters and averages on the host, Batch)


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

        def update(state, base, batch, *rest):
            seen.calls.append("update")
            seen.updates.append((jax.tree.map(np.array, state.params), jax.tree.map(np.array, state.averages), batch))
            return programs.update(state, base, batch, *rest)

        return programs._replace(rollout=rollout, decode=decode, update=update)

    make_programs = train.make_programs
    monkeypatch.setattr(train, "make_programs", make)
    return seen


def fast(folder, iterations=1, recipe="mixgrpo", **changes):
    """A run of that policy whose only reward is a function that a test may set, `slow_reward`."""
    config = tiny(recipe, iterations)
    config.model.folder = str(folder)
    config.rewards, config.watched = dict(slow=1.0), ()
    config.reward_options = dict(slow=dict(kind="function", path=f"{__name__}:slow_reward"))
    config.plan.num_steps = 3
    if "length" in config.plan:
        config.plan.length = 1
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


@pytest.mark.slow
def test_off_policy_an_update_gets_the_rollout_of_the_parameters_before_the_last(small_policy, recorded, tmp_path):
    config = fast(small_policy, 4, one_step_off_policy=True)
    config.ratio_tolerance, config.optimizer.learning_rate = 1e-5, 1e-2
    train.train(config, tmp_path)
    parameters = [before for before, *_ in recorded.updates]  # by iteration
    for iteration, (drawn_by, rollout) in enumerate(recorded.rollouts):
        assert recorded.updates[iteration][2].rows is rollout.rows
        jax.tree.map(np.testing.assert_array_equal, drawn_by, parameters[max(iteration - 1, 0)])
    leaves = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in parameters]
    assert all((a != b).any() for a, b in itertools.pairwise(leaves))
    deviations = [line["ratio/max_deviation"] for line in lines(tmp_path)[1:]]
    assert deviations[0] < 1e-5 < min(deviations[1:])  # stale, and not refused
    assert lines(tmp_path)[-1]["compilations"] == 2


@pytest.mark.slow
def test_off_policy_stopped_and_resumed_gives_the_same_run(small_policy, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train.train(fast(small_policy, 4, one_step_off_policy=True), straight)
    stopped(fast(small_policy, 4, one_step_off_policy=True), resumed, 3)
    train.train(fast(small_policy, 4, one_step_off_policy=True), resumed)  # from the checkpoint at 2
    assert lines(resumed) == lines(straight)


def two_splits(plan):
    """A recipe's tree at T=4."""
    plan.num_steps, plan.splits, plan.noise = 4, (0, 1), plan.noise[1:]
    plan.late, plan.late_after = plan.late and (1, 2), 2


def reverse(folder, iterations, recipe):
    """A recipe on steps with the sizes of `fast`, at T=3, or at 4 of a tree."""
    config, small = configs.load(recipe, CONFIGS), fast(folder, iterations)
    small.batch.shared_noise = config.batch.shared_noise
    for name in set(small) - {"plan", "sampler", "advantage", "select", "objective", "terms", "ratio_tolerance"}:
        config[name] = small[name]
    config.plan.num_steps = 3
    if config.plan.name == "tree":
        two_splits(config.plan)
    if config.plan.get("bound"):
        config.plan.bound = 3
    if config.plan.get("chunks"):
        config.plan.chunks = (0, 1)
    if "iterations_per_window" in config.plan:
        config.plan.length = 1
    if config.select.name == "extremes":
        config.select.count = 1
    return config


@pytest.mark.slow
def test_replayed_groups_resume_bit_for_bit(small_policy, tmp_path):
    def config():
        made = reverse(small_policy, 4, "op_grpo")
        made.batch.prompts = made.select.capacity = 4
        made.select.groups = 1
        return made

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train.train(config(), straight)
    stopped(config(), resumed, 4)
    train.train(config(), resumed)  # from the checkpoint at 2
    assert lines(resumed) == lines(straight)
    log = lines(straight)[1:]
    assert log[0]["replay/share"] == 0 < log[-1]["replay/share"] <= 0.25  # one of four groups, at most
    assert all(line["ratio/max_deviation"] < 1e-6 and line["compilations"] == 2 for line in log)


def fast_first(names, fast):
    """The names, of which those not in `fast` are for the slow run."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


# By recipe at T=3, w=1 (or two splits) with 2 prompts x 4: places trained, an update's evaluations in units of all rows
REVERSE = dict(grpo_guard=(2, 2), flow_dppo=(2, 2), pcpo=(1, 2), rsm=(2, 2), dancegrpo_extremes=(1, 0.5))
REVERSE |= dict(flash_grpo=(1, 1), gcpo=(2, 2), tmpo=(1, 2), uni_tmpo=(1, 2))
REVERSE |= dict(tmpo_tree=(2, 2), branch_grpo=(2, 1), branch_grpo_pruned=(1, 1), tree_rpo=(2, 2))


@pytest.mark.parametrize("recipe", fast_first(sorted(REVERSE), []))
def test_reverse_recipes_train_on_policy(small_policy, tmp_path, recipe):
    config = reverse(small_policy, 2, recipe)
    train.train(config, tmp_path)
    (places, each), planner = REVERSE[recipe], configs.resolve(config).planner
    state, rows = planner.initial(), 2 if config.batch.shared_noise else 8
    for line in lines(tmp_path)[1:]:
        assert line["nfe/rollout"] == plans.evaluations(planner.layout, planner.plan(state, 2), rows, 8)
        state = planner.advance(state)
        assert line["compilations"] == 2 and line["nfe/update"] == each * places * 8
        assert line.get("ratio/max_deviation", 0) < 5e-5 and line.get("ratio/rollout_deviation", 0) < 1e-4
        assert line["grad_norm"] > 0


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


SWEPT = ["mixgrpo", "mixgrpo_flash", "mixgrpo_flash_star"]


@pytest.mark.parametrize("recipe", fast_first(SWEPT, ["mixgrpo_flash"]))
def test_two_programs_serve_every_position_of_the_window(small_policy, tmp_path, recipe):
    config = fast(small_policy, 4, recipe)
    config.plan.num_steps, config.plan.length = 5, 2
    config.plan.strategy, config.plan.at_end = "progressive", "roll_back"  # Flash*'s stays where it is
    train.train(config, tmp_path)
    log = lines(tmp_path)
    assert [line["window/start"] for line in log[1:]] == [0, 1, 2, 0]
    check_costs(recipe, log)


@pytest.mark.parametrize("recipe", fast_first(sorted(COSTS.keys() - SWEPT), ["nft"]))
def test_every_recipe_costs_what_its_formula_says(small_policy, tmp_path, recipe):
    config = fast(small_policy, 2, recipe)
    config.plan.num_steps = 5
    if "length" in config.plan:
        config.plan.length = 2
    train.train(config, tmp_path)
    check_costs(recipe, lines(tmp_path))


def nft(folder, iterations):
    """DiffusionNFT whose average "old" stays behind the parameters, and moves as slowly from the first iteration on."""
    config = fast(folder, iterations, "nft")
    config.averages.old.rate, config.averages.old.decay = 0.0, 0.9
    config.optimizer.learning_rate = 1e-2
    return config


@pytest.mark.slow
def test_nft_draws_by_its_average_and_trains_the_parameters(small_policy, recorded, tmp_path):
    train.train(nft(small_policy, 3), tmp_path)
    first = recorded.updates[0][0]
    for iteration, ((drawn_by, rollout), (params, averages, batch)) in enumerate(
        zip(recorded.rollouts, recorded.updates, strict=True)
    ):
        jax.tree.map(np.testing.assert_array_equal, drawn_by, averages["old"])
        assert batch.x0 is rollout.x0 and len(batch.rows) == 1
        distance = [apart(params, other) for other in (averages["old"], averages["ema"], first)]
        assert (min(distance) > 0) == (max(distance) > 0) == (iteration > 0)
        if iteration == 1:  # moved once, by the iteration and not by its two updates
            expected = jax.tree.map(lambda before, after: 0.9 * before + 0.1 * after, first, params)
            assert apart(averages["old"], expected) < 1e-6 < 0.1 * apart(averages["old"], averages["ema"])
    log = lines(tmp_path)
    check_costs_of_nft = [(line["nfe/update"], line["nfe/gradient"], line["compilations"]) for line in log[1:]]
    assert check_costs_of_nft == [(8 + 2 * 8, 8, 2)] * 3
    assert all(line["velocity/rollout_deviation"] < 1e-4 for line in log[1:])


def apart(a, b):
    """The largest difference between two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.mark.slow
def test_averages_by_update_and_by_iteration_resume_bit_for_bit(small_policy, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train.train(nft(small_policy, 4), straight)
    stopped(nft(small_policy, 4), resumed, 4)
    train.train(nft(small_policy, 4), resumed)  # from the checkpoint at 2
    assert lines(resumed) == lines(straight)
    for part in (("params",), ("averages", "ema"), ("averages", "old")):
        ends = [orbax_io.lazy_restore(path / "checkpoints" / "4" / "state", part) for path in (straight, resumed)]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[()], b[()]), *ends)


built = []


def counted(path):
    """`function_reward`, and a count of its calls."""
    built.append(path)
    return function_reward(path)


def test_a_run_builds_its_rewards_once_and_shows_every_evaluation(small_policy, tmp_path, monkeypatch, capsys):
    config = fast(small_policy, 2)
    config.evaluation.every = 1
    config.reward_options = dict(slow=dict(kind=f"{__name__}:counted", path=f"{__name__}:slow_reward"))
    built.clear()
    write, known = page.write, []

    def refuse_once(path, workdirs):
        known.append([line["iteration"] for line in lines(tmp_path)])
        if len(known) == 1:
            raise OSError("no space")
        write(path, workdirs)

    monkeypatch.setattr(page, "write", refuse_once)
    train.train(config, tmp_path)
    assert built == [f"{__name__}:slow_reward"]
    assert known == [[0, 1], [0, 1, 2]]
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].split() == ["report:", str(tmp_path / "report.html")]
    assert "WARNING: report.html is not written: OSError: no space" in said.err
    assert {path.name for path in (tmp_path / "held_out").iterdir()} == {"0.npz", "1.npz", "2.npz", "prompts.json"}
    with np.load(tmp_path / "before.npz") as before, np.load(tmp_path / "held_out" / "0.npz") as kept:
        np.testing.assert_array_equal(kept["slow"], before["slow"])
    assert "<h2>Result</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_dancegrpo_trains_on_the_extremes_of_each_group(small_policy, recorded, tmp_path):
    config = fast(small_policy, 2, "dancegrpo")
    config.plan.num_steps = 5
    config.select = configs.choose("select", "extremes", count=1)
    config.batch.micro_batch = 2
    train.train(config, tmp_path)
    log = lines(tmp_path)
    assert [(line["nfe/rollout"], line["nfe/update"], line["compilations"]) for line in log[1:]] == [(40, 8, 2)] * 2
    for *_, batch in recorded.updates:
        chosen = batch.weight.reshape(2, 4).astype(bool)
        by_group = batch.advantage[0, :, 0].reshape(2, 4)
        for row, kept in zip(by_group, chosen):
            assert sorted(row[kept]) == [row.min(), row.max()]


@dataclass(frozen=True)
class Ascent(Objective):
    """A toy: the clean estimate goes where the reward's gradient points."""

    needs: ClassVar[frozenset[str]] = frozenset({"x0", "reward_grad"})

    def __call__(self, roles, samples, key, tools):
        x, _ = tools.sampler.noised(key, samples.id, samples.x0, samples.sigma)
        estimate = x - by_sample(samples.sigma, x) * roles["train"](x, samples.sigma, samples.cond)
        gradient = samples.extra["reward_grad"]
        return -(gradient * estimate).sum((1, 2)), {"gradient/size": abs(gradient).sum((1, 2))}


@pytest.mark.slow
def test_an_objective_that_needs_the_rewards_gradient_gets_it(small_policy, recorded, tmp_path):
    config = fast(small_policy, 3)
    config.rewards, config.reward_options = dict(colour=2.0), {}
    config.objective = configs.choose("objective", f"{__name__}:Ascent")
    config.batch.decode = 4  # two chunks
    train.train(config, tmp_path)
    log = lines(tmp_path)
    assert [line["compilations"] for line in log[1:]] == [2, 2, 2]
    for line, (*_, batch) in zip(log[1:], recorded.updates, strict=True):
        gradient = np.asarray(batch.extra["reward_grad"])
        assert gradient.shape == (1, *batch.x0.shape) and batch.rows == ()
        assert line["gradient/size"] == pytest.approx(np.abs(gradient).sum((0, 2, 3)).mean(), rel=1e-4)
        assert line["gradient/size"] > 0
    config.rewards = dict(strict=1.0)
    before = compilations("draw_samples", "update_policy")
    with pytest.raises(configs.ConfigError, match=r"rewards.strict=1.0: this reward has no gradient in the images"):
        train.train(config, tmp_path / "without")
    assert compilations("draw_samples", "update_policy") == before


@pytest.mark.slow
def test_a_run_starts_from_adapters_and_says_what_its_devices_do_in_vain(small_policy, tmp_path, monkeypatch, capsys):
    parts = families.read_parts(small_policy)
    skeleton = parts.family.transformer.skeleton(parts.configs["transformer"])
    config = fast(small_policy)
    config.model.lora.rank, config.model.lora.init_from = 4, str(tmp_path / "style")
    config.optimizer.learning_rate = 1e-12
    shapes = jax.eval_shape(lambda: lora.init(LoraConfig(4).on(parts.family.targets), skeleton, jax.random.key(0)))
    rng = np.random.default_rng(0)
    style = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.1).astype(np.float32), shapes)
    lora_files.save(tmp_path / "style", parts.table, style, 0.5)
    monkeypatch.setattr(train, "idle", lambda *args: ["every device computes all of it"])
    train.train(config, tmp_path / "run")
    assert "WARNING: every device computes all of it" in capsys.readouterr().out
    convert(tmp_path / "run", tmp_path / "out", "lora", which="raw")
    found = lora_files.load(tmp_path / "out", parts.table, skeleton, 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, style)
