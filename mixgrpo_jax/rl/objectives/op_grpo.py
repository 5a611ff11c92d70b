"""OP-GRPO (arXiv 2604.04142), an approximation: GRPO that also learns from groups of earlier iterations."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.rl import ratios
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.samples import Metrics, Roles, Samples, Tools


@dataclass(frozen=True)
class OPGRPO(GRPO):
    """GRPO's loss, whose ratio is to the policy of before the update for all samples. A replayed one is multiplied by

        clip(exp(mean_t log p_old / p_behaviour), 1 / correction, correction),

    its sequence's correction for who drew it, whose log-probs were recorded; its steps of kappa > kappa_max are left
    out, since log-ratios grow with kappa. Without replayed samples it is GRPO with old_log_prob="update".

    What is known: a buffer of high-quality trajectories, a correction by sequence that leaves GRPO's clip as it is,
    and late steps cut off. Chosen here: the correction's form, the cut by kappa, and what `select.Replay` says.

    Attributes:
      kappa_max: the largest kappa of a replayed step that is trained: of Flow-GRPO's 10 steps, 1 leaves out the last,
        and 2 none.
      correction: the bound of the correction for who drew a replayed sample.

    Raises:
      ValueError: when a field is out of range, or for a ratio or surrogate that is not GRPO's.
    """

    kappa_max: float = 1.0
    correction: float = 2.0

    needs: ClassVar[frozenset[str]] = frozenset({"rows", "replay"})

    def __post_init__(self):
        super().__post_init__()
        if not self.kappa_max > 0 or not self.correction >= 1:
            raise ValueError(
                f"objective.kappa_max={self.kappa_max}, correction={self.correction}: choose kappa_max > 0 and "
                "correction >= 1, which is none"
            )
        if self.anchored:
            raise ValueError(f"objective.ratio={self.ratio!r}, surrogate={self.surrogate!r}: choose 'plain' and 'clip'")

    def settled(self, dtype: str, stale: bool) -> Self:
        """The update computes the log-probs of before. Raises ValueError for stale samples, for which it cannot."""
        return super(OPGRPO, replace(self, old_log_prob="update")).settled(dtype, stale)

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """As GRPO's; and with replayed samples the weights of all, [n, B]."""
        found = super().prepare(roles, samples, key, tools)
        if "replayed" not in samples.extra:
            return found
        row, size = samples.rows, 1 if self.reduce == "mean" else samples.rows.x[0, 0].size
        counted = ratios.steps_of(tools.sampler, row).kappa <= self.kappa_max
        change = size * (found["log_prob"] - row.log_prob).mean(-1)
        change = jnp.where(counted, change, 0).sum(0) / jnp.maximum(counted.sum(0), 1)
        weight = jnp.exp(jnp.clip(change, -math.log(self.correction), math.log(self.correction)))
        own = jnp.where(samples.extra["replayed"] > 0, counted * weight, 1.0)
        return found | {"step_weight": own * found.get("step_weight", 1.0)}

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]; a replayed sample need not agree with its rollout."""
        loss, metrics = super().__call__(roles, samples, key, tools)
        if "replayed" in samples.extra:
            replayed = samples.extra["replayed"]
            metrics["ratio/rollout_deviation"] = jnp.where(replayed > 0, 0, metrics["ratio/rollout_deviation"])
            metrics["replay/share"] = replayed
        return loss, metrics
