"""That each method learns: a small policy's pictures become bright where brightness is the reward."""

import os
import pathlib

import jax
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.collect import Collector
from mixgrpo_jax.engine.held_out import HeldOut
from mixgrpo_jax.engine.loading import load_policy
from mixgrpo_jax.engine.programs import make_programs
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.on_device import OnDevice
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.tasks import load_task
from tests.test_train import two_splits

SEEDS = (1, 2, 3)
CONFIGS = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")
# Iterations by recipe. Some learn by small steps, or from samples of an average. All run with MIXGRPO_JAX_LEARN=all.
RECIPES = dict(dpo=60, vgrpo=30, flow_dppo=30, op_grpo=30)
GRADIENTS = dict(draft=10, refl=10, leap_align=10, adjoint=10, rsm_first_order=10)
if os.environ.get("MIXGRPO_JAX_LEARN") == "all":
    RECIPES |= dict(nft=60, grpo_guard=60, pcpo=60, awm=30, crd=30, rsm=30, tempflow=30, flash_grpo=30, tmpo=30)
    RECIPES |= dict(dgpo=30, gcpo=30, uni_tmpo=30) | GRADIENTS
    RECIPES |= dict.fromkeys(("tmpo_tree", "branch_grpo", "branch_grpo_pruned", "tree_rpo"), 30)


def brightness(images, prompts, metadata):
    return np.asarray(images, np.float32).mean((1, 2, 3)) / 255


BRIGHT = OnDevice(lambda params, images, inputs: images.mean((1, 2, 3)) / 255, {}, lambda prompts, metadata: None)
BRIGHT = Reward("bright", "device", BRIGHT)


def as_they_are(advantage, rng):
    return advantage


def shuffled(advantage, rng):
    return rng.permuted(advantage, axis=1)


def flipped(advantage, rng):
    return -advantage


CHANGES = (as_they_are, flipped, shuffled)


def changed(batch, change, group, rng):
    """A batch with other advantages, or other gradients of rewards: shuffled, half of the samples have the opposite."""
    if "reward_grad" in batch.extra:
        half = rng.permutation(np.resize([1.0, -1.0], batch.weight.shape))
        sign = half if change is shuffled else change(np.ones_like(half), rng)
        gradient = batch.extra["reward_grad"] * sign[:, None, None].astype(np.float32)
        return batch._replace(extra=batch.extra | {"reward_grad": gradient})
    by_group = np.asarray(batch.advantage[..., 0]).reshape(-1, group)  # and place
    factor = change(by_group, rng).reshape(len(batch.advantage), -1, 1)
    return batch._replace(advantage=np.broadcast_to(factor, batch.advantage.shape))


def bright(folder, recipe, iterations):
    """A short run of a recipe on a small policy."""
    config = configs.load(recipe, CONFIGS)
    config.model.folder = str(folder)
    config.rewards, config.watched = dict(bright=1.0), ()
    config.reward_options = dict(bright=dict(kind="function", path=f"{__name__}:brightness"))
    config.iterations = iterations
    config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 4, 8, 2, 16
    config.plan.num_steps = 4
    if config.plan.name == "tree":
        two_splits(config.plan)
    elif "length" in config.plan:
        config.plan.length, config.plan.bound = min(config.plan.length, 2), None
    if "iterations_per_window" in config.plan:
        config.plan.iterations_per_window = 5
    if config.plan.get("chunks"):
        config.plan.chunks = (0, 2)
    config.optimizer.learning_rate = 3e-3
    config.evaluation.prompts = config.evaluation.batch = 32
    config.evaluation.num_steps = 4
    return config


def setting(config):
    """`run(seed, change)` of a policy's programs; change is what is done to advantages."""
    settings, mesh = configs.resolve(config), meshes.make_mesh(config.mesh)
    parts, policy, trainable, frozen = load_policy(settings, mesh, master=True)
    needs_gradient = "reward_grad" in settings.objective.needs
    rewards = [BRIGHT if needs_gradient else Reward("bright", "host", brightness)]
    programs = make_programs(settings, parts, trainable, mesh)
    held_out = HeldOut(settings, policy, rewards, trainable.attach)
    start = jax.tree.map(np.asarray, trainable.params)

    def run(seed, change):
        """The change of each held-out picture's brightness over a run, [N]."""
        config.seed, rng = seed, np.random.default_rng(seed)
        task = load_task("signs")
        prompts = task.batches(task.load("train", ""), seed, config.batch.prompts)
        collector = Collector(settings, policy, programs, frozen, prompts, rewards, mesh)
        state, planned = programs.init(jax.tree.map(jax.numpy.asarray, start)), settings.planner.initial()
        before = held_out.assess(state.params, frozen)
        for _ in range(config.iterations):
            drawn = collector.take(state, planned)
            batch, *rest = collector.learn(drawn, collector.score(drawn)).given
            batch = changed(batch, change, config.batch.group, rng)
            state, _ = programs.update(state, frozen["base"], batch, *rest)
            planned = settings.planner.advance(planned)
        return held_out.assess(state.params, frozen).scores["bright"] - before.scores["bright"]

    return run


def in_standard_errors(changes):
    """The mean change of seeds' runs, in standard errors of what the seeds differ by and of what pictures do."""
    by_seed = np.array([change.mean() for change in changes])
    pictures = np.concatenate(changes)
    error = max(by_seed.std(ddof=1) / np.sqrt(len(by_seed)), pictures.std(ddof=1) / np.sqrt(len(pictures)))
    return by_seed.mean() / error


def check(config):
    run = setting(config)
    rises, falls, stays = (in_standard_errors([run(seed, change) for seed in SEEDS]) for change in CHANGES)
    print(rises, falls, stays)
    assert rises > 3
    assert falls < -3
    assert abs(stays) < 3


def test_the_reward_rises_by_what_it_says_and_by_nothing_else(small_policy):
    config = bright(small_policy, "mixgrpo", 10)
    config.objective.clip_low = config.objective.clip_high = 1e-2
    config.optimizer.learning_rate = 1e-3
    check(config)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_other_objectives_learn_what_they_are_told(small_policy, recipe):
    check(bright(small_policy, recipe, RECIPES[recipe]))
