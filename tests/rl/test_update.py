from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixgrpo_jax.flow.plans.tree import Tree, TreeState
from mixgrpo_jax.flow.plans.window import Window, WindowState
from mixgrpo_jax.rl import select
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.select import All, Band, Extremes
from mixgrpo_jax.rl.update import (
    Average,
    apply_updates,
    assign,
    assign_groups,
    count_evaluations,
    init_state,
    make_update,
    stochastic_round,
)
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.conftest import toy_velocity
from tests.python import run_program
from tests.rl.toys import (
    RECORD,
    TOOLS,
    Balance,
    Case,
    Sequence,
    case,
    direct_gradient,
    direct_loss,
    learn,
    moved,
    roles,
)

OBJECTIVE = GRPO(clip_low=0.2, clip_high=0.2)


@pytest.fixture(scope="module")
def setting(toy):
    """Two groups of four, and a window of three steps of which the outer two are trained."""
    made = case(toy, Window(num_steps=8, length=3, group=4), WindowState(1, 0, 0))
    train = np.array([[0, 0], [2, 2]], np.int32)
    plan = made.plan._replace(
        **{name: getattr(made.plan, name)[[0, 2]] for name in ("step", "sigma", "weight", "chunk")}, train=train
    )
    return made._replace(plan=plan)


@pytest.fixture(scope="module")
def weighted(setting):
    """The same with weights of samples and of places that are not all one."""
    weight = jnp.array([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 1.0])
    places = np.array([[1.5, 0.4], [0.5, 1.6]], np.float32)
    return setting._replace(batch=setting.batch._replace(weight=weight), plan=setting.plan._replace(weight=places))


@pytest.fixture(scope="module")
def tree(toy):
    """Two trees of 2 x 3 leaves, two stochastic steps after each branch."""
    planner = Tree(num_steps=8, splits=(1, 4), factors=(2, 3), length=2, group=6)
    return case(toy, planner, TreeState(0))


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def counting(calls):
    """Roles that note the rows of each call that is executed."""

    def velocity(params, x, sigma, cond):
        jax.debug.callback(lambda sigma: calls.append(len(sigma)), sigma)
        return toy_velocity(params, x, sigma, cond)

    return partial(roles, velocity=velocity)


@pytest.mark.parametrize(
    "objective, micro_batch, dtype",
    [
        *[(OBJECTIVE, micro_batch, jnp.float32) for micro_batch in (1, 2, 8)],
        *[(Sequence(), micro_batch, jnp.float32) for micro_batch in (1, 4, 8)],
        *[(Balance(), micro_batch, jnp.float32) for micro_batch in (1, 2, 8)],
        *[(objective, 2, jnp.bfloat16) for objective in (OBJECTIVE, Sequence(), Balance())],
    ],
)
def test_accumulated_gradients_equal_the_direct_one(weighted, objective, micro_batch, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), moved(weighted.params, 0.02))
    base, calls = moved(weighted.params, 0.1), []
    state, metrics = learn(objective, weighted, params, base=base, make=counting(calls), micro_batch=micro_batch)
    jax.block_until_ready(state)
    jax.effects_barrier()
    exact = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected = direct_gradient(objective, exact, weighted, base=base)
    # The gradient of one row is rounded to bf16 in the span "step"; beyond it, nothing is. Sums are fp32 in both.
    rounded = dtype == jnp.bfloat16 and objective.span == "step"
    for name in params:
        size = jnp.abs(expected[name]).max()
        assert state.opt_state[name].dtype == jnp.float32 and size > 1e-3
        np.testing.assert_allclose(state.opt_state[name], expected[name], atol=(1e-2 if rounded else 1e-5) * size)
    np.testing.assert_allclose(
        metrics["loss/total"][0],
        direct_loss(objective, exact, weighted, weighted.ids, base=base),
        rtol=1e-4,
        atol=1e-6,
    )
    # What it costs, three times: by the program, before there is one, and as it was executed.
    each = count_evaluations(objective, ("base",), TOOLS, (3, 4), 2)
    assert each == {"step": (2, 2), "window": (6, 2), "group": (4, 2)}[objective.span]
    assert int(metrics["nfe/update"]) == 8 * each[0] == sum(calls)
    assert int(metrics["nfe/gradient"]) == 8 * each[1]
    assert set(calls) == {micro_batch}  # memory is that of one micro-batch at one place


@pytest.mark.parametrize("micro_batch", [2, 6])
@pytest.mark.parametrize("objective", [OBJECTIVE, Sequence()])
def test_a_trees_gradient_equals_the_direct_one(tree, objective, micro_batch):
    params = moved(tree.params, 0.02)
    state, metrics = learn(objective, tree, params, base=params, micro_batch=micro_batch)
    expected = direct_gradient(objective, params, tree, base=params)
    for name in params:
        np.testing.assert_allclose(state.opt_state[name], expected[name], rtol=1e-4, atol=1e-5)
    assert metrics["ratio/max_deviation"].max() > 1e-4  # it was not at the parameters that drew the samples


def test_a_tree_is_on_policy(tree):
    _, metrics = learn(OBJECTIVE, tree)
    assert metrics["ratio/max_deviation"].shape == (1, 4) and metrics["ratio/max_deviation"].max() < 1e-5


def test_updates_follow_each_other(setting):
    state, metrics = learn(OBJECTIVE, setting, optimiser=optax.sgd(0.1), num_updates=2)
    params = setting.params
    for samples in (jnp.array([0, 4, 1, 5]), jnp.array([2, 6, 3, 7])):
        gradient = direct_gradient(OBJECTIVE, params, setting, samples)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert_trees_close(state.params, params, rtol=1e-4, atol=1e-6)
    assert state.step == 2
    assert metrics["ratio/max_deviation"].shape == (2, 2)  # by update and trained step
    assert metrics["ratio/max_deviation"][0].max() < 1e-5  # the first is on policy,
    assert metrics["ratio/max_deviation"][1].max() > 2e-5  # the second is not
    assert metrics["grad_norm"].shape == metrics["loss/policy"].shape == (2,)


def test_updates_of_groups_follow_each_other(weighted):
    objective, params = Balance(), moved(weighted.params, 0.02)
    state, metrics = learn(objective, weighted, params, optimiser=optax.sgd(0.1), num_updates=2)
    losses = []
    for group in (weighted.ids[:4], weighted.ids[4:]):
        losses.append(direct_loss(objective, params, weighted, group))
        gradient = direct_gradient(objective, params, weighted, group)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert_trees_close(state.params, params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss/total"], losses, rtol=1e-4)


def test_a_sample_without_weight_changes_nothing(setting):
    batch, out, rest = setting.batch, 5, jnp.array([0, 1, 2, 3, 4, 6, 7])
    (rows,) = batch.rows
    spoilt = batch._replace(
        weight=batch.weight.at[out].set(0),
        advantage=batch.advantage.at[0, out].set(jnp.nan),
        rows=(rows._replace(log_prob=rows.log_prob.at[:, out].add(-50)),),  # a ratio of e^50
    )
    params = moved(setting.params, 0.02)
    state, metrics = learn(OBJECTIVE, setting._replace(batch=spoilt), params)
    expected = direct_gradient(OBJECTIVE, params, setting, rest)
    assert_trees_close(state.opt_state, expected, rtol=1e-4, atol=1e-6)
    assert all(jnp.isfinite(value).all() for value in metrics.values())
    assert metrics["ratio/max_deviation"].max() < 0.1 and jnp.abs(metrics["ratio/mean"] - 1).max() < 0.1
    np.testing.assert_allclose(
        metrics["loss/total"][0], direct_loss(OBJECTIVE, params, setting, rest), rtol=1e-4, atol=1e-6
    )


def test_nothing_with_a_weight_teaches_nothing(setting):
    nothing = setting.batch._replace(weight=jnp.zeros(8), advantage=jnp.full((1, 8, 1), jnp.nan))
    state, metrics = learn(OBJECTIVE, setting._replace(batch=nothing), optimiser=optax.sgd(0.1))
    assert_trees_close(state.params, setting.params, rtol=0)
    assert all(jnp.isfinite(value).all() for value in metrics.values())


def test_a_places_weight_scales_its_loss(setting):
    params = moved(setting.params, 0.02)

    def gradient(first, second):
        weight = np.array([[first] * 2, [second] * 2], np.float32)
        return learn(OBJECTIVE, setting._replace(plan=setting.plan._replace(weight=weight)), params)[0].opt_state

    one, other, mixed = gradient(2.0, 0.0), gradient(0.0, 2.0), gradient(1.2, 0.8)
    assert_trees_close(mixed, jax.tree.map(lambda a, b: 0.6 * a + 0.4 * b, one, other), rtol=1e-4, atol=1e-6)
    plan = setting.plan._replace(**{name: getattr(setting.plan, name)[:1] for name in setting.plan._fields[1:]})
    assert_trees_close(one, direct_gradient(OBJECTIVE, params, setting._replace(plan=plan)), rtol=1e-4, atol=1e-6)


def test_average_of_the_parameters(setting):
    averages = {"ema": Average(0.75), "old": Average(0.5, by="iteration")}
    state, _ = learn(OBJECTIVE, setting, optimiser=optax.sgd(0.1), micro_batch=4, averages=averages)
    for name, start in setting.params.items():
        np.testing.assert_allclose(state.averages["ema"][name], 0.75 * start + 0.25 * state.params[name], rtol=1e-5)
        np.testing.assert_allclose(state.averages["old"][name], 0.5 * start + 0.5 * state.params[name], rtol=1e-5)


SCHEDULES = [
    (Average(0.9), lambda c: 0.9),
    (Average(0.5, rate=0.001), lambda c: min(0.001 * c, 0.5)),
    (Average(0.999, rate=0.0075, start=75), lambda c: 0.0 if c < 75 else min(0.0075 * (c - 75), 0.999)),
]


@pytest.mark.parametrize("rule, expected", SCHEDULES)
def test_decay_by_the_count_of_moves(rule, expected):
    for count in [*range(0, 300, 7), 75, 76, 499, 501, 5000]:
        np.testing.assert_allclose(rule.at(jnp.int32(count)), expected(count), rtol=1e-6, atol=1e-9)


def test_averages_move_by_update_or_by_iteration(setting):
    rules = {
        "constant": (Average(0.8), lambda c: 0.8),
        "rising": (Average(0.5, rate=0.2), lambda c: min(0.2 * c, 0.5)),
        "late": (Average(0.9, rate=0.4, start=1, by="iteration"), lambda c: min(0.4 * max(c - 1, 0), 0.9)),
        "last": (Average(0.0, by="iteration"), lambda c: 0.0),
    }
    averages, optimiser = {name: rule for name, (rule, _) in rules.items()}, optax.sgd(0.1)
    update = make_update(OBJECTIVE, roles, optimiser, TOOLS, num_updates=2, micro_batch=2, averages=averages)
    single = make_update(OBJECTIVE, roles, optimiser, TOOLS, num_updates=1, micro_batch=2)
    update, single = jax.jit(update), jax.jit(single)
    state = init_state(setting.params, optimiser, averages)
    own, counts = dict(state.averages), dict.fromkeys(rules, 0)
    params = init_state(setting.params, optimiser)
    halves = [alone(setting, np.array(index)) for index in ([0, 1, 4, 5], [2, 3, 6, 7])]
    for _ in range(4):
        state, _ = update(state, None, setting.batch, setting.plan)
        for number, half in enumerate(halves):
            params, _ = single(params, None, half.batch, half.plan)
            for name, (rule, decay) in rules.items():
                if rule.by == "update" or number == 1:
                    d = decay(counts[name])
                    own[name] = jax.tree.map(lambda a, p: d * a + (1 - d) * p, own[name], params.params)  # noqa: B023
                    counts[name] += 1
        assert_trees_close(state.averages, own, rtol=1e-4, atol=1e-6)
    assert counts == {"constant": 8, "rising": 8, "late": 4, "last": 4}
    assert_trees_close(state.averages["last"], state.params, rtol=1e-6)


def test_no_average_is_kept_where_none_is_asked_for(setting):
    state, _ = learn(OBJECTIVE, setting, optimiser=optax.sgd(0.1), num_updates=2)
    assert state.averages == {}
    averaged, _ = learn(OBJECTIVE, setting, optimiser=optax.sgd(0.1), num_updates=2, averages={"ema": Average()})
    jax.tree.map(np.testing.assert_array_equal, state.params, averaged.params)


@pytest.mark.parametrize(
    ("field", "value"), [("decay", 1.0), ("decay", -0.1), ("rate", -1.0), ("start", -1), ("by", "epoch")]
)
def test_bad_rules_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        Average(**{field: value})


def alone(setting, index, prompts=2):
    """A case of the samples of an index alone, as many of each prompt: by plain indexing."""
    batch, count = setting.batch, len(setting.batch.weight)
    rows = tuple(jax.tree.map(lambda a: jnp.repeat(a, count // a.shape[1], axis=1)[:, index], r) for r in batch.rows)
    own = batch._replace(x0=batch.x0[index], rows=rows, advantage=batch.advantage[:, index], weight=batch.weight[index])
    return Case(setting.params, setting.plan, own, jnp.arange(len(index)))


def choosing(setting, index, group, params):
    """The gradient of an update that takes the samples at the positions [P', G'], as one program."""
    update = make_update(OBJECTIVE, roles, RECORD, TOOLS, num_updates=1, micro_batch=2)

    @jax.jit
    def program(state, batch, plan, chosen):
        if chosen is not None:
            batch, plan = select.take(batch, plan, chosen, group)
        return update(state, None, batch, plan)

    return program(init_state(params, RECORD), setting.batch, setting.plan, index)


def test_extremes_by_hand():
    advantage = np.array([[0.3, -1.0, 2.0, 0.1, -0.5, 0.3], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    index, weight = Extremes(2)(advantage)
    # The worst two and the best two, of equals the first to be worst and the last to be best, in their own order.
    assert index.tolist() == [[1, 2, 4, 5], [6, 7, 10, 11]] and index.dtype == np.int32
    assert (weight == 1).all() and weight.shape == index.shape and Extremes(2).kept(6) == 4
    everything, weight = All()(advantage)
    np.testing.assert_array_equal(everything, np.arange(12).reshape(2, 6))
    assert (weight == 1).all() and All().kept(6) == 6
    np.testing.assert_array_equal(Extremes(3)(advantage)[0], everything)


def test_extremes_take_what_has_a_score_first():
    nan = np.nan
    advantage = np.array([[0.3, nan, 2.0, 0.1, -0.5, 0.3], [nan, 1.0, nan, 2.0, nan, nan], [nan] * 6])
    index, _ = Extremes(2)(advantage)
    assert (
        index[0].tolist() == [2, 3, 4, 5] and {7, 9} < set(index[1]) and len(set(index[1])) == len(set(index[2])) == 4
    )
    assert Extremes(1)(advantage)[0][:2].tolist() == [[2, 4], [7, 9]]


def test_extremes_of_everything_are_everything(weighted):
    params = moved(weighted.params, 0.02)
    index, _ = Extremes(2)(np.asarray(weighted.batch.advantage).reshape(2, 4))
    some, every = (choosing(weighted, chosen, 4, params) for chosen in (index, None))
    jax.tree.map(np.testing.assert_array_equal, some, every)


def test_an_update_of_chosen_samples_is_one_of_those_alone(setting):
    params = moved(setting.params, 0.02)
    index, _ = Extremes(1)(np.asarray(setting.batch.advantage).reshape(2, 4))
    state, metrics = choosing(setting, index, 4, params)
    own = alone(setting, index.reshape(-1))
    expected, same = learn(OBJECTIVE, own, params)
    jax.tree.map(np.testing.assert_array_equal, (state, metrics), (expected, same))
    assert int(metrics["nfe/update"]) == 4 * 2


def test_rows_of_a_tree_are_chosen_with_their_samples(tree):
    params = moved(tree.params, 0.02)
    index, _ = Extremes(2)(np.asarray(tree.batch.advantage).reshape(2, 6))
    batch, plan = select.take(tree.batch, tree.plan, index, 6)
    own = alone(tree, index.reshape(-1))
    jax.tree.map(np.testing.assert_array_equal, batch, own.batch)
    state, _ = choosing(tree, index, 6, params)
    assert_trees_close(state.opt_state, direct_gradient(OBJECTIVE, params, own), rtol=1e-4, atol=1e-5)
    # A whole prompt may be left out, and with it its column of the plan.
    batch, plan = select.take(tree.batch, tree.plan, index[1:], 6)
    assert plan.train.shape == (4, 1) and len(batch.cond) == 1
    np.testing.assert_array_equal(batch.cond[0], tree.batch.cond[1])


@pytest.mark.parametrize("count, message", [(0, "select.count=0: "), (4, "select.count=4: .*batch.group=6")])
def test_bad_counts_are_named(count, message):
    with pytest.raises(ValueError, match=message):
        Extremes(count).kept(6)


@pytest.mark.parametrize("value", [1.0, -1.00390625 + 2**-12, 3e-5, 1e30])
def test_stochastic_rounding_is_right_on_average(value):
    x = jnp.full(200_000, value)
    rounded = stochastic_round(x, jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16 and len(np.unique(np.asarray(rounded, np.float32))) <= 2
    np.testing.assert_allclose(np.asarray(rounded, np.float64).mean(), np.float32(value), rtol=3e-5)
    special = jnp.array([0.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(np.asarray(stochastic_round(special, jax.random.key(1)), np.float32), special)


def test_small_updates_of_bf16_parameters_add_up():
    params, step = {"w": jnp.ones(1000, jnp.bfloat16)}, {"w": jnp.full(1000, 1e-4)}  # a fortieth of a unit
    for index in range(100):
        params = apply_updates(params, step, jax.random.key(index))
    assert params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(params["w"], np.float32).mean(), 1.01, rtol=1e-3)


def test_the_state_of_bf16_parameters_is_fp32(setting):
    params, optimiser = jax.tree.map(lambda p: p.astype(jnp.bfloat16), setting.params), optax.adamw(1e-3)
    averages = {"ema": Average(0.5), "old": Average(0.5, by="iteration")}
    before = init_state(params, optimiser, averages)
    after, _ = learn(OBJECTIVE, setting, params, optimiser=optimiser, num_updates=2, averages=averages)
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, before)
    assert {a.dtype for a in jax.tree.leaves((after.opt_state[0].nu, after.averages))} == {jnp.dtype(jnp.float32)}
    assert {a.dtype for a in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("prompts", "group", "updates", "micro_batch"),
    [(16, 12, 4, 24), (8, 4, 2, 16), (4, 6, 3, 2), (3, 8, 2, 4), (6, 2, 1, 3)],
)
def test_every_update_takes_its_share_of_every_group_and_of_every_device(prompts, group, updates, micro_batch):
    samples = assign(prompts * group, group, updates, micro_batch)
    assert sorted(samples.ravel()) == list(range(prompts * group))
    for update in samples:
        assert set(np.bincount(update.ravel() // group)) == {group // updates}
    for ways in (n for n in range(1, micro_batch + 1) if micro_batch % n == 0):
        device = samples * ways // (prompts * group)
        np.testing.assert_array_equal(
            device, np.broadcast_to(np.repeat(np.arange(ways), micro_batch // ways), samples.shape)
        )


@pytest.mark.parametrize(
    ("prompts", "group", "updates", "micro_batch"), [(16, 12, 4, 24), (8, 4, 2, 16), (4, 6, 2, 3), (6, 2, 1, 3)]
)
def test_an_update_of_groups_takes_whole_ones(prompts, group, updates, micro_batch):
    samples = assign_groups(prompts * group, group, updates, micro_batch)
    assert samples.shape == (updates, prompts * group // updates // micro_batch, micro_batch)
    for number, update in enumerate(samples):
        members = np.bincount(update.ravel() // group, minlength=prompts)
        assert members.tolist() == [group if p % updates == number else 0 for p in range(prompts)]


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"batch\.updates=2 does not divide batch\.prompts=3"):
        assign_groups(12, 4, num_updates=2, micro_batch=2)


ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from mixgrpo_jax.flow.plans.tree import Tree
from mixgrpo_jax.flow.plans.window import Window
from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.flow import plans
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.update import Batch, init_state, make_update
from mixgrpo_jax.runtime import hlo, mesh as meshes
from tests.rl.toys import TOOLS, Sequence, roles

mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
window = lambda group: Window(num_steps=8, length=3, train_fraction=0.7, group=group)
tree = Tree(num_steps=8, splits=(1, 4), factors=(3, 4), group=12)
for objective, planner, prompts, micro_batch in (
    (GRPO(), window(12), 16, 24),
    (GRPO(), window(6), 8, 24),
    (GRPO(), window(2), 32, 8),
    (GRPO(old_log_prob="update"), window(6), 8, 24),
    (Sequence(), window(6), 8, 24),
    (GRPO(), tree, 8, 24),
):
    place = lambda size, axis: meshes.batch_sharding(mesh, size, axis)
    array = lambda size, axis, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(size, axis))
    count, whole, layout = prompts * planner.group, NamedSharding(mesh, P()), planner.layout
    rows = []
    for segment, nodes in zip(layout, plans.nodes(layout, prompts, count)):
        if segment.record:
            maps = ((64, 4), (64, 4), (64,), (), (), ())
            rows.append(Rows(*(array(nodes, 1, segment.steps, nodes, *shape) for shape in maps)))
    update = make_update(objective, roles, optax.sgd(0.1), TOOLS, num_updates=2, micro_batch=micro_batch)
    params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
    state = jax.eval_shape(lambda: init_state(params, optax.sgd(0.1)))
    state, base = (meshes.placed(s, jax.tree.map(lambda _: whole, s)) for s in (state, jax.eval_shape(lambda: params)))
    batch = Batch(None, tuple(rows), np.ones((1, count, 1), np.float32), np.ones(count, np.float32),
                  array(prompts, 0, prompts, 4), {})
    arguments = state, base, batch, planner.plan(planner.initial(), prompts)
    cost = hlo.cost(jax.jit(update, out_shardings=whole).lower(*arguments).compile().as_text())
    assert cost.collectives.keys() == {"all-reduce"}, (objective, cost.collectives)  # of gradients and metrics
    assert cost.moved < 1000 * planner.num_trained * count // micro_batch, cost.moved  # bytes; a map has 1024 a sample
    if (prompts, micro_batch) != (8, 24):
        continue
    # Where the mesh is set, parts along data add up gradients of their own, and the result is the same.
    rng = np.random.default_rng(0)
    draw = lambda a: jax.device_put(rng.normal(size=a.shape).astype(a.dtype), a.sharding)
    drawn = lambda a: draw(a) if hasattr(a, "sharding") else a
    batch = jax.tree.map(drawn, batch)._replace(advantage=rng.normal(size=(1, count, 1)).astype(np.float32))
    positive = lambda r: r._replace(sigma=0.6 + 0 * r.sigma, sigma_next=0.5 + 0 * r.sigma, eta=0.7 + 0 * r.eta)
    batch = batch._replace(rows=tuple(positive(r) for r in batch.rows))
    state = init_state(params, optax.sgd(0.1))
    plan, results = arguments[-1], []
    results.append(jax.jit(update)(state, params, batch, plan))
    with jax.set_mesh(mesh):
        results.append(jax.jit(update)(state, params, batch, plan))
    for a, b in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert abs(results[0][0].params["w"]).max() > 0
"""


def test_no_sample_moves_on_a_mesh():
    run_program(ON_EIGHT, **virtual_devices(8))


def test_a_band_of_prompts_teaches():
    mean = np.array([0.1, 0.9, 0.5, 0.4, 0.6, 0.45])
    reward = mean[:, None] + np.array([-0.1, 0.0, 0.1]) * np.array([1, 1, 1, 1, 0, 0.2])[:, None]
    index, weight = Band()(reward - mean[:, None], reward)
    np.testing.assert_array_equal(index, np.arange(18).reshape(6, 3))
    np.testing.assert_array_equal(weight, np.repeat([[0], [0], [1], [1], [1], [1]], 3, axis=1))
    alone = Band(0.0, 1.0, least_range=0.1)(reward, reward)[1]
    np.testing.assert_array_equal(alone[:, 0], [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(Band(0.0, 1.0)(reward, reward)[1], 1)
    absent = np.where(np.arange(3) == 1, np.nan, reward)  # statistics are of the samples that have a score
    np.testing.assert_array_equal(Band()(absent, absent)[1], weight)
    np.testing.assert_array_equal(Band()(reward)[1], 1)  # shapes alone
    assert Band()(np.full((2, 3), np.nan), np.full((2, 3), np.nan))[1].shape == (2, 3)


@pytest.mark.parametrize("fields", [{"hardest": 0.8}, {"easiest": 1.1}, {"least_range": -1.0}])
def test_bad_bands_are_named(fields):
    (field, value), *_ = fields.items()
    with pytest.raises(ValueError, match=rf"select\..*{field}={value}"):
        Band(**fields)
