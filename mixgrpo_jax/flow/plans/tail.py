"""Deterministic trajectories whose last steps are recorded, for objectives that take gradients back from the end."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from mixgrpo_jax.flow.plans.base import Layout, Plan, Segment, Track, lay, require, trained_at
from mixgrpo_jax.flow.plans.ode import ODEState
from mixgrpo_jax.flow.schedules import SPACINGS, shifted_sigmas


@dataclass(frozen=True)
class Tail:
    """Samples of the flow's ODE by Euler's steps, whatever the sampler's solver is; the last of them are recorded.

    Attributes:
      num_steps, shift, spacing: the schedule.
      last: K, the steps that are recorded; 0 is all.
      places: at how many of them each sample is trained, drawn anew for every prompt and iteration; 0 is all.
      jump: whether trajectories end early: before one of the K steps, drawn likewise, and by one step to the clean
        sample, which alone is recorded and trained.
      group: samples of a prompt; each has its own noise, since nothing else tells them apart.
      seed: of what is drawn.

    Raises:
      ValueError: when a field is out of range.
    """

    num_steps: int = 10
    shift: float = 3.0
    last: int = 1
    places: int = 0
    jump: bool = False
    spacing: str = "trailing"
    _: dataclasses.KW_ONLY
    group: int = 1
    seed: int = 0

    def __post_init__(self):
        require(self, self.num_steps >= 2, "num_steps", "a trajectory needs at least 2 steps")
        require(self, self.shift > 0, "shift", "it must be positive; 1 is the uniform schedule")
        require(self, self.spacing in SPACINGS, "spacing", f"choose one of {SPACINGS}")
        in_range = 0 <= self.last <= self.num_steps
        require(self, in_range, "last", f"it must be in 0..{self.num_steps} (plan.num_steps); 0 is all")
        most = self.layout[1].steps
        require(self, 0 <= self.places <= most, "places", f"it must be in 0..{most}, the recorded steps; 0 is all")

    @property
    def layout(self) -> Layout:
        """The steps before, and those that are recorded."""
        recorded = 1 if self.jump else self.last or self.num_steps
        return Segment(self.num_steps - recorded, branch=self.group), Segment(recorded, record=True)

    @property
    def num_trained(self) -> int:
        """Steps at which each sample is trained."""
        return self.places or self.layout[1].steps

    def initial(self) -> ODEState:
        """The state of a run's first iteration."""
        return ODEState(0)

    def advance(self, state: ODEState) -> ODEState:
        """The state of the next iteration."""
        return ODEState(state.iteration + 1)

    def plan(self, state: ODEState, prompts: int) -> Plan:
        """The iteration's trajectories, and where they are trained: in order, from noise to data."""
        sigmas, last = shifted_sigmas(self.num_steps, self.shift, self.spacing), self.last or self.num_steps
        rng = np.random.default_rng([self.seed, state.iteration, 4])
        starts = self.num_steps - last + rng.integers(last if self.jump else 1, size=prompts)
        ends = [sigmas[[start, -1]] if self.jump else sigmas[start:] for start in starts]
        before = lay(self.layout[0], [Track(sigmas[: start + 1], 0) for start in starts])
        recorded = lay(self.layout[1], [Track(end, start) for end, start in zip(ends, starts)])
        rows = rng.permuted(np.tile(np.arange(self.layout[1].steps), (prompts, 1)), axis=1)
        return trained_at(self.layout, (before, recorded), np.sort(rows[:, : self.num_trained]).T)
