import itertools
import math
import pkgutil
import re
from dataclasses import replace

import numpy as np
import pytest

from mixgrpo_jax.flow import plans, schedules
from mixgrpo_jax.flow.plans.ode import ODE
from mixgrpo_jax.flow.plans.per_prompt import PerPrompt
from mixgrpo_jax.flow.plans.tail import Tail
from mixgrpo_jax.flow.plans.tree import Tree
from mixgrpo_jax.flow.plans.window import Window, WindowState

STRATEGIES = ("progressive", "random", "decay", "exp_decay", "frozen", "all")
PREFIX, WINDOW, SUFFIX = 0, 1, 2


def states(planner, iterations: int) -> list:
    result = [planner.initial()]
    while len(result) < iterations:
        result.append(planner.advance(result[-1]))
    return result


def starts(planner: Window, iterations: int) -> list[int]:
    return [state.start for state in states(planner, iterations)]


def dwells(planner: Window) -> list[int]:
    """Iterations at each start, until the last."""
    sequence = starts(planner, 2000)
    return [sequence.count(start) for start in range(planner.last_start)]


def first_plan(planner, prompts=1):
    return planner.plan(planner.initial(), prompts)


def arrays(plan) -> list[np.ndarray]:
    return [*itertools.chain(*plan.segments), *plan[1:]]


def grid(plan, prompt: int) -> np.ndarray:
    """The sigmas that a prompt's trajectory visits; its steps must join up."""
    taken = [(s.sigma[: s.taken[prompt], prompt], s.sigma_next[: s.taken[prompt], prompt]) for s in plan.segments]
    sigma, sigma_next = (np.concatenate(each) for each in zip(*taken))
    np.testing.assert_array_equal(sigma[1:], sigma_next[:-1])
    return np.append(sigma, sigma_next[-1:])


@pytest.mark.parametrize("tau, expected", [(25, 11), (20, 14)])
def test_published_window_of_iteration_300(tau, expected):
    planner = Window(iterations_per_window=tau)
    assert starts(planner, 300)[-1] == expected
    assert planner.window_length == 4


def test_progressive_moves_by_the_stride_and_stops():
    planner = Window(num_steps=10, length=2, iterations_per_window=2, stride=3)
    assert starts(planner, 12) == [0, 0, 3, 3, 6, 6, 7, 7, 7, 7, 7, 7]


def test_progressive_rolls_back_from_the_last_position():
    planner = Window(num_steps=6, length=2, iterations_per_window=1, stride=2, at_end="roll_back")
    assert starts(planner, 7) == [0, 2, 3, 0, 2, 3, 0]


def test_decay_dwells_less_and_less():
    planner = Window(strategy="decay", decay_max=10, decay_min=1)
    bound = planner.trainable_steps
    assert dwells(planner) == [int(10 * (1 - start / bound) + start / bound) for start in range(planner.last_start)]


def test_exponential_decay_begins_at_the_threshold():
    planner = Window(strategy="exp_decay")
    expected = [25] * 14 + [math.ceil(25 * math.exp(-0.1 * past)) for past in range(1, 7)]
    assert dwells(planner) == expected


@pytest.mark.parametrize("strategy", ["frozen", "all"])
def test_still_windows(strategy):
    assert set(starts(Window(strategy=strategy), 100)) == {0}


def test_all_trains_every_step_up_to_the_bound():
    plan = first_plan(Window(strategy="all", num_steps=10, bound=10))
    np.testing.assert_array_equal(plan.train[:, 0], np.arange(10))
    assert not plan.segments[SUFFIX].taken.any() and not plan.segments[PREFIX].taken.any()
    assert plan.segments[WINDOW].sigma_next[-1] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("at_end", ["stop", "roll_back"])
@pytest.mark.parametrize("bound", [None, 23, 25])
def test_window_is_never_empty_nor_past_the_bound(strategy, at_end, bound):
    planner = Window(strategy=strategy, at_end=at_end, bound=bound, iterations_per_window=2, decay_max=2)
    for start in starts(planner, 3000):
        assert 0 <= start <= planner.trainable_steps - planner.window_length


@pytest.mark.parametrize("strategy", ["progressive", "random", "decay", "exp_decay"])
def test_every_step_is_trained_when_the_bound_allows(strategy):
    planner = Window(strategy=strategy, num_steps=12, bound=12, length=3, iterations_per_window=2, decay_max=2)
    trained = {start + offset for start in starts(planner, 200) for offset in range(3)}
    assert trained == set(range(12))


@pytest.mark.parametrize(
    "planner",
    [
        Window(strategy="random", seed=3),
        Window(train_choice="random", length=8),
        PerPrompt(seed=3),
        ODE(train_choice="random"),
        Tail(last=5, places=2),
    ],
)
def test_random_choices_depend_on_seed_and_iteration_alone(planner):
    planner = replace(planner, train_fraction=0.5) if hasattr(planner, "train_fraction") else planner

    def draw(planner):
        return [planner.plan(s, 2).step.tolist() for s in states(planner, 50)]

    assert draw(planner) == draw(planner)
    assert draw(planner) != draw(replace(planner, seed=99))
    # A restart continues the sequence from the saved state.
    saved = states(planner, 20)[-1]
    assert planner.advance(saved) == states(planner, 21)[-1]


@pytest.mark.parametrize("planner", [Window(strategy="random", num_steps=10), PerPrompt(num_steps=10)])
def test_random_windows_are_uniform(planner):
    counts = np.bincount([planner.starts(state, 1)[0] for state in states(planner, 3000)], minlength=6)
    assert len(counts) == 6 and (abs(counts - 500) < 5 * np.sqrt(500)).all()


def test_a_prompts_window_depends_on_its_place_and_not_on_how_many_there_are():
    planner = PerPrompt(num_steps=12, suffix_ratio=0.4, solver_order=2)
    for state in states(planner, 20):
        many = planner.starts(state, 8)
        assert planner.starts(state, 5) == many[:5]
        assert len(set(many)) > 1
        # Each column is the plan of a common window at that start.
        plan, common = planner.plan(state, 8), Window(num_steps=12, suffix_ratio=0.4, solver_order=2)
        for prompt, start in enumerate(many):
            alone = common.plan(WindowState(start, 0, state.iteration), 1)
            for whole, one in zip(arrays(plan), itertools.chain(*alone.segments, alone[1:])):
                np.testing.assert_array_equal(whole[..., prompt], one[..., 0])


@pytest.mark.parametrize(
    "planner, expected",
    [
        (Window(strategy="all", num_steps=10, bound=10, train_fraction=0.99), 9),
        (Window(strategy="all", num_steps=25, train_fraction=0.6, train_choice="random"), 14),
        (Window(train_fraction=0.1), 1),
        (Window(), 4),
        (PerPrompt(train_fraction=0.5), 2),
        (ODE(), 9),
        (ODE(num_steps=25, train_fraction=0.6, train_choice="random"), 15),
    ],
)
def test_trained_fraction(planner, expected):
    plan = first_plan(planner, 3)
    assert planner.num_trained == len(plan.train) == expected
    assert all(a.shape == (expected, 3) for a in plan[1:])
    assert (np.diff(plan.step, axis=0) > 0).all()
    if not isinstance(planner, ODE):
        assert (np.diff(plan.train, axis=0) > 0).all()
        assert plan.train.min() >= 0 and plan.train.max() < planner.window_length
        recorded = plan.segments[WINDOW]
        np.testing.assert_array_equal(plan.sigma, np.take_along_axis(recorded.sigma, plan.train, 0))
        np.testing.assert_array_equal(plan.step, np.take_along_axis(recorded.address, plan.train, 0))
    if planner.train_choice == "first":
        np.testing.assert_array_equal(plan.step - plan.step[0], np.arange(expected)[:, None].repeat(3, 1))
    assert (plan.weight == 1).all()
    np.testing.assert_array_equal(plan.chunk, np.arange(expected)[:, None].repeat(3, 1))


@pytest.mark.parametrize("strategy", [*STRATEGIES, "per_prompt"])
@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_plans_have_one_shape_and_join_up(strategy, ratio):
    shared = dict(suffix_ratio=ratio, bound=25, train_fraction=0.5, group=3)
    if strategy == "per_prompt":
        planner = PerPrompt(**shared)
    else:
        planner = Window(strategy=strategy, iterations_per_window=1, **shared)
    shapes = set()
    for state in states(planner, 30):
        plan = planner.plan(state, 2)
        shapes.add(tuple((field.shape, field.dtype.name) for field in arrays(plan)))
        for prompt, start in enumerate(planner.starts(state, 2)):
            sigmas = grid(plan, prompt)
            assert sigmas[0] == 1 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()
            end = start + planner.window_length
            np.testing.assert_array_equal(sigmas[: end + 1], schedules.shifted_sigmas(25, 3.0)[: end + 1])
            assert plan.segments[SUFFIX].taken[prompt] > 0 or end == 25
            np.testing.assert_array_equal(plan.segments[WINDOW].address[:, prompt], np.arange(start, end))
        for steps, segment in zip(plan.segments, planner.layout):
            blank = np.arange(segment.steps)[:, None] >= steps.taken
            assert (steps.sigma[blank] > steps.sigma_next[blank]).all() and (steps.sigma_next[blank] > 0).all()
            assert (steps.order[blank] == 1).all()  # no solver stumbles over steps that nobody takes
            assert (steps.eta == (1.0 if segment.sde else 0.0)).all()
    expected = []
    for segment in planner.layout:
        floats, ints = ((segment.steps, 2), "float32"), ((segment.steps, 2), "int32")
        expected += [floats, floats, floats, ints, ints, ((2,), "int32")]
    n = (planner.num_trained, 2)
    expected += [(n, "int32"), (n, "int32"), (n, "float32"), (n, "float32"), (n, "int32")]
    assert shapes == {tuple(expected)}


@pytest.mark.parametrize("planner", [Tree(), ODE(), Tail(last=3), Tree(splits=(0,), factors=(12,), length=25)])
def test_plans_of_fixed_layouts_are_the_schedule(planner):
    first, later = (planner.plan(state, 2) for state in (states(planner, 9)[0], states(planner, 9)[-1]))
    for plan in (first, later):
        np.testing.assert_array_equal(grid(plan, 1), schedules.shifted_sigmas(planner.num_steps, 3.0))
    for a, b in zip(itertools.chain(*first.segments), itertools.chain(*later.segments)):
        np.testing.assert_array_equal(a, b)


def test_a_tree_trains_every_stochastic_step():
    planner = Tree(num_steps=12, splits=(2, 6), factors=(2, 3), length=2, group=6)
    plan = first_plan(planner, 3)
    assert planner.num_trained == 4 and plans.leaves_below(planner.layout) == [6, 3, 3, 1, 1]
    np.testing.assert_array_equal(plan.step[:, 0], [2, 3, 6, 7])
    np.testing.assert_array_equal(plan.sigma[:, 2], schedules.shifted_sigmas(12, 3.0)[[2, 3, 6, 7]])
    assert [s.steps for s in planner.layout if s.sde] == [2, 2] and sum(s.steps for s in planner.layout) == 12


MOVING = dict(num_steps=10, splits=(1, 3, 5), late=(1, 5, 8), late_after=8, group=27)


@pytest.mark.parametrize("fields", [{}, dict(jitter=6.0), dict(late=(0, 3, 6), length=2, jitter=6.0)])
def test_a_trees_splits_move_as_data_and_cost_what_the_formula_says(fields):
    planner, shapes, seen = Tree(**(MOVING | fields)), set(), []
    for state in states(planner, 20):
        plan, starts = planner.plan(state, 2), planner.starts(state)
        shapes.add(tuple((field.shape, field.dtype.name) for field in arrays(plan)))
        np.testing.assert_array_equal(grid(plan, 1), schedules.shifted_sigmas(10, 3.0))
        steps = [start + step for start in starts for step in range(planner.length)]
        assert plan.step[:, 0].tolist() == steps and steps[-1] < 10 - (planner.jitter > 0)
        assert all(b - a >= planner.length for a, b in itertools.pairwise(starts))
        rows = np.searchsorted(starts, np.arange(10), side="right")  # 3^k a prompt after k splits
        assert plans.evaluations(planner.layout, plan, 2, 54) == 2 * (3**rows).sum()
        seen.append(starts)
    assert len(shapes) == 1 and planner.starts(states(planner, 20)[7]) == seen[7]
    if not planner.jitter:
        assert seen[0] == [1, 3, 5] and all(starts == [*planner.late] for starts in seen[8:])
    else:
        assert len({tuple(starts) for starts in seen}) > 5


def test_jitter_is_around_the_scheduled_places_and_vanishes_as_kappa_grows():
    means = []
    for kappa in (6.0, 1e6):
        planner = Tree(**(MOVING | dict(late=(), jitter=kappa)))
        means.append(np.mean([planner.starts(state) for state in states(planner, 400)], axis=0))
    np.testing.assert_allclose(means[0], [1, 3, 5], atol=0.8)  # in order, which parts them
    np.testing.assert_array_equal(means[1], [1, 3, 5])


def test_a_trees_noise_is_by_depth_and_depths_are_pruned_by_fraction():
    planner = Tree(num_steps=12, splits=(0, 3, 6), noise=(4.0, 2.0, 0.5), train_fraction=0.67, train_choice="random")
    assert planner.num_trained == 2 and planner.branches == (2, 2, 3)
    chosen = set()
    for state in states(planner, 20):
        plan = planner.plan(state, 2)
        assert [s.eta[0, 1] for s, part in zip(plan.segments, planner.layout) if part.sde] == [4.0, 2.0, 0.5]
        assert not any(s.eta.any() for s, part in zip(plan.segments, planner.layout) if not part.sde)
        np.testing.assert_array_equal(plan.step, 3 * plan.train)
        chosen.add(tuple(plan.train[:, 0]))
    assert chosen == {(0, 1), (0, 2), (1, 2)}


def test_an_ode_is_trained_at_the_schedules_noise_levels():
    planner = ODE(num_steps=10)
    plan = first_plan(planner, 2)
    np.testing.assert_array_equal(plan.sigma[:, 1], schedules.shifted_sigmas(10, 3.0)[:9])
    assert not plan.train.any() and not any(segment.sde for segment in planner.layout)
    assert np.concatenate([steps.order[:, 0] for steps in plan.segments]).tolist() == [1, *[2] * 8, 1]


def test_a_tail_records_and_trains_its_last_steps_or_some_of_them():
    sigmas = schedules.shifted_sigmas(8, 3.0)
    planner = Tail(num_steps=8, last=3)
    plan = first_plan(planner, 2)
    np.testing.assert_array_equal(plan.sigma[:, 1], sigmas[5:8])
    assert [s.steps for s in planner.layout] == [5, 3] and plans.evaluations(planner.layout, plan, 4, 4) == 4 * 8
    planner = Tail(num_steps=8, last=0, places=2)
    steps = np.stack([planner.plan(state, 4).step for state in states(planner, 40)])
    assert planner.layout[1].steps == 8 and (np.diff(steps, axis=1) > 0).all() and set(steps.flat) == set(range(8))
    assert (steps.std(2) > 0).any()  # another choice for every prompt, which does not depend on how many there are
    np.testing.assert_array_equal(steps[3][:, :2], planner.plan(states(planner, 4)[3], 2).step)


def test_a_jump_ends_a_trajectory_early_at_the_clean_sample():
    sigmas, planner = schedules.shifted_sigmas(8, 3.0), Tail(num_steps=8, last=3, jump=True, group=4)
    seen = set()
    for state in states(planner, 20):
        plan = planner.plan(state, 3)
        for prompt, step in enumerate(plan.step[0]):
            path = grid(plan, prompt)
            np.testing.assert_array_equal(path, [*sigmas[: step + 1], 0])
            assert plan.sigma[0, prompt] == sigmas[step] and plan.segments[0].taken[prompt] == step
        longest = plan.step.max() + 1
        assert plans.evaluations(planner.layout, plan, 12, 12) == 12 * longest
        seen |= set(plan.step[0])
    assert seen == {5, 6, 7} and planner.num_trained == 1


def test_stratified_noise_levels_are_one_of_each_part_and_another_for_every_prompt():
    planner = ODE(num_steps=10, train_fraction=0.3, train_choice="stratified", train_range=0.6)
    steps = np.stack([planner.plan(state, 8).step for state in states(planner, 20)])
    assert steps.shape == (20, 3, 8)
    assert all(set(np.unique(steps[:, part])) == {2 * part, 2 * part + 1} for part in range(3))
    assert (steps.std((0, 1)) > 0).all() and (steps.std(2) > 0).any(1).all()
    np.testing.assert_array_equal(steps[3], planner.plan(states(planner, 20)[3], 8).step)


def test_a_saved_window_past_the_bound_is_clamped():
    plan = Window(num_steps=10).plan(WindowState(start=20, dwell=0, iteration=500), 1)
    assert plan.segments[PREFIX].taken == 5 and plan.segments[WINDOW].address[0] == 5


@pytest.mark.parametrize(
    "order, ratio, expected",
    [
        (1, 0.4, [1, 1, 1, 1, 1, 1, 1]),
        (2, 0.4, [2, 2, 2, 2, 2, 2, 1]),
        (3, 0.4, [3, 3, 3, 3, 3, 2, 1]),
        (3, 0.6, [3] * 11 + [1]),
        (3, 0.1, [1]),
    ],
)
def test_solver_order_falls_at_the_end(order, ratio, expected):
    suffix = first_plan(Window(suffix_ratio=ratio, solver_order=order)).segments[SUFFIX]
    assert suffix.order[: suffix.taken[0], 0].tolist() == expected


@pytest.mark.parametrize("shared_noise, prefix", [(True, 10 * 2), (False, 10 * 2 * 12)])
def test_evaluations_count_the_shared_prefix_once(shared_noise, prefix):
    planner = Window(train_fraction=0.5, group=12)
    plan = planner.plan(WindowState(start=10, dwell=0, iteration=250), 2)
    rows = 2 if shared_noise else 24
    assert plans.evaluations(planner.layout, plan, rows, 24) == prefix + (4 + 11) * 24
    assert len(plan.train) == 2


@pytest.mark.parametrize("ratio, expected", [(0.4, 11), (0.2, 7)])
def test_evaluations_of_published_flash(ratio, expected):
    planner = Window(suffix_ratio=ratio, group=12)
    plan = first_plan(planner)
    assert plans.evaluations(planner.layout, plan, 1, 12) == 12 * expected
    assert len(plan.train) == 4


def test_evaluations_without_a_suffix():
    planner = Window(strategy="all", num_steps=10, bound=10, group=4)
    assert plans.evaluations(planner.layout, first_plan(planner, 3), 3, 12) == 120


def test_evaluations_per_prompt_are_those_of_the_latest_start_and_the_earliest_end():
    planner = PerPrompt(num_steps=12, length=2, group=3)
    plan = next(p for p in (planner.plan(s, 2) for s in states(planner, 9)) if np.ptp(p.segments[PREFIX].taken) > 2)
    prefix, suffix = (plan.segments[k].taken.max() for k in (PREFIX, SUFFIX))
    assert plans.executed(planner.layout, plan) == [prefix, 2, suffix]
    assert plans.evaluations(planner.layout, plan, 2, 6) == prefix * 2 + (2 + suffix) * 6


@pytest.mark.parametrize("band, most", [(None, 9 + 20 * 12), (5, 4 + 20 * 12), (1, 20 * 12)])
def test_bands_bound_what_single_steps_cost(band, most):
    planner = PerPrompt(num_steps=20, length=1, bound=10, band=band, group=12, seed=3)
    counts, costs = np.zeros(10), []
    for state in states(planner, 300):
        starts, plan = planner.starts(state, 8), planner.plan(state, 8)
        first = min(starts) // (band or 10) * (band or 10)
        assert first <= min(starts) and max(starts) < first + (band or 10)
        costs.append(plans.evaluations(planner.layout, plan, 8, 96) / 8)
        assert costs[-1] <= most - first * 11 and len(plan.train) == 1
        counts += np.bincount(starts, minlength=10)
    assert (np.abs(counts - 240) < 7 * np.sqrt(240 * (8 if band == 1 else 2))).all()
    assert np.mean(costs) == pytest.approx({None: 247, 5: 214, 1: 190}[band], rel=0.03)  # 240 is T for each sample


def test_chunks_begin_at_the_schedules_steps():
    planner = Window(num_steps=10, length=4, chunks=(0, 2, 5), iterations_per_window=1)
    chunks = [planner.plan(state, 2).chunk[:, 1].tolist() for state in states(planner, 4)]
    assert chunks == [[1, 1, 2, 2], [1, 2, 2, 2], [2, 2, 2, 3], [2, 2, 3, 3]]
    assert set(first_plan(Window(strategy="all", chunks=(0,))).chunk[:, 0]) == {1}
    assert PerPrompt(num_steps=10, length=4, chunks=(0, 2, 5)).plan(states(planner, 1)[0], 3).chunk.dtype == np.int32


def test_evaluations_of_a_tree_are_shared_until_it_branches():
    planner = Tree(num_steps=12, splits=(2, 6), factors=(2, 3), length=1, group=6)
    plan = first_plan(planner)
    assert plans.evaluations(planner.layout, plan, 1, 6) == 2 * 1 + 4 * 2 + 6 * 6 == 46
    assert plans.evaluations(planner.layout, plan, 6, 6) == 72


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_steps", 1),
        ("shift", 0.0),
        ("strategy", "backwards"),
        ("length", 0),
        ("length", 25),
        ("iterations_per_window", 0),
        ("stride", -1),
        ("at_end", "bounce"),
        ("bound", 26),
        ("bound", 0),
        ("decay_min", 0),
        ("decay_max", 0),
        ("decay_rate", -0.1),
        ("train_fraction", 0.0),
        ("train_fraction", 1.1),
        ("train_choice", "last"),
        ("suffix_ratio", 0.0),
        ("suffix_ratio", 2.0),
        ("solver_order", 4),
        ("seed", -1),
        ("chunks", (3, 2)),
        ("chunks", (25,)),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"plan\.{field}={re.escape(repr(value))}: "):
        Window(**{field: value})


@pytest.mark.parametrize(
    "planner, field, value",
    [
        (PerPrompt, "length", 25),
        (PerPrompt, "band", 0),
        (PerPrompt, "train_choice", "last"),
        (Tree, "num_steps", 1),
        (Tree, "shift", 0.0),
        (Tree, "length", 0),
        (Tree, "length", 5),
        (Tree, "solver_order", 0),
        (Tree, "splits", ()),
        (Tree, "splits", (5, 1)),
        (Tree, "splits", (1, 25)),
        (Tree, "splits", (-1, 5)),
        (Tree, "factors", (12,)),
        (Tree, "factors", (3, 5)),
        (Tree, "late", (3,)),
        (Tree, "late", (5, 5)),
        (Tree, "late_after", 0),
        (Tree, "jitter", -1.0),
        (Tree, "noise", (1.0,)),
        (Tree, "noise", (1.0, 0.0)),
        (Tree, "train_fraction", 0.0),
        (Tree, "train_choice", "last"),
        (ODE, "num_steps", 1),
        (ODE, "shift", -1.0),
        (ODE, "solver_order", 4),
        (ODE, "train_fraction", 0.0),
        (ODE, "train_choice", "last"),
        (ODE, "train_range", 0.0),
        (ODE, "train_range", 0.5),
        (Tail, "num_steps", 1),
        (Tail, "shift", 0.0),
        (Tail, "last", 11),
        (Tail, "last", -1),
        (Tail, "places", 2),
    ],
)
def test_bad_fields_of_other_planners_are_named(planner, field, value):
    # A tree whose steps do not fit between its splits blames the splits.
    named = "splits=(1, 5)" if (planner, field, value) == (Tree, "length", 5) else f"{field}={value!r}"
    with pytest.raises(ValueError) as error:
        planner(**{field: value})
    assert str(error.value).startswith(f"plan.{named}: ")


def test_length_is_not_read_by_all():
    assert Window(strategy="all", num_steps=3, length=4).window_length == 2


def test_every_planner_of_the_table_keeps_the_contract():
    for name in plans.PLANS.values():
        planner = pkgutil.resolve_name(name)()
        plan, layout = first_plan(planner, 2), planner.layout
        assert len(plan.segments) == len(layout) and planner.advance(planner.initial()).iteration == 1
        assert math.prod(segment.branch for segment in layout) == planner.group
        assert all(len(steps.sigma) == segment.steps for steps, segment in zip(plan.segments, layout))
        recorded = sum(segment.steps for segment in layout if segment.record)
        assert plan.train.max() < recorded and plan.train.shape == (planner.num_trained, 2)
        for steps, segment in zip(plan.segments, layout):
            assert not segment.record or (steps.taken == segment.steps).all()
        assert all(type(word) is int for word in planner.initial())
