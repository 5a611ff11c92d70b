"""Recipes of the forward family, of rewards' gradients and of credit, from the config to the log."""

import os

import jax
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.rl.samples import Tools
from mixgrpo_jax.rl.terms import make_terms
from mixgrpo_jax.rl.update import count_evaluations
from mixgrpo_jax.runtime.checkpoint import Checkpoints
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import ROOT, run_program
from tests.test_train import fast_first, lines, stopped, tiny

FORWARD = ("awm", "vgrpo", "dpo", "apo", "dgpo", "crd", "creflow", "marble", "omninft")
KEEPS = ("awm", "creflow", "crd", "dgpo", "marble", "nft", "omninft", "op_grpo")  # averages of their own, or samples
KEEPS = KEEPS if os.environ.get("MIXGRPO_JAX_KEEPS") == "all" else ("crd",)
GRADIENT = ("draft", "refl", "leap_align", "adjoint", "rsm_first_order")
CREDIT = ("gdpo", "dr_grpo", "slas", "poca", "otca", "vipo", "edit_grpo", "pec", "adagrpo")


def brightness(images, prompts, metadata):
    """By picture, so that groups differ."""
    return np.asarray(images, np.float32).mean((1, 2, 3)) / 255


def small(folder, recipe):
    """Two iterations of that policy, in which the brightness is rewarded in the reader's place."""
    config = tiny(recipe, 2)
    config.model.folder, config.watched = str(folder), tuple(name for name in config.watched if name != "strict")
    config.rewards = {"bright" if name == "ocr" else name: weight for name, weight in config.rewards.items()}
    if "bright" in config.rewards:
        config.reward_options.bright = dict(kind="function", path=f"{__name__}:brightness")
    if "ocr_dense" in config.rewards:  # its reader takes long to compile
        config.rewards, config.watched = dict(colour=1.0), ()
    config.advantage.routes = tuple(route.replace("ocr:", "bright:") for route in config.advantage.routes)
    config.evaluation.prompts = config.evaluation.batch = 2
    config.evaluation.num_steps = 1
    config.optimizer.learning_rate = 1e-3
    return config


@pytest.mark.parametrize("recipe", fast_first([*FORWARD, *GRADIENT, *CREDIT], []))
def test_a_recipe_trains_on_policy_at_its_cost_by_two_programs(small_policy, tmp_path, recipe):
    config = small(small_policy, recipe)
    train.train(config, tmp_path)
    settings, log = configs.resolve(config), lines(tmp_path)
    tools = Tools(settings.sampler, make_terms(settings.terms, settings.sampler), {})
    asked = settings.roles | {settings.objective.draws}
    shape, places = (24, 96), settings.planner.num_trained
    update, gradient = count_evaluations(settings.objective, asked, tools, shape, places, settings.gradients)
    assert len(log) == 3
    for line in log[1:]:
        assert line["compilations"] == 2 and line["grad_norm"] > 0
        assert line["nfe/update"] == settings.trained_samples * update
        assert line["nfe/gradient"] == settings.trained_samples * gradient
        for name, field in settings.objective.on_policy.items():
            assert name not in line or line[name] < config[field]
        assert ("share/0" in line) == (recipe == "marble")


ON_EIGHT = """
import sys
from mixgrpo_jax import train
from tests.test_forward_recipes import small
config = small(sys.argv[2], sys.argv[3])
config.batch.group, config.batch.micro_batch = 8, 8
config.mesh.update(dict(data=2, fsdp=4))
train.train(config, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", KEEPS)
def test_what_a_recipe_keeps_resumes_bit_for_bit_and_is_the_same_on_eight_devices(small_policy, tmp_path, recipe):
    straight, resumed, eight = (tmp_path / name for name in ("straight", "resumed", "eight"))
    config = small(small_policy, recipe)
    config.iterations, config.batch.group, config.batch.micro_batch = 4, 8, 8  # an update has a sample of each device
    train.train(config, straight)
    stopped(config, resumed, 4)
    train.train(config, resumed)  # from the checkpoint at 2
    assert lines(resumed) == lines(straight)
    one, other = (_state(workdir) for workdir in (straight, resumed))
    assert set(one["averages"]) == set(config.averages)
    jax.tree.map(np.testing.assert_array_equal, one, other)

    run_program(ON_EIGHT, eight, small_policy, recipe, cwd=ROOT, **virtual_devices(8))
    for ours, theirs in zip(lines(eight)[1:], lines(straight)[1:3], strict=True):
        for name in ("reward/bright/mean", "advantage/abs_mean", "loss/total", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def _state(workdir):
    checkpoints = Checkpoints(workdir)
    tree = checkpoints._manager.restore(checkpoints.latest)["state"]
    checkpoints.close()
    return tree
