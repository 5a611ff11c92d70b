"""Ratios, surrogates and step weights, as functions of the velocity: nothing is compiled but single operations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow import kernels
from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.flow.schedules import shifted_sigmas
from mixgrpo_jax.rl import ratios
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.samples import Samples
from mixgrpo_jax.rl.update import count_evaluations
from tests.rl.toys import KEY, SAMPLER, TOOLS

OPEN = dict(clip_low=10.0, clip_high=10.0)
SIGMAS = shifted_sigmas(10, 3.0)
ADVANTAGE = jnp.array([1.5, -0.5, 0.7, -2.0])[:, None]

# Flash-GRPO's table for Wan, by 1000 sigma: 20 steps, shift 3, train_wanx2_1_flash.py.
FLASH = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]


def drawn(advantage=ADVANTAGE, sampler=SAMPLER, steps=(0, 4, 8)):
    """Samples [n, 4, ...] of a policy whose velocity is returned too, and the unit noise that drew them."""
    x, v, w = jax.random.normal(KEY, (3, len(steps), 4, 3, 4))
    sigma, sigma_next = (jnp.tile(SIGMAS[np.array(steps) + k][:, None], (1, 4)) for k in (0, 1))
    eta = jnp.ones_like(sigma)
    maps = []
    for place in range(len(steps)):
        transition = sampler.step(x[place], v[place], sigma[place], sigma_next[place], eta[place])
        x_next = kernels.sample(transition, w[place])
        maps.append((x_next, sampler.log_prob_map(transition, x_next)))
    rows = Rows(x, *map(jnp.stack, zip(*maps)), sigma, sigma_next, eta)
    one, ids = jnp.ones_like(sigma), jnp.arange(4)
    samples = Samples(
        None, rows, sigma, jnp.stack([advantage] * len(steps)), jnp.ones(4), one, one, ids // 2, ids, ids, {}
    )
    return samples, v, w


def told(v):
    """A policy whose velocity is this one."""
    return {"train": lambda x, sigma, cond: v}


def at(objective, samples, v, place=1, using=TOOLS):
    """The samples at a place, with what an iteration that begins with this velocity prepares."""
    found = samples.extra | objective.prepare(told(v), samples, KEY, using)
    weight, cond = samples.weight, samples.cond
    return jax.tree.map(
        lambda a: a[place], samples._replace(extra=found, weight=None, cond=None, group=None, id=None)
    )._replace(weight=weight, cond=cond)


def loss_of(objective, samples, using=TOOLS):
    """v -> losses [b], metrics."""
    return lambda v: objective(told(v), samples, KEY, using)


@pytest.mark.parametrize(
    "ratio, surrogate, weights",
    [
        *((*pair, "even") for pair in itertools.product(ratios.RATIOS, ratios.SURROGATES)),
        *(("plain", "clip", weights) for weights in ratios.WEIGHTS if weights != "even"),
        ("guard", "clip", "guard"),
        ("fair", "hinge", "fair2"),
    ],
)
def test_at_the_old_velocity_every_gradient_is_the_weighted_policy_gradient(ratio, surrogate, weights):
    objective, (samples, v, w) = GRPO(**OPEN, ratio=ratio, surrogate=surrogate, weights=weights), drawn()
    here, place = at(objective, samples, v), 1
    gradient = jax.grad(lambda v: loss_of(objective, here)(v)[0].sum())(v[place])
    row, step = here.rows, ratios.steps_of(SAMPLER, samples.rows)
    factor = ratios.RATIOS[ratio].scale(step) * ratios.normalised(ratios.WEIGHTS[weights](step))
    slope = SAMPLER.step(row.x, v[place], row.sigma, row.sigma_next).dmean_dv / step.std[place][:, None, None]
    np.testing.assert_allclose(jnp.abs(slope[:, 0, 0]), step.kappa[place], rtol=1e-5)
    expected = -(ADVANTAGE * factor[place][:, None])[..., None] * slope * w[place] / 12  # of 12 elements
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)
    assert loss_of(objective, here)(v[place])[1]["ratio/max_deviation"].max() < 1e-6


@pytest.mark.parametrize("weights", ratios.WEIGHTS)
def test_weights_have_mean_one(weights):
    found = GRPO(weights=weights).prepare({}, drawn()[0], KEY, TOOLS)
    assert found["step_weight"].mean() == pytest.approx(1, rel=1e-5) if weights != "even" else found == {}


def steps_of_schedule(sampler, sigmas):
    rows = Rows(
        None, None, None, *(jnp.asarray(a)[:, None] for a in (sigmas[:-1], sigmas[1:], np.ones(len(sigmas) - 1)))
    )
    return ratios.steps_of(sampler, rows)


def test_flash_weights_are_the_published_table():
    sigmas = shifted_sigmas(20, 3.0)
    step = steps_of_schedule(Sampler(kernel="linear", eta=float(sigmas[1])), sigmas)  # g = sigma_max sigma
    np.testing.assert_allclose(ratios.WEIGHTS["flash"](step)[:10, 0], FLASH, rtol=1e-3)


def test_published_constants_are_means_over_the_trained_steps():
    trained = steps_of_schedule(Sampler(kernel="flow", eta=0.7), SIGMAS[:-1])  # Flow-GRPO's, on SD3.5
    weights = ratios.normalised(ratios.WEIGHTS["tempflow"](trained))
    np.testing.assert_allclose(weights, 2.25 * trained.std, rtol=5e-3)
    every = steps_of_schedule(Sampler(kernel="flow", eta=0.7), SIGMAS)
    zeta = ratios.RATIOS["pcpo"].scale(every) * every.kappa / every.dt
    np.testing.assert_allclose(zeta, 4.3152134639895925, rtol=5e-3)


def test_the_divergence_is_kappa_squared_by_the_velocitys_change():
    samples, v, _ = drawn()
    row, change = jax.tree.map(lambda a: a[1], samples.rows), 0.1 * jax.random.normal(jax.random.key(1), v[1].shape)
    old, now = (SAMPLER.step(row.x, u, row.sigma, row.sigma_next) for u in (v[1], v[1] + change))
    linear, divergence = ratios.moved(now, old, row.x_next)
    np.testing.assert_allclose(divergence, kernels.kappa(old)[..., 0] ** 2 / 2 * (change**2).mean(-1), rtol=1e-4)
    log_ratio = SAMPLER.log_prob_map(now, row.x_next) - row.log_prob
    np.testing.assert_allclose(linear - divergence, log_ratio, atol=1e-4)


def test_guards_ratio_is_linear_and_each_samples_own():
    objective, (samples, v, w) = GRPO(**OPEN, ratio="guard", surrogate="hinge"), drawn()
    here, change = at(objective, samples, v), jnp.zeros_like(v[1]).at[2].set(0.3)
    log_ratio = -loss_of(objective, here._replace(advantage=jnp.ones((4, 1))))(v[1] + change)[0] + 10  # of the hinge
    slope = SAMPLER.step(here.rows.x, v[1], here.rows.sigma, here.rows.sigma_next).dmean_dv
    np.testing.assert_allclose(log_ratio, [0, 0, (slope * change * w[1]).mean((1, 2))[2], 0], atol=1e-5)


def test_fair_ratios_are_equal_where_means_move_equally():
    by_step = []
    for place in (0, 1, 2):
        objective, (samples, v, _) = GRPO(**OPEN, ratio="fair"), drawn(advantage=jnp.ones((4, 1)))
        here = at(objective, samples, v, place)
        row = here.rows
        step = SAMPLER.step(row.x, v[place], row.sigma, row.sigma_next)
        # x' where it is likely, so that log p / p_old = -D alone: the same distance of means counts the same
        here = here._replace(rows=row._replace(x_next=step.mean))
        by_step.append(-loss_of(objective, here)(v[place] + 0.01 / step.dmean_dv)[0])
    np.testing.assert_allclose(by_step, np.exp(-(0.01**2) / 2), rtol=1e-6)


def test_surrogates_by_hand():
    ratio = jnp.exp(jnp.array([0.3, -0.3, 0.3, -0.3])[:, None])
    advantage, far = jnp.array([1.0, 1.0, -2.0, -2.0])[:, None], jnp.array([0.05, 0.05, 0.05, 0.02])[:, None]
    loss, flat = ratios.hinge(ratio, advantage, 0.2, 0.1, far)
    np.testing.assert_allclose(loss[:, 0], [0, 0.1 + 0.3, 2 * (0.2 + 0.3), 0], rtol=1e-6)
    assert flat[:, 0].tolist() == [True, False, False, True]
    loss, flat = ratios.divergence(ratio, advantage, 0.03, 0.03, far)  # the last moves on, and is near
    np.testing.assert_allclose(loss[:, 0], [0, -ratio[1, 0], 2 * ratio[2, 0], 2 * ratio[3, 0]], rtol=1e-6)
    assert flat[:, 0].tolist() == [True, False, False, False]
    loss, flat = ratios.clip(ratio, advantage, 0.2, 0.1, far)
    np.testing.assert_allclose(loss[:, 0], [-1.1, -ratio[1, 0], 2 * ratio[2, 0], 2 * 0.8], rtol=1e-6)


def test_steps_without_noise_teach_nothing():
    samples, v, _ = drawn()
    rows = samples.rows._replace(eta=samples.rows.eta.at[1].set(0), log_prob=samples.rows.log_prob.at[1].set(0))
    objective = GRPO(**OPEN, ratio="pcpo", surrogate="hinge", weights="flash")
    here = at(objective, samples._replace(rows=rows), v)
    assert not jax.grad(lambda v: loss_of(objective, here)(v)[0].sum())(v[1] + 0.1).any()


@pytest.mark.parametrize("ratio, surrogate", [("guard", "clip"), ("pcpo", "hinge"), ("plain", "divergence")])
def test_a_rollout_of_another_velocity_is_caught(ratio, surrogate):
    objective, (samples, v, _) = GRPO(ratio=ratio, surrogate=surrogate), drawn()
    metrics = loss_of(objective, at(objective, samples, 1.1 * v))(1.1 * v[1])[1]  # as of another guidance
    assert metrics["ratio/max_deviation"].max() < 1e-6
    assert metrics["ratio/rollout_deviation"].max() > 1e-2
    assert loss_of(objective, at(objective, samples, v))(v[1])[1]["ratio/rollout_deviation"].max() < 1e-5
    assert "ratio/rollout_deviation" in objective.on_policy
    assert count_evaluations(objective, (), TOOLS, (3, 4), 2) == (4, 2)


def test_a_map_of_one_advantage_has_the_samples_divergence_by_position():
    objective = GRPO(**OPEN, ratio="guard", surrogate="clip")
    (one, v, _), (mapped, _, _) = drawn(), drawn(jnp.broadcast_to(ADVANTAGE, (4, 3)))

    def gradient(samples):
        here = at(objective, samples, v)
        return jax.grad(lambda v: loss_of(objective, here)(v)[0].sum())(v[1])

    np.testing.assert_allclose(gradient(one), gradient(mapped), rtol=1e-4, atol=1e-7)


def test_settings_that_cannot_be_are_named():
    for field in ("ratio", "surrogate", "weights"):
        with pytest.raises(ValueError, match=f"objective.{field}='none'.*choose from"):
            GRPO(**{field: "none"})
    with pytest.raises(ValueError, match=r"objective.ratio='guard'.*one_step_off_policy=True.*set it to False"):
        GRPO(ratio="guard").settled("float32", stale=True)
    with pytest.raises(ValueError, match=r"old_log_prob='rollout' with ratio='plain', surrogate='hinge'.*'auto'"):
        GRPO(surrogate="hinge", old_log_prob="rollout").settled("float32", stale=False)
    assert GRPO(surrogate="divergence").tolerance == np.inf and GRPO(ratio="guard").tolerance == 5e-5
