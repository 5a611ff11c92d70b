import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.rl.objectives.preference import CRD, DGPO, DPO
from mixgrpo_jax.rl.update import count_evaluations
from tests.rl.test_elbo import KEYS, everywhere
from tests.rl.test_elbo import setting as setting
from tests.rl.test_nft import fixed
from tests.rl.toys import TOOLS

SIZE = 12  # elements of a latent
ADVANTAGE = np.array([1.0, -2.0, 0.5, 3.0, -1.0, 0.2, 0.1, -0.4], np.float32)  # of two groups of four


def given(setting, objective, advantage=ADVANTAGE):
    """Samples, their errors of the same velocity for every role, and the loss as a function of the trained one."""
    samples = everywhere(setting)._replace(advantage=jnp.tile(advantage[None, :, None], (2, 1, 1)))
    _, eps = objective.pairs(samples, KEYS, TOOLS)
    v = jax.random.normal(jax.random.key(1), eps.shape)

    def loss(trained, others=v):
        own = dict.fromkeys(("old", "base"), fixed(others)) | {"train": fixed(trained)}
        return objective(own, samples, KEYS, TOOLS)

    return samples, np.asarray(v - (eps - samples.x0)), v, loss


def gradient(loss, v):
    return np.asarray(jax.grad(lambda v: loss(v)[0].sum())(v))


def test_dpo_at_the_base_moves_by_wins_less_losses(setting):
    _, error, v, loss = given(setting, DPO(beta=3.0))
    won = np.array([1, -3, -1, 3, -3, 3, 1, -1])  # of each group's six pairs, wins less losses
    np.testing.assert_allclose(loss(v)[0].sum(), 8 * np.log(2), rtol=1e-5)
    expected = 3 / 4 * 4 / 6 * won[:, None, None] * 2 * error / SIZE / 2  # at two places
    np.testing.assert_allclose(gradient(loss, v), expected, rtol=1e-4, atol=1e-6)


def test_dpo_of_a_pair_is_the_log_sigmoid_of_its_margin(setting):
    samples, _, v, _ = given(setting, DPO(beta=3.0))
    samples = samples._replace(weight=jnp.array([0.0, 1, 0, 1, 0, 0, 0, 0]))  # the first group's best and worst
    _, eps = DPO().pairs(samples, KEYS, TOOLS)
    other = v + 0.1
    own = {"train": fixed(other), "base": fixed(v)}
    value, metrics = DPO(beta=3.0)(own, samples, KEYS, TOOLS)
    e, base = (np.square(a - (eps - samples.x0)).mean((2, 3)) for a in (other, v))
    margin = (e - base)[:, 1] - (e - base)[:, 3]
    np.testing.assert_allclose(value[3], 2 * np.log1p(np.exp(-1.5 * margin)).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["preference/right"][3], 2 * (margin > 0).mean())
    assert not value[jnp.array([0, 1, 2, 4, 5, 6, 7])].any()
    ties = given(setting, DPO(), np.ones(8, np.float32))
    assert not ties[3](other)[0].any() and not gradient(ties[3], other).any()


def test_diffusion_apo_takes_the_noise_that_the_sample_was_drawn_from(setting):
    samples = everywhere(setting)
    x, eps = DPO(noise="rollout").pairs(samples, KEYS, TOOLS)
    first = np.repeat(np.asarray(setting.batch.rows[0].x[:1]), 2, axis=0)
    np.testing.assert_array_equal(eps, first)
    t = np.asarray(samples.sigma)[..., None, None]
    np.testing.assert_allclose(x, (1 - t) * samples.x0 + t * first, atol=1e-6)
    shared, own = (DPO(noise=noise).pairs(samples, KEYS, TOOLS)[1] for noise in ("shared", "own"))
    assert (shared[:, 0] == shared[:, 3]).all() and (own[:, 0] != own[:, 3]).all()


def test_dgpo_at_the_base_is_half_the_weighted_loss(setting):
    _, error, v, loss = given(setting, DGPO())
    expected = ADVANTAGE[:, None, None] / 2 * 2 * error / SIZE / 2
    np.testing.assert_allclose(gradient(loss, v), expected, rtol=1e-4, atol=1e-6)


def test_dgpo_weighs_groups_and_clips_samples(setting):
    samples, _, v, loss = given(setting, DGPO(beta=2.0, clip=0.05))
    other = v + 0.3 * jax.random.normal(jax.random.key(2), v.shape)
    _, eps = DGPO().pairs(samples, KEYS, TOOLS)
    errors = [np.asarray(a - (eps - samples.x0)) for a in (other, v)]
    e, old = (np.square(a).mean((2, 3)) for a in errors)
    s = (2 * ADVANTAGE * (e - old)).reshape(2, 2, 4).mean(2)
    weight = np.repeat(1 / (1 + np.exp(-s)), 4, axis=1)
    past = np.where(ADVANTAGE > 0, np.exp(old - e) > 1.05, np.exp(old - e) < 0.95)
    assert past.any() and not past.all()
    np.testing.assert_allclose(loss(other)[0], (weight * ADVANTAGE * e).mean(0), rtol=1e-4)
    moved = np.where(past, 0, weight * ADVANTAGE)[..., None, None] * 2 * errors[0] / SIZE / 2
    np.testing.assert_allclose(gradient(loss, other), moved, rtol=1e-3, atol=1e-6)


def test_crd_at_the_old_velocity_follows_the_centred_reward(setting):
    _, error, v, loss = given(setting, CRD(beta=0.5, adv_max=2.0))
    reward = np.clip(ADVANTAGE / 2, -1, 1) / 2 + 0.5
    centred = reward - np.repeat(reward.reshape(2, 4).mean(1), 4)
    np.testing.assert_allclose(loss(v)[0], 4 * centred**2, rtol=1e-4)
    w = np.abs(error).mean((2, 3), keepdims=True)
    expected = 2 * 2.0 * centred[:, None, None] * 2 * error / w / SIZE / 2
    np.testing.assert_allclose(gradient(loss, v), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective, others", [(DPO(), 1), (DGPO(), 2), (CRD(), 1)])
def test_each_costs_its_roles_and_the_recorded_step(objective, others):
    named = {*objective.roles, objective.draws}
    assert count_evaluations(objective, named, TOOLS, (3, 4), 2) == (1 + 2 * others + 2 * 2, 2)


@pytest.mark.parametrize(
    "objective, field, value",
    [(DPO, "beta", 0.0), (DPO, "noise", "white"), (DGPO, "clip", -1.0), (CRD, "adv_max", 0.0)],
)
def test_bad_settings_are_named(objective, field, value):
    with pytest.raises(ValueError, match=rf"objective\.{field}={value!r}"):
        objective(**{field: value})
