"""What every objective of the forward process keeps."""

import pkgutil
from functools import partial

import jax.numpy as jnp
import pytest

from mixgrpo_jax.rl.objectives import OBJECTIVES
from mixgrpo_jax.rl.objectives.forward import Forward
from tests.conftest import toy_velocity
from tests.rl.test_elbo import KEYS, everywhere
from tests.rl.test_elbo import setting as setting
from tests.rl.toys import TOOLS, every_place, moved

NAMES = [name for name, path in OBJECTIVES.items() if issubclass(pkgutil.resolve_name(path), Forward)]


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_step_tells_who_drew_the_samples(setting, name):
    objective, samples = pkgutil.resolve_name(OBJECTIVES[name])(), everywhere(setting)
    assert objective.on_policy["velocity/rollout_deviation"] == "rollout_tolerance"
    drawn, other = (every_place(partial(toy_velocity, p)) for p in (setting.params, moved(setting.params, 0.1)))
    others = {"train": other, "old": other, "base": other}

    def deviation(role):
        """Of a policy of which the role that draws is this one, and every other role is not."""
        return objective.prepare(others | {objective.draws: role}, samples, KEYS, TOOLS)["deviation"]

    assert deviation(drawn).shape == (1, 8) and jnp.abs(deviation(drawn)).max() < 1e-5
    assert deviation(other).min() > 1e-2
