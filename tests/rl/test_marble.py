import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixgrpo_jax.rl.marble import cosines, min_norm, mix
from mixgrpo_jax.rl.objectives.elbo import AWM
from mixgrpo_jax.rl.update import count_evaluations
from tests.rl.test_elbo import setting as setting
from tests.rl.toys import RECORD, TOOLS, direct_gradient, learn


def test_the_least_norm_within_the_simplex():
    np.testing.assert_allclose(min_norm(jnp.eye(3)), [1 / 3] * 3, rtol=1e-5)
    np.testing.assert_allclose(min_norm(jnp.ones((2, 2))), [0.5, 0.5], rtol=1e-5)  # equal ones share equally
    np.testing.assert_allclose(min_norm(jnp.array([[4.0, 0.0], [0.0, 1.0]])), [0.2, 0.8], rtol=1e-4)
    np.testing.assert_allclose(min_norm(jnp.array([[1.0, 2.0], [2.0, 9.0]])), [1, 0], atol=1e-5)  # on its bound
    np.testing.assert_allclose(min_norm(jnp.array([[3.0]])), [1.0])


def test_no_other_shares_have_a_smaller_norm():
    rng = np.random.default_rng(0)
    simplex = rng.dirichlet(np.ones(3), 4000)
    solve = jax.jit(min_norm)
    for vectors in rng.normal(size=(8, 3, 4)):
        gram = vectors @ vectors.T
        share = np.asarray(solve(jnp.asarray(gram, jnp.float32)), float)
        assert share @ gram @ share <= np.einsum("ni,ij,nj->n", simplex, gram, simplex).min() + 1e-4
        assert share.min() >= 0 and share.sum() == pytest.approx(1, abs=1e-5)


def test_cosines_and_a_reward_that_teaches_nothing():
    gram = jnp.array([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(cosines(gram), [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])


def gradients(*rows):
    return {"w": jnp.array(rows)}


def test_one_reward_and_two_equal_ones_are_as_without():
    for rows in ([[1.0, -2.0]], [[1.0, -2.0]] * 2):
        transform = mix(len(rows), 0.7)
        mixed, state = transform.update(gradients(*rows), transform.init(None))
        np.testing.assert_allclose(mixed["w"], rows[0], rtol=1e-5)
        np.testing.assert_allclose(state.share, 1 / len(rows), rtol=1e-5)
        assert transform.init(None).share.aval == state.share.aval  # or an update would compile twice


def test_shares_are_averaged_and_do_not_see_sizes():
    transform = mix(2, 0.75)
    state = transform.init(None)
    mixed, state = transform.update(gradients([100.0, 0.0], [0.0, 1.0]), state)
    np.testing.assert_allclose(mixed["w"], [50.0, 0.5], rtol=1e-4)
    tilted = state._replace(share=jnp.array([1.0, 0.0]))
    _, after = transform.update(gradients([100.0, 0.0], [0.0, 1.0]), tilted)
    np.testing.assert_allclose(after.share, [0.875, 0.125], rtol=1e-4)
    with pytest.raises(ValueError, match="takes 1 to 8 rewards with a weight, and there are 9"):
        mix(9, 0.7)


def test_an_update_mixes_the_gradients_of_its_rewards(setting):
    own = jax.random.normal(jax.random.key(4), (1, 8, 2)) * jnp.array([1.0, 20.0])
    objective, deviation = AWM(old="current"), {"deviation": jnp.zeros((1, 8))}
    expected = []
    for k in range(2):
        batch = setting.batch._replace(advantage=own[..., k : k + 1], extra=deviation)
        expected.append(direct_gradient(objective, setting.params, setting._replace(batch=batch)))
    flat = np.stack([np.concatenate([np.ravel(g[name]) for name in sorted(g)]) for g in expected])
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    share = np.asarray(min_norm(jnp.asarray(unit @ unit.T)))
    made = setting._replace(batch=setting.batch._replace(extra={"by_reward": own}))
    state, metrics = learn(objective, made, optimiser=optax.chain(mix(2, 0.0), RECORD), micro_batch=8)
    for name in setting.params:
        mixed = share[0] * expected[0][name] + share[1] * expected[1][name]
        np.testing.assert_allclose(state.opt_state[1][name], mixed, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose([metrics["share/0"][0], metrics["share/1"][0]], share, rtol=1e-3)
    each = count_evaluations(objective, (), TOOLS, (3, 4), 2, gradients=2)
    assert each == (1 + 2 * 2, 2 * 2) == (int(metrics["nfe/update"]) // 8, int(metrics["nfe/gradient"]) // 8)
