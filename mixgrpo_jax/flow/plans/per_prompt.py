"""A window for each prompt: different noise levels are trained in one batch, and a group shares its own."""

from dataclasses import dataclass

import numpy as np

from mixgrpo_jax.flow.plans.window import Windowed, WindowState


@dataclass(frozen=True)
class PerPrompt(Windowed):
    """Every prompt's window begins anywhere, uniformly, drawn anew every iteration.

    A step runs if any prompt takes it: the cost of a rollout is that of the latest start with the earliest end.
    """

    def starts(self, state: WindowState, prompts: int) -> list[int]:
        """A start for each prompt, a function of (seed, iteration, prompt's place in the batch)."""
        rng = np.random.default_rng([self.seed, state.iteration, 2])
        return rng.integers(self.last_start + 1, size=prompts).tolist()
