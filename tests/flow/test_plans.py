import math
from dataclasses import replace

import numpy as np
import pytest

from mixgrpo_jax.flow.plans import PlanConfig, WindowState, advance, evaluations, initial_state, make_plan

STRATEGIES = ("progressive", "random", "decay", "exp_decay", "frozen", "all")


def states(config: PlanConfig, iterations: int) -> list[WindowState]:
    result = [initial_state(config)]
    while len(result) < iterations:
        result.append(advance(config, result[-1]))
    return result


def starts(config: PlanConfig, iterations: int) -> list[int]:
    return [state.start for state in states(config, iterations)]


def dwells(config: PlanConfig) -> list[int]:
    """Iterations at each start, until the last."""
    sequence = starts(config, 2000)
    return [sequence.count(start) for start in range(config.last_start)]


@pytest.mark.parametrize("tau, expected", [(25, 11), (20, 14)])
def test_published_window_of_iteration_300(tau, expected):
    config = PlanConfig(iterations_per_window=tau)
    assert starts(config, 300)[-1] == expected
    assert config.window_length == 4


def test_progressive_moves_by_the_stride_and_stops():
    config = PlanConfig(num_steps=10, length=2, iterations_per_window=2, stride=3)
    assert starts(config, 12) == [0, 0, 3, 3, 6, 6, 7, 7, 7, 7, 7, 7]


def test_progressive_rolls_back_from_the_last_position():
    config = PlanConfig(num_steps=6, length=2, iterations_per_window=1, stride=2, at_end="roll_back")
    assert starts(config, 7) == [0, 2, 3, 0, 2, 3, 0]


def test_decay_dwells_less_and_less():
    config = PlanConfig(strategy="decay", decay_max=10, decay_min=1)
    bound = config.trainable_steps
    assert dwells(config) == [int(10 * (1 - start / bound) + start / bound) for start in range(config.last_start)]


def test_exponential_decay_begins_at_the_threshold():
    config = PlanConfig(strategy="exp_decay")
    expected = [25] * 14 + [math.ceil(25 * math.exp(-0.1 * past)) for past in range(1, 7)]
    assert dwells(config) == expected


@pytest.mark.parametrize("strategy", ["frozen", "all"])
def test_still_windows(strategy):
    assert set(starts(PlanConfig(strategy=strategy), 100)) == {0}


def test_all_trains_every_step_up_to_the_bound():
    config = PlanConfig(strategy="all", num_steps=10, bound=10)
    plan = make_plan(config, initial_state(config))
    np.testing.assert_array_equal(plan.train, np.arange(10))
    assert plan.suffix_steps == 0 and not plan.suffix_sigmas.any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("at_end", ["stop", "roll_back"])
@pytest.mark.parametrize("bound", [None, 23, 25])
def test_window_is_never_empty_nor_past_the_bound(strategy, at_end, bound):
    config = PlanConfig(strategy=strategy, at_end=at_end, bound=bound, iterations_per_window=2, decay_max=2)
    for start in starts(config, 3000):
        assert 0 <= start <= config.trainable_steps - config.window_length


@pytest.mark.parametrize("strategy", ["progressive", "random", "decay", "exp_decay"])
def test_every_step_is_trained_when_the_bound_allows(strategy):
    config = PlanConfig(strategy=strategy, num_steps=12, bound=12, length=3, iterations_per_window=2, decay_max=2)
    trained = {start + offset for start in starts(config, 200) for offset in range(3)}
    assert trained == set(range(12))


@pytest.mark.parametrize("config", [PlanConfig(strategy="random", seed=3), PlanConfig(train_choice="random", length=8)])
def test_random_choices_depend_on_seed_and_iteration_alone(config):
    config = replace(config, train_fraction=0.5)

    def draw(config):
        return [(s.start, tuple(make_plan(config, s).train)) for s in states(config, 50)]

    assert draw(config) == draw(config)
    assert draw(config) != draw(replace(config, seed=99))
    # A restart continues the sequence from the saved state.
    saved = states(config, 20)[-1]
    assert advance(config, saved) == states(config, 21)[-1]


def test_random_windows_are_uniform():
    config = PlanConfig(strategy="random", num_steps=10, length=4)
    counts = np.bincount(starts(config, 3000), minlength=6)
    assert len(counts) == 6 and (abs(counts - 500) < 5 * np.sqrt(500)).all()


@pytest.mark.parametrize(
    "config, expected",
    [
        (PlanConfig(strategy="all", num_steps=10, bound=10, train_fraction=0.99), 9),
        (PlanConfig(strategy="all", num_steps=25, train_fraction=0.6, train_choice="random"), 14),
        (PlanConfig(train_fraction=0.1), 1),
        (PlanConfig(), 4),
    ],
)
def test_trained_fraction(config, expected):
    plan = make_plan(config, initial_state(config))
    assert config.num_trained == len(plan.train) == expected
    assert (np.diff(plan.train) > 0).all() and plan.train[0] >= 0 and plan.train[-1] < config.window_length
    if config.train_choice == "first":
        np.testing.assert_array_equal(plan.train, np.arange(expected))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_plans_have_one_shape_and_join_up(strategy, ratio):
    config = PlanConfig(strategy=strategy, iterations_per_window=1, suffix_ratio=ratio, bound=25, train_fraction=0.5)
    shapes = set()
    for state in states(config, 30):
        plan = make_plan(config, state)
        shapes.add(tuple((field.shape, field.dtype.name) for field in plan))
        assert plan.suffix_sigmas[0] == plan.sigmas[plan.start + config.window_length]
        assert not plan.suffix_sigmas[plan.suffix_steps :].any()
        assert plan.suffix_steps > 0 or plan.start + config.window_length == 25
    num_trained = config.num_trained
    floats, ints, scalar = ((26,), "float32"), ((25,), "int32"), ((), "int32")
    assert shapes == {(floats, scalar, floats, scalar, ints, ((num_trained,), "int32"))}


def test_a_saved_window_past_the_bound_is_clamped():
    plan = make_plan(PlanConfig(num_steps=10), WindowState(start=20, dwell=0, iteration=500))
    assert plan.start == 5


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
    config = PlanConfig(suffix_ratio=ratio, solver_order=order)
    plan = make_plan(config, initial_state(config))
    assert plan.suffix_order[: plan.suffix_steps].tolist() == expected


@pytest.mark.parametrize("shared_noise, prefix", [(True, 10 * 2), (False, 10 * 2 * 12)])
def test_evaluations_count_the_shared_prefix_once(shared_noise, prefix):
    config = PlanConfig(train_fraction=0.5)
    plan = make_plan(config, WindowState(start=10, dwell=0, iteration=250))
    cost = evaluations(plan, num_prompts=2, group_size=12, shared_noise=shared_noise)
    assert cost == {"rollout": prefix + (4 + 11) * 24, "update": 2 * 24}


@pytest.mark.parametrize("ratio, expected", [(0.4, 11), (0.2, 7)])
def test_evaluations_of_published_flash(ratio, expected):
    config = PlanConfig(suffix_ratio=ratio)
    cost = evaluations(make_plan(config, initial_state(config)), 1, 12, shared_noise=True)
    assert cost == {"rollout": 12 * expected, "update": 12 * 4}


def test_evaluations_without_a_suffix():
    config = PlanConfig(strategy="all", num_steps=10, bound=10)
    assert evaluations(make_plan(config, initial_state(config)), 3, 4, True) == {"rollout": 120, "update": 120}


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
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}: "):
        PlanConfig(**{field: value})


def test_length_is_not_read_by_all():
    assert PlanConfig(strategy="all", num_steps=3, length=4).window_length == 2
