"""Replayed groups: what is kept and comes back, what it is weighed with, and that without it nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.plans.window import Window, WindowState
from mixgrpo_jax.rl import ratios, replay
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.objectives.op_grpo import OPGRPO
from mixgrpo_jax.rl.select import Replay, take
from tests.rl.test_ratios import ADVANTAGE, at, drawn, loss_of
from tests.rl.toys import KEY, TOOLS, case, learn, moved

OPEN = dict(clip_low=10.0, clip_high=10.0)


@pytest.fixture(scope="module")
def groups(toy):
    """Two groups of two, and two kept ones, of another window."""
    made, other = (case(toy, Window(num_steps=8, length=2, group=2), WindowState(start, 0, 0)) for start in (1, 4))
    return made, replay.keep(other.batch, other.plan, jnp.array([[0, 1], [2, 3]]), 2)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_kept_comes_back(groups):
    made, kept = groups
    batch, plan = replay.join(made.batch, made.plan, *kept)
    assert batch.extra["replayed"].tolist() == [[0] * 4 + [1] * 4]
    equal(replay.keep(batch, plan, replay.positions(np.array([2, 3]), 2), 2), kept)
    mixed, of_mixed = take(batch, plan, replay.positions(np.array([3, 1]), 2), 2)
    assert mixed.extra["replayed"].tolist() == [[1, 1, 0, 0]] and of_mixed.step.tolist() == [[4, 1], [5, 2]]
    np.testing.assert_array_equal(mixed.rows[0].sigma[:, ::2], of_mixed.sigma)


def test_without_replayed_groups_it_is_grpo_bit_for_bit(groups):
    made, kept = groups
    batch, plan = take(*replay.join(made.batch, made.plan, *kept), replay.positions(np.arange(2), 2), 2)
    params, sizes = moved(made.params, 0.01), dict(num_updates=2, micro_batch=2)  # not the rollout's: ratios differ
    expected, told = learn(GRPO(old_log_prob="update"), made, params, **sizes)
    objective = OPGRPO().settled("float32", stale=False)
    found, metrics = learn(objective, made._replace(batch=batch, plan=plan), params, **sizes)
    assert metrics.pop("replay/share").max() == 0
    equal((found, metrics), (expected, told))


def test_a_replayed_samples_gradient_is_weighed_by_its_sequence_and_cut_by_kappa():
    samples, v, _ = drawn()
    before = v + 0.3 * jax.random.normal(jax.random.key(1), v.shape)  # of the update; v drew the samples
    replayed = jnp.array([1.0, 0.0, 1.0, 0.0])
    samples = samples._replace(extra={"replayed": jnp.stack([replayed] * 3)})
    step = ratios.steps_of(TOOLS.sampler, samples.rows)
    bound = float(step.kappa[1, 0]) + 1e-3
    assert (step.kappa[2] > bound).all()  # the last place
    objective = OPGRPO(**OPEN, kappa_max=bound, correction=1.2).settled("float32", stale=False)
    plain = GRPO(**OPEN, old_log_prob="update")
    change = (
        plain.prepare({"train": lambda *_: before}, samples, KEY, TOOLS)["log_prob"] - samples.rows.log_prob
    ).mean(-1)
    weight = jnp.where(replayed > 0, jnp.clip(jnp.exp(change[:2].mean(0)), 1 / 1.2, 1.2), 1)
    assert weight[0] != 1 and weight[2] != 1
    for place, share in enumerate((weight, weight, 1 - replayed)):
        ours, theirs = (loss_of(o, at(o, samples, before, place)) for o in (objective, plain))
        gradient, expected = (jax.grad(lambda u, f=f: f(u)[0].sum())(before[place]) for f in (ours, theirs))
        np.testing.assert_allclose(gradient, share[:, None, None] * expected, rtol=1e-4, atol=1e-8)
        metrics = ours(before[place])[1]
        assert metrics["ratio/max_deviation"].max() < 1e-6
        deviation = metrics["ratio/rollout_deviation"]  # of fresh samples alone, which another policy drew here
        assert (deviation[replayed > 0] == 0).all() and (deviation[replayed == 0] > 1e-3).all()
    np.testing.assert_allclose(theirs(before[2])[0], -ADVANTAGE[:, 0], rtol=1e-4)


def test_the_best_groups_take_the_places_of_the_worst_and_leave():
    select = Replay(capacity=3, groups=2)
    fresh, kept = np.array([0.3, 0.0, 0.2, 0.9], np.float32), np.array([0.25, 0.1, -np.inf], np.float32)
    chosen, left = select.exchange(fresh, kept)
    assert chosen.tolist() == [0, 4, 2, 3]  # the worst gives way to the best, the second to none that is better
    assert left.tolist() == [3, 0, 2]  # 5 is worth less, and 4 was replayed
    nothing = np.full(3, -np.inf, np.float32)
    assert select.exchange(fresh, nothing)[0].tolist() == [0, 1, 2, 3]
    assert select.exchange(-np.inf * np.ones(4, np.float32), kept)[0].tolist() == [4, 5, 2, 3]
    for field in ("capacity", "groups"):
        with pytest.raises(ValueError, match=rf"select\.{field}=0"):
            Replay(**{field: 0})


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"old_log_prob='update' with one_step_off_policy=True"):
        OPGRPO().settled("bfloat16", stale=True)
    with pytest.raises(ValueError, match=r"objective.kappa_max=0, correction=2.0"):
        OPGRPO(kappa_max=0)
    with pytest.raises(ValueError, match=r"objective.ratio='guard'.*choose 'plain'"):
        OPGRPO(ratio="guard")
