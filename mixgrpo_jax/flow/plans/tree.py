"""Trees: a prompt's samples share their trajectories until they branch, and branch several times."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixgrpo_jax.flow.plans.base import Layout, Plan, Segment, Track, lay, require, solver_orders, trained_at
from mixgrpo_jax.flow.schedules import SPACINGS, shifted_sigmas


class TreeState(NamedTuple):
    """Iterations spent."""

    iteration: int


@dataclass(frozen=True)
class Tree:
    """Every row becomes `factors[k]` before step `splits[k]`, and stochastic steps then tell them apart.

    Attributes:
      num_steps, shift, spacing: the schedule's steps, its shift towards noise and its spacing, see `shifted_sigmas`.
      splits: the steps before which rows branch, in order.
      factors: rows that each becomes there; their product is the group's size.
      length: stochastic steps after each split; all of them are trained. The others are deterministic.
      solver_order: order of the solver after the last of them, 1..3.
      group: samples of a prompt.
      seed: not read.

    Raises:
      ValueError: when a field is out of range.
    """

    num_steps: int = 25
    shift: float = 3.0
    splits: tuple[int, ...] = (1, 5)
    factors: tuple[int, ...] = (3, 4)
    length: int = 1
    solver_order: int = 1
    spacing: str = "trailing"
    _: dataclasses.KW_ONLY
    group: int = 12
    seed: int = 0

    def __post_init__(self):
        require(self, self.num_steps >= 2, "num_steps", "a trajectory needs at least 2 steps")
        require(self, self.shift > 0, "shift", "it must be positive; 1 is the uniform schedule")
        require(self, self.spacing in SPACINGS, "spacing", f"choose one of {SPACINGS}")
        require(self, self.length >= 1, "length", "it must be at least 1")
        require(self, self.solver_order in (1, 2, 3), "solver_order", "choose 1, 2 or 3")
        room = all(b - a >= self.length for a, b in itertools.pairwise((*self.splits, self.num_steps)))
        require(
            self,
            len(self.splits) > 0 and min(self.splits) >= 0 and room,
            "splits",
            f"give steps in order, at least length={self.length} apart, within num_steps={self.num_steps}",
        )
        require(
            self,
            len(self.factors) == len(self.splits) and math.prod(self.factors) == self.group,
            "factors",
            f"give one for each of splits={self.splits}, with the product batch.group={self.group}",
        )

    @property
    def layout(self) -> Layout:
        """What precedes the first split, then for each split its stochastic steps and those up to the next."""
        segments = [Segment(self.splits[0])]
        for factor, split, following in zip(self.factors, self.splits, (*self.splits[1:], self.num_steps)):
            segments.append(Segment(self.length, branch=factor, sde=True, record=True))
            segments.append(Segment(following - split - self.length))
        return tuple(segments)

    @property
    def num_trained(self) -> int:
        """Stochastic steps of every sample."""
        return self.length * len(self.splits)

    def initial(self) -> TreeState:
        """The state of a run's first iteration."""
        return TreeState(0)

    def advance(self, state: TreeState) -> TreeState:
        """The state of the next iteration."""
        return TreeState(state.iteration + 1)

    def plan(self, state: TreeState, prompts: int) -> Plan:
        """The same trajectories for every prompt and iteration."""
        sigmas, layout, first, segments = shifted_sigmas(self.num_steps, self.shift, self.spacing), self.layout, 0, []
        for number, segment in enumerate(layout, 1):
            last = number == len(layout)
            order = solver_orders(self.solver_order, segment.steps, self.num_steps) if last else 1
            segments.append(lay(segment, [Track(sigmas[first : first + segment.steps + 1], first, order)] * prompts))
            first += segment.steps
        return trained_at(layout, segments, np.arange(self.num_trained))
