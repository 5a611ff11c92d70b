"""Trees: a prompt's samples share their trajectories until they branch, and branch several times."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixgrpo_jax.flow.plans.base import (
    Layout,
    Plan,
    Segment,
    Track,
    choose_trained,
    lay,
    num_trained,
    require,
    solver_orders,
    trained_at,
)
from mixgrpo_jax.flow.schedules import SPACINGS, shifted_sigmas


class TreeState(NamedTuple):
    """Iterations spent."""

    iteration: int


@dataclass(frozen=True)
class Tree:
    """Every row becomes several before each of some steps, and stochastic steps then tell them apart.

    Attributes:
      num_steps, shift, spacing: the schedule's steps, its shift towards noise and its spacing, see `shifted_sigmas`.
      splits: the steps before which rows branch, in order.
      factors: how many rows each becomes at each split; their product is the group's size. () shares the group's prime
        factors out evenly, the larger shares late.
      length: stochastic steps after each split. The others are deterministic.
      late: where the splits are after `late_after` iterations; until then they move there at an even pace. () leaves
        them where they are.
      late_after: iterations until the splits are at `late`.
      jitter: kappa of the Beta distribution over the schedule from which each iteration draws each split; the mean is
        the split's place, and the higher kappa, the nearer. The last step stays deterministic. 0 draws nothing.
      noise: the scale of the noise after each split, in units of the sampler's eta; () is 1.
      train_fraction: share of the stochastic steps that are trained, rounded down, at least one.
      train_choice: which stochastic steps are trained: the "first", or a new "random" choice every iteration.
      solver_order: order of the solver after the last stochastic step, 1..3.
      group: samples of a prompt.
      seed: of what is drawn.

    Raises:
      ValueError: when a field is out of range.
    """

    num_steps: int = 25
    shift: float = 3.0
    splits: tuple[int, ...] = (1, 5)
    factors: tuple[int, ...] = ()
    length: int = 1
    late: tuple[int, ...] = ()
    late_after: int = 100
    jitter: float = 0.0
    noise: tuple[float, ...] = ()
    train_fraction: float = 1.0
    train_choice: str = "first"
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
        require(self, self.late_after >= 1, "late_after", "it must be at least 1")
        require(self, self.jitter >= 0, "jitter", "it must be at least 0, which draws nothing")
        require(self, self.solver_order in (1, 2, 3), "solver_order", "choose 1, 2 or 3")
        require(self, 0 < self.train_fraction <= 1, "train_fraction", "it must be in (0, 1]")
        require(self, self.train_choice in ("first", "random"), "train_choice", "choose 'first' or 'random'")
        within = f"in order, at least length={self.length} apart, within num_steps={self.num_steps}"
        within += ", less the last step, which jitter leaves deterministic" if self.jitter else ""
        for field in ("splits", "late"):
            steps = getattr(self, field) or self.splits
            room = all(b - a >= self.length for a, b in itertools.pairwise((*steps, self._end)))
            require(self, len(steps) > 0 and min(steps) >= 0 and room, field, f"give steps {within}")
        for field in ("late", "noise", "factors"):
            same = len(getattr(self, field)) in (0, len(self.splits))
            require(self, same, field, f"give one for each of splits={self.splits}, or ()")
        require(self, all(scale > 0 for scale in self.noise), "noise", "scales must be positive; 1 is sampler.eta")
        whole = math.prod(self.branches) == self.group
        require(self, whole, "factors", f"their product must be batch.group={self.group}; () shares it out")

    @property
    def _end(self) -> int:
        """The steps that may be stochastic are before it."""
        return self.num_steps - (self.jitter > 0)

    @property
    def branches(self) -> tuple[int, ...]:
        """How many each row becomes at each split.

        >>> Tree(splits=(1, 3, 5), group=12).branches, Tree(splits=(1, 3, 5), group=27).branches
        ((2, 2, 3), (3, 3, 3))
        """
        if self.factors:
            return self.factors
        primes: list[int] = []
        shares = [1] * len(self.splits)
        while (left := self.group // math.prod(primes)) > 1:
            primes.append(next(d for d in range(2, left + 1) if left % d == 0))
        for prime in reversed(primes):
            shares[shares.index(min(shares))] *= prime
        return tuple(sorted(shares))

    @property
    def layout(self) -> Layout:
        """What precedes the first split, then for each split its stochastic steps and those up to the next."""
        most = self.num_steps - self.length * len(self.splits)  # deterministic steps, which may all lie together
        between = (a - b for a, b in zip((*self.splits[1:], self.num_steps), self.splits))
        moving = self.late != () or self.jitter > 0
        segments = [Segment(most if moving else self.splits[0])]
        for factor, steps in zip(self.branches, between):
            segments.append(Segment(self.length, branch=factor, sde=True, record=True))
            segments.append(Segment(most if moving else steps - self.length))
        return tuple(segments)

    @property
    def num_trained(self) -> int:
        """Stochastic steps of every sample that are trained."""
        return num_trained(self.length * len(self.splits), self.train_fraction)

    def initial(self) -> TreeState:
        """The state of a run's first iteration."""
        return TreeState(0)

    def advance(self, state: TreeState) -> TreeState:
        """The state of the next iteration."""
        return TreeState(state.iteration + 1)

    def starts(self, state: TreeState) -> list[int]:
        """The iteration's splits, the same for every prompt."""
        begin, end = np.array(self.splits), np.array(self.late or self.splits)
        places = begin + min(state.iteration / self.late_after, 1) * (end - begin)
        splits: list[int] = []
        last = self._end - self.length
        if self.jitter:
            mean = np.clip(places / max(last, 1), 1e-6, 1 - 1e-6)
            rng = np.random.default_rng([self.seed, state.iteration, 5])
            places = np.sort(last * rng.beta(self.jitter * mean, self.jitter * (1 - mean)))
        for left, place in zip(reversed(range(len(places))), np.rint(places).astype(int)):
            earliest = splits[-1] + self.length if splits else 0
            splits.append(int(np.clip(place, earliest, last - left * self.length)))  # so that the others have room
        return splits

    def plan(self, state: TreeState, prompts: int) -> Plan:
        """The iteration's trajectories, the same for every prompt."""
        sigmas, layout, segments = shifted_sigmas(self.num_steps, self.shift, self.spacing), self.layout, []
        bounds = [0, *itertools.chain(*((split, split + self.length) for split in self.starts(state))), self.num_steps]
        scales = iter(self.noise or [1.0] * len(self.splits))
        for number, (segment, (first, end)) in enumerate(zip(layout, itertools.pairwise(bounds)), 1):
            last = number == len(layout)
            order = solver_orders(self.solver_order, end - first, self.num_steps) if last else 1
            track = Track(sigmas[first : end + 1], first, order)
            segments.append(lay(segment, [track] * prompts, next(scales) if segment.sde else 0.0))
        count, seed = self.length * len(self.splits), (self.seed, state.iteration, 1)
        return trained_at(layout, segments, choose_trained(count, self.train_fraction, self.train_choice, seed))
