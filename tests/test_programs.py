import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.programs import make_optimiser


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


def test_adafactor_keeps_vectors_for_matrices_and_moves_as_adamw_does():
    options = configs.base().optimizer
    options.learning_rate, options.max_grad_norm = 0.1, 1e9
    params, gradient = {"kernel": jnp.ones((256, 128))}, {"kernel": jnp.linspace(1, 2, 128) * jnp.ones((256, 1))}
    sizes, moves = {}, {}
    for options.name in ("adamw", "adafactor"):
        optimiser = make_optimiser(options, num_updates=4)
        state = optimiser.init(params)
        sizes[options.name] = sum(leaf.size for leaf in jax.tree.leaves(state))
        moves[options.name] = optimiser.update(gradient, state, params)[0]["kernel"]
    assert sizes["adamw"] > 2 * 256 * 128 and sizes["adafactor"] < 400
    # A gradient of rank one: its square is what the row and the column make, and every step is the rate.
    np.testing.assert_allclose(moves["adafactor"], moves["adamw"], rtol=1e-3)


def test_weight_decay_follows_the_rate():
    options = configs.base().optimizer
    options.learning_rate, options.weight_decay = 0.1, 0.5
    for options.name in ("adamw", "adafactor"):
        optimiser = make_optimiser(options, num_updates=4)
        update, _ = optimiser.update(jnp.zeros((2,)), optimiser.init(jnp.ones(2)), jnp.ones(2))
        np.testing.assert_allclose(optax.apply_updates(jnp.ones(2), update), 1 - 0.1 * 0.5, rtol=1e-6)
