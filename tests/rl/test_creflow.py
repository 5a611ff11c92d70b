import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.rl.objectives.creflow import CreFlow
from mixgrpo_jax.rl.objectives.nft import NFT
from tests.rl.test_elbo import KEYS, everywhere
from tests.rl.test_elbo import setting as setting
from tests.rl.test_nft import fixed, samples_at
from tests.rl.toys import KEY, SAMPLER, TOOLS

ADVANTAGE = jnp.array([1.0, -2.0, 0.5, -0.1, -1.0, -0.2, 0.0, -0.4])[:, None]  # nothing of the second group is good


def prepared(setting, objective, look):
    """Samples at a place with a map, and with what `prepare` finds of all of them."""
    every = everywhere(setting)._replace(advantage=jnp.stack([ADVANTAGE] * 2))
    still = {"old": lambda x, sigma, cond: jnp.zeros(x.shape)}
    found = objective.prepare(still, every, KEYS, TOOLS)
    samples = samples_at(setting, 0, ADVANTAGE)
    samples.extra.update({name: array[0] for name, array in found.items()} | {"map": jnp.asarray(look)})
    return samples


def losses(objective, samples, change=0.3):
    v_old = jax.random.normal(jax.random.key(1), samples.x0.shape)
    own = {"train": fixed(v_old + change), "old": fixed(v_old)}
    return objective(own, samples, KEY, TOOLS)[0], v_old + change


def test_a_map_of_ones_without_a_pull_is_nft(setting):
    samples = prepared(setting, CreFlow(), np.ones((8, 3)))
    np.testing.assert_allclose(losses(CreFlow(reflow=0.0), samples)[0], losses(NFT(), samples)[0], rtol=1e-5)


def test_the_loss_is_that_of_the_map_and_failures_are_drawn_to_the_groups_mean_success(setting):
    look = np.tile([1.0, 0.0, 0.0], (8, 1))
    samples = prepared(setting, CreFlow(), look)
    target = np.asarray(samples.x0[jnp.array([0, 2])]).mean(0)
    np.testing.assert_allclose(samples.extra["target"][:4], np.broadcast_to(target, (4, 3, 4)), atol=1e-5)
    np.testing.assert_array_equal(samples.extra["aimed"], [1, 1, 1, 1, 0, 0, 0, 0])
    plain, v = losses(CreFlow(reflow=0.0), samples)
    pulled, _ = losses(CreFlow(reflow=0.2), samples)
    x, _ = SAMPLER.noised(KEY, samples.id, samples.x0, samples.sigma)
    x0_hat = np.asarray(x - samples.sigma[:, None, None] * v)
    distance = np.square(x0_hat - target)[:, 0].mean(-1)
    expected = np.where([0, 1, 0, 1, 0, 0, 0, 0], 5.0 * 0.2 * distance, 0)  # times adv_max / beta
    np.testing.assert_allclose(pulled - plain, expected, rtol=1e-3, atol=1e-5)
    other = samples._replace(extra=samples.extra | {"map": jnp.asarray(2 * look)})  # a mean over the map, of any scale
    np.testing.assert_allclose(losses(CreFlow(), other)[0], losses(CreFlow(), samples)[0], rtol=1e-5)
    none = samples._replace(extra=samples.extra | {"map": jnp.zeros((8, 3))})
    assert not losses(CreFlow(), none)[0].any()


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"objective\.reflow=-1"):
        CreFlow(reflow=-1.0)
