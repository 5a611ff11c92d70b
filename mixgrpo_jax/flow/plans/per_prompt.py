"""A window for each prompt: different noise levels are trained in one batch, and a group shares its own."""

from dataclasses import dataclass

import numpy as np

from mixgrpo_jax.flow.plans.base import require
from mixgrpo_jax.flow.plans.window import Windowed, WindowState


@dataclass(frozen=True)
class PerPrompt(Windowed):
    """Every prompt's window begins anywhere, uniformly, drawn anew every iteration.

    A step runs if any prompt takes it: the cost of a rollout is that of the latest start with the earliest end. With
    groups of G that share their noise, windows of one step in the first 10 of 20 cost up to 9 / G + 20 evaluations a
    sample where 20 are used without sharing, and in a band of 5 from step b on (b + 4) / G + 20 - b.

    Attributes:
      band: an iteration's starts are in a run of so many, drawn anew as well: fewer steps run. None is one run of all.

    Raises:
      ValueError: when a field is out of range.
    """

    band: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self, self.band is None or self.band >= 1, "band", "it must be at least 1; None is all starts")

    def starts(self, state: WindowState, prompts: int) -> list[int]:
        """A start for each prompt, a function of (seed, iteration, prompt's place in the batch)."""
        rng, count = np.random.default_rng([self.seed, state.iteration, 2]), self.last_start + 1
        band = count if self.band is None else min(self.band, count)
        first = band * int(np.random.default_rng([self.seed, state.iteration, 3]).integers(-(-count // band)))
        return (first + rng.integers(min(band, count - first), size=prompts)).tolist()
