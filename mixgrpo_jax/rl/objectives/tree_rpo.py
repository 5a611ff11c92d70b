"""Dynamic-TreeRPO (arXiv 2509.23352), an approximation: GRPO on trees, clipped by reward, drawn to the best path."""

from dataclasses import dataclass
from typing import Self

import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.samples import Metrics, Roles, Samples, Tools, mean_over_positions


@dataclass(frozen=True)
class TreeRPO(GRPO):
    """GRPO's loss, whose clip range grows with the sample's reward, by 1 + sensitivity (1 + tanh A) / 2, plus

        best_path mean |v(x_t) - v_old(x_t*)|^2

    at each place t, where x* is the path of the group's sample with the largest advantage, without gradient.

    What is known, by reviews of the paper: the clip range depends on the reward, and the velocities of the best path
    are targets of supervised learning at every step. Chosen here: how the range depends, and both sizes. Both off, it
    is GRPO.

    Attributes:
      sensitivity: how much wider the range of the best is, at most.
      best_path: weight of the distance to the best path's velocities; 0 computes none.

    Raises:
      ValueError: when a field is out of range.
    """

    sensitivity: float = 1.0
    best_path: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        for field in ("sensitivity", "best_path"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"objective.{field}={getattr(self, field)} must not be negative; 0 turns it off")

    @property
    def anchored(self) -> bool:
        """As GRPO's; and the best path's velocities are those of before."""
        return self.best_path > 0 or super().anchored

    def settled(self, dtype: str, stale: bool) -> Self:
        """As GRPO's."""
        if self.best_path > 0 and (stale or self.old_log_prob == "rollout"):
            of = "one_step_off_policy=True" if stale else "old_log_prob='rollout'"
            raise ValueError(
                f"objective.best_path={self.best_path} with {of}: it is to velocities of before the update, which the "
                "rollout does not keep; set best_path=0, or one_step_off_policy=False and old_log_prob='auto'"
            )
        return super().settled(dtype, stale)

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """As GRPO's; and of each sample's group the velocities of the best path, [n, B, S, C]."""
        found = super().prepare(roles, samples, key, tools)
        if not self.best_path:
            return found
        reward = jnp.where(samples.weight > 0, samples.advantage[-1].mean(-1), -jnp.inf)  # of leaves, where it differs
        same = samples.group[:, None] == samples.group
        return found | {"best": found["v"][:, jnp.argmax(jnp.where(same, reward, -jnp.inf), axis=1)]}

    def bounds(self, advantage: Array) -> tuple[Array, Array]:
        """Of each sample, [b, S or 1]."""
        wider = 1 + self.sensitivity * (1 + jnp.tanh(advantage)) / 2
        return self.clip_low * wider, self.clip_high * wider

    def beside(self, v: Array, samples: Samples) -> tuple[Array, Metrics]:
        """The distance to the best path, [b], with its weight, and without as "mse/best"."""
        if not self.best_path:
            return super().beside(v, samples)
        distance = mean_over_positions(jnp.square(v - samples.extra["best"]))
        return self.best_path * distance, {"mse/best": distance}
