import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.plans import PlanConfig, WindowState, make_plan
from mixgrpo_jax.flow.rollout import Sampler, rollout
from mixgrpo_jax.rl.objectives import GRPOConfig, Row, grpo

ADVANTAGE = jnp.array([1.5, -0.5])


def row_of(toy, sampler, step=1):
    velocity, params, noise, cond = toy
    plan = make_plan(PlanConfig(num_steps=8, length=3), WindowState(1, 0, 0))
    rows = rollout(velocity, params, plan, noise, cond, jax.random.key(3), sampler=sampler, window_length=3).rows
    return Row(*(leaf[step] for leaf in rows), advantage=ADVANTAGE, cond=cond)


def moved(params, scale):
    keys = jax.random.split(jax.random.key(9), 2)
    return {name: p + scale * jax.random.normal(key, p.shape) for (name, p), key in zip(params.items(), keys)}


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps", "precise", "dance_precise"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient(toy, kernel, reduce):
    velocity, params, *_ = toy
    sampler = Sampler(kernel=kernel)
    row = row_of(toy, sampler)
    objective = grpo(velocity, sampler, GRPOConfig(clip_low=0.1, clip_high=0.1, reduce=reduce))
    (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params, None, row)
    assert metrics["ratio/max_deviation"] < 1e-5
    assert metrics["ratio/clip_fraction"] == 0

    def log_prob(params):
        transition, _ = sampler.transition(velocity, params, row.x, row.sigma, row.sigma_next, row.cond)
        per_sample = sampler.log_prob_map(transition, row.x_next)
        return (-row.advantage * (per_sample.mean(1) if reduce == "mean" else 4 * per_sample.sum(1))).mean()

    expected = jax.grad(log_prob)(params)
    for name in params:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(clip_low=10.0, clip_high=10.0),
        GRPOConfig(clip_low=1e-4, clip_high=1e-4),
        GRPOConfig(clip_low=10.0, clip_high=10.0, reduce="sum"),
        GRPOConfig(kl_rollout=2.0),
        GRPOConfig(kl_reference=0.7),
    ],
)
def test_gradient_against_finite_differences(toy, config):
    velocity, params, *_ = toy
    sampler = Sampler()
    row, away, reference = row_of(toy, sampler), moved(params, 0.02), moved(params, 0.1)
    objective = grpo(velocity, sampler, config)
    loss = jax.jit(lambda p: objective(p, reference, row)[0])
    gradient = jax.grad(loss)(away)
    direction = moved(jax.tree.map(jnp.zeros_like, params), 1.0)
    along = sum(jnp.vdot(gradient[name], direction[name]) for name in params)
    step = 3e-3
    ends = [loss(jax.tree.map(lambda p, d: p + s * d, away, direction)) for s in (step, -step)]  # noqa: B023
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=2e-4)
    if config.clip_low < 1 and not config.kl_rollout and not config.kl_reference:
        assert jnp.abs(along) < 10  # both samples are clipped or not; either way the two agree above


def test_clipping_by_hand(toy):
    velocity, params, *_ = toy
    sampler, row = Sampler(), row_of(toy, Sampler())
    log_ratio = jnp.array([0.3, -0.3])  # pretend that the rollout's policy found the steps that much less likely
    row = row._replace(log_prob=row.log_prob - log_ratio[:, None])
    config = GRPOConfig(clip_low=0.1, clip_high=0.2)
    loss, metrics = grpo(velocity, sampler, config)(params, None, row)
    # A=1.5, r=e^.3 is clipped to 1.2; A=-.5, r=e^-.3 is clipped to 0.9, where max takes the clipped, larger loss
    np.testing.assert_allclose(loss, (-1.5 * 1.2 + 0.5 * 0.9) / 2, rtol=1e-5)
    assert metrics["ratio/clip_fraction"] == 1
    np.testing.assert_allclose(metrics["ratio/max_deviation"], np.exp(0.3) - 1, rtol=1e-4)
    penalised, metrics = grpo(velocity, sampler, GRPOConfig(0.1, 0.2, kl_rollout=2.0))(params, None, row)
    np.testing.assert_allclose(penalised - loss, 0.3**2, rtol=1e-4)
    gradient = jax.grad(lambda p: grpo(velocity, sampler, config)(p, None, row)[0])(params)
    assert all(jnp.abs(g).max() == 0 for g in gradient.values())


def test_kl_to_a_reference_is_the_closed_form(toy):
    velocity, params, *_ = toy
    sampler, reference = Sampler(), moved(params, 0.1)
    row = row_of(toy, sampler)
    _, metrics = grpo(velocity, sampler, GRPOConfig(kl_reference=1.0))(params, reference, row)
    one, v = sampler.transition(velocity, params, row.x, row.sigma, row.sigma_next, row.cond)
    _, v_reference = sampler.transition(velocity, reference, row.x, row.sigma, row.sigma_next, row.cond)
    expected = ((one.dmean_dv * (v - v_reference)) ** 2 / (2 * one.std**2)).mean()
    np.testing.assert_allclose(metrics["kl/reference"], expected, rtol=1e-4)
    _, metrics = grpo(velocity, sampler, GRPOConfig(kl_reference=1.0))(params, params, row)
    assert metrics["kl/reference"] == 0


@pytest.mark.parametrize(("field", "value"), [("reduce", "max"), ("clip_low", 0.0), ("kl_rollout", -1.0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"objective.{field}={value!r}"):
        GRPOConfig(**{field: value})
