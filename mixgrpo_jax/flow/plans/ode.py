"""Deterministic trajectories, for objectives that noise the clean sample again (DiffusionNFT and its kin)."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixgrpo_jax.flow.plans.base import (
    Layout,
    Plan,
    Segment,
    Track,
    choose_trained,
    distinct,
    lay,
    num_trained,
    require,
    solver_orders,
)
from mixgrpo_jax.flow.schedules import SPACINGS, shifted_sigmas


class ODEState(NamedTuple):
    """Iterations spent."""

    iteration: int


@dataclass(frozen=True)
class ODE:
    """Samples of the flow's ODE. The first step, which every solver takes by Euler, is recorded: by it, the update's
    velocity is checked against the rollout's.

    Attributes:
      num_steps, shift, spacing: the schedule's steps, its shift towards noise and its spacing, see `shifted_sigmas`.
      solver_order: order of the solver, 1..3.
      train_fraction: share of the schedule's noise levels at which each sample is trained, rounded down, at least one.
      train_choice: which ones: the "first", a new "random" choice every iteration, or "stratified", which is one from
        each of as many equal parts of the schedule, for every prompt another.
      train_range: they are chosen among this share of the schedule, from its beginning.
      group: samples of a prompt; each has its own noise, since nothing else tells them apart.
      seed: of the random choice.

    Raises:
      ValueError: when a field is out of range.
    """

    num_steps: int = 10
    shift: float = 3.0
    solver_order: int = 2
    train_fraction: float = 0.99
    train_choice: str = "first"
    spacing: str = "trailing"
    train_range: float = 1.0
    _: dataclasses.KW_ONLY
    group: int = 1
    seed: int = 0

    def __post_init__(self):
        require(self, self.num_steps >= 2, "num_steps", "a trajectory needs at least 2 steps")
        require(self, self.shift > 0, "shift", "it must be positive; 1 is the uniform schedule")
        require(self, self.spacing in SPACINGS, "spacing", f"choose one of {SPACINGS}")
        require(self, self.solver_order in (1, 2, 3), "solver_order", "choose 1, 2 or 3")
        require(self, 0 < self.train_fraction <= 1, "train_fraction", "it must be in (0, 1]")
        known = "first", "random", "stratified"
        require(self, self.train_choice in known, "train_choice", f"choose from {known}")
        require(self, 0 < self.train_range <= 1, "train_range", "it must be in (0, 1]")
        few = f"its {self.num_available} steps are fewer than the {self.num_trained} of plan.train_fraction; raise it"
        require(self, self.num_available >= self.num_trained, "train_range", few)

    @property
    def layout(self) -> Layout:
        """The recorded step, and the others."""
        return Segment(1, branch=self.group, record=True), Segment(self.num_steps - 1)

    @property
    def num_trained(self) -> int:
        """Noise levels at which each sample is trained."""
        return num_trained(self.num_steps, self.train_fraction)

    @property
    def num_available(self) -> int:
        """Noise levels of which they are chosen."""
        return num_trained(self.num_steps, self.train_range)

    def initial(self) -> ODEState:
        """The state of a run's first iteration."""
        return ODEState(0)

    def advance(self, state: ODEState) -> ODEState:
        """The state of the next iteration."""
        return ODEState(state.iteration + 1)

    def plan(self, state: ODEState, prompts: int) -> Plan:
        """The iteration's noise levels; its trajectories are always the same."""
        sigmas = shifted_sigmas(self.num_steps, self.shift, self.spacing)
        orders = solver_orders(self.solver_order, self.num_steps)
        tracks = (Track(sigmas[:2], 0), Track(sigmas[1:], 1, orders[1:]))
        segments = tuple(lay(segment, [track] * prompts) for segment, track in zip(self.layout, tracks))
        step = self._trained(state, prompts)
        return Plan(
            segments,
            train=np.zeros(step.shape, np.int32),
            step=step,
            sigma=sigmas[step],
            weight=np.ones(step.shape, np.float32),
            chunk=distinct(step.shape),
        )

    def _trained(self, state: ODEState, prompts: int) -> np.ndarray:
        """The steps whose noise levels each prompt is trained at, [n, P] int32."""
        seed, count, among = (self.seed, state.iteration, 1), self.num_trained, self.num_available
        if self.train_choice == "stratified":
            bounds = np.linspace(0, among, count + 1)
            rng = np.random.default_rng(seed)
            return rng.uniform(bounds[:-1, None], bounds[1:, None], (count, prompts)).astype(np.int32)
        chosen = choose_trained(self.num_steps, self.train_fraction, self.train_choice, seed, among)
        return np.broadcast_to(chosen[:, None], (count, prompts))
