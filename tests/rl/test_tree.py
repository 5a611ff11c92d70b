"""Learning on trees: credit by node, pruned leaves, and Dynamic-TreeRPO's objective."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.plans.tree import Tree
from mixgrpo_jax.flow.plans.window import Window, WindowState
from mixgrpo_jax.rewards.contract import Score
from mixgrpo_jax.rl.credit import Credit, Seen
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.objectives.tree_rpo import TreeRPO
from mixgrpo_jax.rl.select import Extremes, take
from mixgrpo_jax.rl.update import count_evaluations
from tests.conftest import toy_velocity
from tests.rl.test_ratios import at, drawn, told
from tests.rl.toys import KEY, SAMPLER, TOOLS, case, direct_gradient, learn, moved

TREE = Tree(num_steps=8, splits=(1, 4), factors=(2, 3), group=6)
REWARD = np.array([0.0, 1.0, 2.0, 6.0, 5.0, 1.0, 4.0, 4.0, 4.0, 0.0, 8.0, 7.0])  # of two prompts
WIDE = dict(clip_low=0.2, clip_high=0.2)


def by_node(planner, credit=Credit(spread="nodes"), **scores):  # noqa: B008
    """Advantages [n, B] of two prompts' samples."""
    weights = dict.fromkeys(scores, 1.0)
    advantage = credit.of_samples(scores, np.repeat([0, 1], planner.group), weights)
    seen = Seen({}, None, planner.plan(planner.initial(), 2), {}, planner.layout)
    found = credit.over_places(advantage, {name: Score(value) for name, value in scores.items()}, weights, seen)
    assert found.shape == (planner.num_trained, 2 * planner.group, 1) and found.dtype == np.float32
    return advantage, found[..., 0]


def test_a_nodes_advantage_is_that_of_its_leaves_mean_within_its_depth():
    leaf, found = by_node(TREE, r=REWARD)
    nodes = REWARD.reshape(2, 2, 3).mean(-1)  # 1 against 4, and 4 against 5
    expected = (nodes - nodes.mean(1, keepdims=True)) / nodes.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(found[0], np.repeat(expected, 3), rtol=1e-5)  # siblings share it, cousins do not
    np.testing.assert_array_equal(found[1], leaf)


@pytest.mark.parametrize("planner", [Window(num_steps=8, length=3, group=6), Tree(splits=(2,), length=3, group=6)])
def test_where_nodes_are_samples_it_is_grpos(planner):
    leaf, found = by_node(planner, r=REWARD, other=REWARD[::-1])
    np.testing.assert_array_equal(found, np.broadcast_to(leaf, found.shape))


def test_places_that_are_trained_say_the_depth_and_equal_nodes_teach_nothing():
    flat = np.array([1.0, 2.0, 3.0, 3.0, 1.0, 2.0] * 2)
    leaf, found = by_node(Tree(num_steps=8, splits=(1, 4), factors=(2, 3), group=6, length=2), r=flat)
    assert not found[:2].any() and (found[2:] == leaf).all()
    leaf, found = by_node(Tree(num_steps=8, splits=(1, 4), factors=(2, 3), group=6, train_fraction=0.5), r=flat)
    assert found.shape[0] == 1 and not found.any()


def test_leaves_without_a_score_are_in_no_nodes_mean():
    gone = REWARD.copy()
    gone[[0, 6, 7, 8]] = np.nan
    _, found = by_node(TREE, r=gone)
    _, expected = by_node(TREE, r=np.array([1.5, 1.0, 2.0, *REWARD[3:]]))
    np.testing.assert_allclose(found[0, :6], expected[0, :6])
    assert np.isnan(found[0, 6:9]).all() and (found[0, 9:] == 0).all()  # a node alone in its depth
    assert np.isnan(found[1, [0, 6, 7, 8]]).all() and np.isfinite(found[1, [1, 2, 3, 9]]).all()


@pytest.fixture(scope="module")
def tree(toy):
    _, found = by_node(TREE, r=REWARD)
    return case(toy, TREE, TREE.initial(), advantage=jnp.asarray(found)[..., None])


def test_every_node_of_a_depth_counts_the_same(tree):
    """The gradient is that of the mean over depths of the mean over nodes of -A log p, each node once."""
    state, _ = learn(GRPO(**WIDE), tree)

    def loss(params):
        total = 0.0
        for rows, advantage in zip(tree.batch.rows, tree.batch.advantage):
            count = rows.x.shape[1]
            bound, cond = partial(toy_velocity, params), jnp.repeat(tree.batch.cond, count // 2, 0)
            row = jax.tree.map(lambda a: a[0], rows)
            transition, _ = SAMPLER.transition(bound, row.x, row.sigma, row.sigma_next, cond, row.eta)
            own = advantage[:: len(advantage) // count, 0]
            total -= (own * SAMPLER.log_prob_map(transition, row.x_next).mean(-1)).mean() / 2
        return total

    expected = jax.jit(jax.grad(loss))(tree.params)
    for name in expected:
        np.testing.assert_allclose(state.opt_state[name], expected[name], rtol=1e-4, atol=1e-6)


def test_pruned_leaves_are_not_trained_and_not_counted(tree):
    index, weight = Extremes(count=1)(REWARD.reshape(2, 6))
    np.testing.assert_array_equal(index, [[0, 3], [9, 10]])
    kept, plan = take(tree.batch, tree.plan, jnp.asarray(index), TREE.group)
    assert (weight == 1).all() and kept.advantage.shape == (2, 4, 1)
    np.testing.assert_array_equal(kept.advantage, tree.batch.advantage[:, index.reshape(-1)])  # of all leaves
    params = moved(tree.params, 0.02)
    state, metrics = learn(GRPO(**WIDE), tree._replace(batch=kept, plan=plan, ids=jnp.arange(4)), params)
    expected = direct_gradient(GRPO(**WIDE), params, tree, jnp.asarray(index.reshape(-1)))
    for name in params:
        np.testing.assert_allclose(state.opt_state[name], expected[name], rtol=1e-4, atol=1e-6)
    assert int(metrics["nfe/update"]) == 4 * 2


def test_a_tree_that_branches_once_is_mixgrpo_bit_for_bit(toy):
    window, once = Window(num_steps=6, length=2, group=4), Tree(num_steps=6, splits=(1,), length=2, group=4)
    advantage = jax.random.normal(KEY, (1, 8, 1))
    cases = [case(toy, p, s, advantage=advantage) for p, s in ((window, WindowState(1, 0, 0)), (once, once.initial()))]
    learned = [learn(GRPO(**WIDE), made, moved(made.params, 0.02)) for made in cases]
    jax.tree.map(np.testing.assert_array_equal, *((made.batch, *made.plan[1:]) for made in cases))
    jax.tree.map(np.testing.assert_array_equal, *learned)


def test_without_bounds_by_reward_and_best_path_it_is_grpo():
    samples, v, _ = drawn()
    away = v + 0.1 * jax.random.normal(jax.random.key(1), v.shape)
    losses = [
        each(told(away[1]), at(each, samples, v), KEY, TOOLS)[0]
        for each in (GRPO(**WIDE), TreeRPO(**WIDE, sensitivity=0.0, best_path=0.0))
    ]
    np.testing.assert_array_equal(*losses)
    costs = [count_evaluations(TreeRPO(best_path=w), (), TOOLS, (3, 4), 3) for w in (0.0, 0.1)]
    assert costs == [(3, 3), (6, 3)]


def test_the_clip_range_grows_with_the_advantage():
    a = jnp.array([[-20.0], [0.0], [20.0]])
    for of, bound in zip((0.1, 0.2), TreeRPO(clip_low=0.1, clip_high=0.2, sensitivity=0.5).bounds(a)):
        np.testing.assert_allclose(bound[:, 0], of * np.array([1, 1.25, 1.5]), rtol=1e-6)
    samples, v, _ = drawn()
    rows = samples.rows._replace(log_prob=samples.rows.log_prob - 0.3)
    objective = TreeRPO(clip_low=0.2, clip_high=0.2, sensitivity=1.0, best_path=0.0)  # up to 1.4 > e^0.3 = 1.35
    _, metrics = objective(told(v[1]), at(objective, samples._replace(rows=rows), v), KEY, TOOLS)
    np.testing.assert_array_equal(metrics["ratio/clip_fraction"], [0, 1, 0, 1])  # A is 1.5, -0.5, 0.7, -2


def test_the_best_paths_velocities_are_targets_at_every_place():
    samples, v, _ = drawn()
    objective = TreeRPO(**WIDE, best_path=0.1)
    for place in range(3):
        given = at(objective, samples, v, place)
        loss, metrics = objective(told(v[place]), given, KEY, TOOLS)
        expected = jnp.square(v[place] - v[place][jnp.array([0, 0, 2, 2])]).mean((1, 2))
        np.testing.assert_allclose(metrics["mse/best"], expected, rtol=1e-5)
        np.testing.assert_allclose(loss, metrics["loss/policy"] + 0.1 * expected, rtol=1e-5, atol=1e-6)
    # A sample without weight is nobody's best.
    lighter = samples._replace(weight=jnp.array([0.0, 1.0, 1.0, 1.0]))
    _, metrics = objective(told(v[1]), at(objective, lighter, v), KEY, TOOLS)
    np.testing.assert_allclose(metrics["mse/best"][1], 0, atol=1e-6)
    assert metrics["mse/best"][3] > 0.1


def test_what_cannot_be_is_refused():
    for field in ("sensitivity", "best_path"):
        with pytest.raises(ValueError, match=rf"objective.{field}=-1.0"):
            TreeRPO(**{field: -1.0})
    with pytest.raises(ValueError, match=r"objective.best_path=0.01 with one_step_off_policy=True"):
        TreeRPO().settled("float32", True)
    with pytest.raises(ValueError, match=r"objective.best_path=0.01 with old_log_prob='rollout'"):
        TreeRPO(old_log_prob="rollout").settled("float32", False)
    assert TreeRPO(best_path=0.0).settled("float32", True).old_log_prob == "rollout"
