import jax.numpy as jnp
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.programs import make_optimiser


@pytest.mark.parametrize(("warmup", "final", "expected"), [(0, 1.0, [1, 1, 1, 1]), (2, 0.0, [0.5, 1, 1, 0.5])])
def test_the_rate_warms_up_and_falls(warmup, final, expected):
    options = configs.base().optimizer
    options.learning_rate, options.weight_decay, options.warmup, options.final_rate = 0.1, 0.0, warmup, final
    optimiser = make_optimiser(options, num_updates=4)
    params, steps = jnp.zeros(()), []
    state = optimiser.init(params)
    for _ in range(4):
        update, state = optimiser.update(jnp.ones(()), state, params)  # Adam's step of a constant gradient is the rate
        steps.append(-float(update) / 0.1)
    assert steps == pytest.approx(expected, abs=1e-4)
