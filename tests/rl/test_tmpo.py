"""TMPO and Uni-TMPO: gradients in closed form, and what is at rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.rl.objectives.tmpo import TMPO, UniTMPO
from mixgrpo_jax.rl.update import count_evaluations
from tests.rl.test_ratios import ADVANTAGE, drawn, told
from tests.rl.toys import KEY, TOOLS

GROUPS = [slice(0, 2), slice(2, 4)]


def losses(objective, samples):
    return lambda v: objective(told(v), samples, KEY, TOOLS)


def log_probs(samples, reduce="mean"):
    """s [b] of velocities."""

    def s(v):
        total = 0.0
        for place in range(len(v)):
            row = jax.tree.map(lambda a: a[place], samples.rows)  # noqa: B023
            transition = TOOLS.sampler.step(row.x, v[place], row.sigma, row.sigma_next)
            total += TOOLS.sampler.log_prob_map(transition, row.x_next).mean(-1) * (12 if reduce == "sum" else 1)
        return total

    return s


def softmaxes(values):
    return jnp.concatenate([jax.nn.softmax(values[group]) for group in GROUPS])


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_uni_tmpo_is_a_divergence_whose_gradient_is_p_less_q(reduce):
    samples, v, _ = drawn()
    loss, s = losses(UniTMPO(beta=0.7, reduce=reduce), samples), log_probs(samples, reduce)
    p, q = softmaxes(s(v)), softmaxes(0.7 * ADVANTAGE[:, 0])
    np.testing.assert_allclose(loss(v)[0].mean(), (q * jnp.log(q / p)).sum() / 2, rtol=1e-4)  # of two groups
    gradient = jax.grad(lambda v: loss(v)[0].mean())(v)
    expected = jax.grad(lambda v: ((p - q) * s(v)).sum() / 2)(v)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)
    assert jnp.abs(expected).max() > 1e-3


def test_tmpo_at_the_old_velocity_is_the_policy_gradient_of_log_q_less_log_p():
    samples, v, _ = drawn()
    loss, s = losses(TMPO(beta=1.5), samples), log_probs(samples)
    advantage = jnp.log(softmaxes(1.5 * ADVANTAGE[:, 0])) - jnp.log(softmaxes(s(v)))
    gradient = jax.grad(lambda v: loss(v)[0].sum())(v)
    np.testing.assert_allclose(gradient, jax.grad(lambda v: -(advantage * s(v)).sum())(v), rtol=1e-3, atol=1e-6)
    # A group whose log-probs all change alike has ratios of 1, and what leaves it by more than the clip is flat.
    for change, ratio in (
        (jnp.full(4, 0.5), jnp.ones(4)),
        (jnp.array([0.9, -0.9, 0, 0]), jnp.exp(jnp.array([0.9, -0.9, 0, 0]))),
    ):
        rows = samples.rows._replace(log_prob=samples.rows.log_prob - change[:, None] / 3)
        expected = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 0.8, 1.2))
        np.testing.assert_allclose(losses(TMPO(beta=1.5), samples._replace(rows=rows))(v)[0], expected, rtol=1e-3)


@pytest.mark.parametrize("objective", [TMPO(), UniTMPO()])
def test_equal_rewards_and_what_has_no_weight_teach_nothing(objective):
    samples, v, _ = drawn(jnp.array([1.0, -1.0, 0.5, 0.5])[:, None])
    gradient = jax.grad(lambda v: losses(objective, samples)(v)[0].sum())(v)
    assert jnp.abs(gradient[:, :2]).max() > 1e-4 and not gradient[:, 2:].any()
    # A reward of a sample without weight is nobody's business; where a whole group has none, nothing is NaN.
    other = samples._replace(advantage=samples.advantage.at[:, 1].set(9.0), weight=jnp.array([1.0, 0.0, 0.0, 0.0]))
    loss, metrics = losses(objective, other)(v)
    assert loss[0] == 0 and jnp.isfinite(loss).all() and all(jnp.isfinite(m).all() for m in metrics.values())


def test_equal_rewards_and_equal_log_probs_are_at_rest():
    one = jnp.ones(3)
    peers = jnp.ones((3, 3), bool)
    assert jnp.abs(TMPO().loss(-2 * one, 0 * one, jnp.log(one / 3), peers)).max() < 1e-6
    assert jnp.abs(UniTMPO().loss(-2 * one, 0 * one, jnp.log(one / 3), peers)).max() < 1e-6


@pytest.mark.parametrize("objective", [TMPO(), UniTMPO()])
def test_a_rollout_of_another_velocity_is_caught(objective):
    samples, v, _ = drawn()
    assert "ratio/rollout_deviation" in objective.on_policy
    assert losses(objective, samples)(v)[1]["ratio/rollout_deviation"].max() < 1e-5
    assert losses(objective, samples)(1.1 * v)[1]["ratio/rollout_deviation"].max() > 1e-2
    assert count_evaluations(objective, (), TOOLS, (3, 4), 3) == (6, 3)  # each row is computed again


@pytest.mark.parametrize(("field", "value"), [("beta", 0.0), ("reduce", "max"), ("clip", 0.0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"objective.{field}={value!r}"):
        TMPO(**{field: value})
