"""What a plan is: a trajectory as a list of segments, whose number and sizes are static, and whose content is data.

A planner is a state machine on the host. Whatever it does, iteration by iteration, the arrays keep their shapes, so
that one compiled program draws the samples of all its plans.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Data = Any  # an np.ndarray on the host, a jax.Array in a program


class Segment(NamedTuple):
    """A part of every trajectory of a layout. Static.

    steps: the most it can have.
    branch: samples that each row becomes before it.
    sde: whether its steps are stochastic.
    record: whether its steps are kept as rows, to train on or to check against. A recorded segment always has all its
        steps; a prompt that needs fewer gives the others eta 0 or weight 0.
    """

    steps: int
    branch: int = 1
    sde: bool = False
    record: bool = False


Layout = tuple[Segment, ...]


class Steps(NamedTuple):
    """A segment's steps for P prompts, of which each takes the first `taken`.

    sigma, sigma_next: where each begins and ends, [N, P] float32.
    eta: its noise, in units of the sampler's eta, [N, P] float32.
    order: of the solver, 1..3, [N, P] int32.
    address: of its noise, [N, P] int32: the step's place in the schedule.
    taken: [P] int32.
    """

    sigma: Data
    sigma_next: Data
    eta: Data
    order: Data
    address: Data
    taken: Data


class Plan(NamedTuple):
    """An iteration's trajectories for P prompts, and the n places where each sample is trained.

    Objectives that learn from recorded steps look at the rows `train`, those that noise the clean sample again, at
    `sigma`.

    segments: one `Steps` for each segment of the layout.
    train: rows, counted through all recorded segments, [n, P] int32.
    step, sigma: the place in the schedule and the noise level of each, [n, P] int32 and float32.
    weight: of each in the loss, [n, P] float32, with mean 1.
    chunk: the ratio that each belongs to, where an objective has one for several steps, [n, P] int32.
    """

    segments: tuple[Steps, ...]
    train: Data
    step: Data
    sigma: Data
    weight: Data
    chunk: Data


class Planner(Protocol):
    """A frozen dataclass of settings, and the state machine that they make.

    Fields that are keyword-only are not settings of its own: `group`, the samples of a prompt, and `seed` are the
    config's. `num_steps` is the schedule's T. A state is a NamedTuple of ints that counts iterations in `iteration`.
    """

    num_steps: int

    @property
    def layout(self) -> Layout:
        """The segments of every plan."""

    @property
    def num_trained(self) -> int:
        """n, the places where a sample is trained."""

    def initial(self) -> Any:
        """The state of a run's first iteration."""

    def plan(self, state: Any, prompts: int) -> Plan:
        """The iteration's plan for P prompts."""

    def advance(self, state: Any) -> Any:
        """The state of the next iteration."""


def leaves_below(layout: Layout) -> list[int]:
    """Samples that a row of each segment becomes after it.

    >>> leaves_below((Segment(2), Segment(4, branch=2), Segment(6, branch=3)))
    [6, 3, 1]
    """
    return [math.prod(segment.branch for segment in layout[k + 1 :]) for k in range(len(layout))]


def nodes(layout: Layout, rows: int, samples: int) -> list[int]:
    """Rows that each segment has, beginning with so many: those of its nodes, or more that were there already."""
    return [max(rows, samples // leaves) for leaves in leaves_below(layout)]


def executed(layout: Layout, plan: Plan) -> list[int]:
    """Steps of each segment that run: all of a recorded one, else those that any prompt takes."""
    return [
        segment.steps if segment.record else int(steps.taken.max(initial=0))
        for segment, steps in zip(layout, plan.segments)
    ]


def evaluations(layout: Layout, plan: Plan, rows: int, samples: int) -> int:
    """Evaluations of the velocity that a rollout executes, in samples, beginning with so many rows.

    A deterministic prefix that a group shares has one row a prompt: with P prompts, groups of G and a window of w
    steps, `start P + (w + suffix) P G`; without sharing it is `start P G` for the first term.
    """
    return sum(steps * each for steps, each in zip(executed(layout, plan), nodes(layout, rows, samples)))


class Track(NamedTuple):
    """The k steps that one prompt takes of a segment: along `sigmas` [k + 1], with addresses from `first` on."""

    sigmas: np.ndarray
    first: int
    order: np.ndarray | int = 1


def lay(segment: Segment, tracks: Sequence[Track], eta: float = 1.0) -> Steps:
    """A segment's steps, from each prompt's own. Steps that nobody takes hold numbers that no solver stumbles over."""
    shape = segment.steps, len(tracks)
    sigma, sigma_next = np.full(shape, 1.0, np.float32), np.full(shape, 0.5, np.float32)
    order, address, taken = np.ones(shape, np.int32), np.zeros(shape, np.int32), np.zeros(len(tracks), np.int32)
    for p, track in enumerate(tracks):
        k = taken[p] = len(track.sigmas) - 1
        sigma[:k, p], sigma_next[:k, p] = track.sigmas[:-1], track.sigmas[1:]
        order[:k, p], address[:k, p] = track.order, track.first + np.arange(k)
    return Steps(sigma, sigma_next, np.full(shape, eta if segment.sde else 0.0, np.float32), order, address, taken)


def trained_at(layout: Layout, segments: Sequence[Steps], train: np.ndarray) -> Plan:
    """The plan that trains the rows `train`, [n] or [n, P], each with weight 1 and a ratio of its own."""
    recorded = [steps for segment, steps in zip(layout, segments) if segment.record]
    prompts = len(segments[0].taken)
    train = np.broadcast_to(train.reshape(len(train), -1), (len(train), prompts)).astype(np.int32)
    step, sigma = (
        np.take_along_axis(np.concatenate([getattr(steps, name) for steps in recorded]), train, axis=0)
        for name in ("address", "sigma")
    )
    return Plan(tuple(segments), train, step, sigma, np.ones(train.shape, np.float32), distinct(train.shape))


def distinct(shape: tuple[int, int]) -> np.ndarray:
    """Chunks of one step each, [n, P]."""
    return np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None], shape)


def whole(sigmas: np.ndarray, orders: np.ndarray | int, prompts: int) -> tuple[Layout, Plan]:
    """Deterministic sampling along a grid, [N + 1], the same for every prompt; nothing is trained."""
    layout = (Segment(len(sigmas) - 1),)
    none, levels = np.zeros((0, prompts), np.int32), np.zeros((0, prompts), np.float32)
    return layout, Plan((lay(layout[0], [Track(sigmas, 0, orders)] * prompts),), none, none, levels, levels, none)


def choose_trained(
    count: int, fraction: float, choice: str, seed: Sequence[int], among: int | None = None
) -> np.ndarray:
    """Which of `count` steps are trained: `max(1, int(fraction count))` of them, the first or a random choice.

    int32, in order. With `among` they are of the first so many steps.
    """
    kept = num_trained(count, fraction)
    if choice == "first":
        return np.arange(kept, dtype=np.int32)
    rng = np.random.default_rng(list(seed))
    return np.sort(rng.choice(count if among is None else among, kept, replace=False)).astype(np.int32)


def num_trained(count: int, fraction: float) -> int:
    """How many of `count` steps are trained."""
    return max(1, int(fraction * count))


def solver_orders(order: int, num_steps: int, total: int | None = None) -> np.ndarray:
    """The solver's order at each of `num_steps` steps that end at sigma 0, int32.

    It is lowered at the end: 1 on the last step, at most 2 before it on trajectories of `total` < 15 steps.

    >>> solver_orders(3, num_steps=4)
    array([3, 3, 2, 1], dtype=int32)
    """
    orders = np.full(num_steps, order, np.int32)
    orders[-1:] = 1
    if (num_steps if total is None else total) < 15 and num_steps >= 2:
        orders[-2] = min(order, 2)
    return orders


def require(settings: Any, valid: bool, field: str, remedy: str) -> None:
    """Raise ValueError that names the field, its value and the remedy, unless valid."""
    if not valid:
        raise ValueError(f"plan.{field}={getattr(settings, field)!r}: {remedy}")
