"""GCPO between its limits: chunks of one step are GRPO, one chunk is the sequence's ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.chunks import chunk_starts, relative_l1
from mixgrpo_jax.rl.objectives.gcpo import GCPO
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.update import count_evaluations
from tests.rl.test_ratios import ADVANTAGE, at, drawn, told
from tests.rl.toys import KEY, TOOLS

WIDE = dict(clip_low=0.1, clip_high=0.2)


def chunked(samples, chunk):
    return samples._replace(chunk=jnp.tile(jnp.array(chunk)[:, None], (1, 4)))


def loss_of(objective, samples, v):
    found = objective.prepare(told(v), samples, KEY, TOOLS)
    return lambda v: objective(told(v), samples._replace(extra=found), KEY, TOOLS)


@pytest.mark.parametrize("settings", [{}, dict(ratio="guard", weights="guard"), dict(old_log_prob="update")])
def test_chunks_of_one_step_are_grpo(settings):
    samples, v, _ = drawn()
    away = v + 0.1 * jax.random.normal(jax.random.key(1), v.shape)
    step = GRPO(**WIDE, **settings)

    def by_step(u):
        places = [step(told(u[n]), at(step, samples, v, n), KEY, TOOLS)[0] for n in range(3)]
        return jnp.stack(places).mean(0)

    loss = loss_of(GCPO(**WIDE, **settings), chunked(samples, [4, 1, 7]), v)
    np.testing.assert_allclose(loss(away)[0], by_step(away), rtol=1e-5)
    gradient, expected = (jax.grad(lambda u: f(u).sum())(away) for f in (lambda u: loss(u)[0], by_step))  # noqa: B023
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_one_chunk_is_the_ratio_of_the_sequence_and_flat_as_a_whole():
    samples, v, _ = drawn()
    change = jnp.array([[0.3, 0.1, -0.3, -0.1], [0.3, 0.0, -0.3, -0.1], [0.3, -0.1, -0.3, 0.05]])
    rows = samples.rows._replace(log_prob=samples.rows.log_prob - change[..., None])
    samples = chunked(samples._replace(rows=rows), [0, 0, 0])
    loss, metrics = loss_of(GCPO(**WIDE), samples, v)(v)
    ratio, a = np.exp(np.asarray(change.mean(0))), np.asarray(ADVANTAGE[:, 0])
    np.testing.assert_allclose(loss, np.maximum(-a * ratio, -a * np.clip(ratio, 0.9, 1.2)), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio/max_deviation"], np.abs(ratio - 1), rtol=1e-3, atol=1e-6)
    gradient = jax.grad(lambda u: loss_of(GCPO(**WIDE), samples, v)(u)[0].sum())(v)
    assert not gradient[:, 0].any() and jnp.abs(gradient[:, 1:]).min((2, 3)).min() > 0


@pytest.mark.parametrize("chunk, shares", [([0, 0, 1], [0.25, 0.25, 0.5]), ([3, 3, 3], [1 / 3] * 3)])
def test_at_the_old_velocity_chunks_share_evenly(chunk, shares):
    samples, v, w = drawn()
    gradient = jax.grad(lambda u: loss_of(GCPO(**WIDE), chunked(samples, chunk), v)(u)[0].sum())(v)
    for place, share in enumerate(shares):
        row = jax.tree.map(lambda a: a[place], samples.rows)  # noqa: B023
        step = TOOLS.sampler.step(row.x, v[place], row.sigma, row.sigma_next)
        expected = -share * ADVANTAGE[..., None] * step.dmean_dv / step.std * w[place] / 12
        np.testing.assert_allclose(gradient[place], expected, rtol=1e-3, atol=1e-6)


def test_a_rollout_of_another_velocity_is_caught():
    samples, v, _ = drawn()
    objective = GCPO(old_log_prob="update")
    metrics = loss_of(objective, samples, 1.1 * v)(1.1 * v)[1]
    assert metrics["ratio/max_deviation"].max() < 1e-6 and metrics["ratio/rollout_deviation"].max() > 1e-2
    assert loss_of(GCPO(), samples, v)(1.1 * v)[1]["ratio/max_deviation"].max() > 1e-3
    assert count_evaluations(GCPO(), (), TOOLS, (3, 4), 3) == (6, 3)  # each row is computed again


def test_chunks_follow_the_curve():
    samples, _, _ = drawn()
    curve = relative_l1(samples.rows)
    x, x_next = samples.rows.x[1], samples.rows.x_next[1]
    assert curve.shape == (3,) and curve[1] == pytest.approx(
        float(jnp.abs(x_next - x).sum() / jnp.abs(x).sum()), rel=1e-5
    )
    assert chunk_starts([3, 2, 1], longest=3) == (0,) and chunk_starts([3, 2, 1], longest=1) == (0, 1, 2)
    # Where the first derivative keeps its sign, halves are cut where the second one changes its own.
    assert chunk_starts([9, 8, 6, 3, 1, 0.5, 0.4, 0.3], longest=4) == (0, 4)
    for longest in (1, 2, 5):
        starts = chunk_starts(np.random.default_rng(longest).random(17), longest)
        assert starts[0] == 0 and (np.diff([*starts, 17]) > 0).all() and np.diff([*starts, 17]).max() <= longest
    with pytest.raises(ValueError, match="longest=0"):
        chunk_starts([1.0], 0)
