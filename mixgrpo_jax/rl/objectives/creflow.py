"""CreFlow (arXiv 2605.14274), an approximation: DiffusionNFT where a map says, and a pull to what went right."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.rl.objectives.nft import NFT
from mixgrpo_jax.rl.samples import Metrics, Roles, Samples, Tools, by_position, mean_over_positions


@dataclass(frozen=True)
class CreFlow(NFT):
    """With m a map of what a reward speaks of, and x0* the mean of the group's samples of positive advantage,

        L = adv_max / beta (sum m l / sum m + reflow [A < 0] sum m |x0_hat - x0*|^2 / sum m),

    where l is NFT's loss of a position. Published are the mask, the target and that failed samples are drawn to it; the
    weight, the norm by sum m, and success as a positive advantage (there, a verifier's word) were chosen. With a map of
    ones and reflow=0 it is NFT. A group without a positive advantage has no target, and is not drawn anywhere.

    The map is that of `advantage.map`, see `Credit`. The target is computed once an iteration, and kept beside x0.

    Attributes:
      reflow: the weight of the pull.

    Raises:
      ValueError: when a field is out of range.
    """

    reflow: float = 0.1

    needs: ClassVar = NFT.needs | {"map"}

    def __post_init__(self):
        super().__post_init__()
        if not self.reflow >= 0:
            raise ValueError(f"objective.reflow={self.reflow} must not be negative; 0 pulls nothing")

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """What `Forward` checks, the target x0* [1, B, S, C], and whether there is one, [1, B]."""
        good = (samples.weight > 0) & (samples.advantage[0].mean(-1) > 0)
        mates = ((samples.group[:, None] == samples.group) & good).astype(jnp.float32)
        count = mates.sum(1)
        flat = samples.x0.reshape(len(samples.x0), -1)
        target = (mates / jnp.maximum(count, 1)[:, None]) @ flat
        found = {"target": target.reshape(samples.x0.shape)[None], "aimed": (count > 0).astype(jnp.float32)[None]}
        return super().prepare(roles, samples, key, tools) | found

    def over_positions(self, values: Array, x0_hat: Array, samples: Samples) -> tuple[Array, Metrics]:
        """The masked mean [b] and the pull."""
        m = by_position(samples.extra["map"], values)
        total = jnp.maximum(mean_over_positions(jnp.broadcast_to(m, values.shape)), 1e-6)

        def masked(values: Array) -> Array:
            return mean_over_positions(m * values) / total

        failed = samples.extra["aimed"] * (samples.advantage.mean(-1) < 0)
        pull = failed * masked(jnp.square(x0_hat - jax.lax.stop_gradient(samples.extra["target"])))
        return masked(values) + self.reflow * pull, {"loss/reflow": pull}
