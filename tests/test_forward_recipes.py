"""Recipes of the forward family, of rewards' gradients and of credit, from the config to the log."""

import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.rl.samples import Tools
from mixgrpo_jax.rl.terms import make_terms
from mixgrpo_jax.rl.update import count_evaluations
from tests.test_train import fast_first, lines, tiny

FORWARD = ("awm", "vgrpo", "dpo", "apo", "dgpo", "crd", "creflow", "marble", "omninft")
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
