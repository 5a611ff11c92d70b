"""GCPO (arXiv 2510.21583): GRPO with one ratio for each chunk of consecutive steps."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.rl import ratios
from mixgrpo_jax.rl.objectives.grpo import GRPO, Change
from mixgrpo_jax.rl.samples import Metrics, Point, Roles, Samples, Tools


@dataclass(frozen=True)
class GCPO(GRPO):
    """L = mean over a sample's chunks of max(-A r, -A clip(r)), where log r is the mean of the chunk's log-ratios.

    The plan says which places make a chunk: `plan.chunks`. Chunks of one step are GRPO, and one chunk is the sequence's
    ratio. Settings are GRPO's; a place's weight is its share of its chunk's.
    """

    span: ClassVar = "window"

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        row, advantage = samples.rows, samples.advantage  # [n, b, ...]
        v = roles["train"](row.x, tools.sampler.timestep(row.sigma), samples.cond)

        def of_place(row: Rows, v: Array, extra: dict[str, Array]) -> Change:
            return self.change(row, v, extra, advantage.shape[-1], tools)

        change = jax.vmap(of_place)(row, v, samples.extra)
        same = (samples.chunk[:, None] == samples.chunk).astype(jnp.float32)[..., None]  # [n, n, b, 1]
        share = 1 / same.sum(1)

        def of_chunk(values: Array) -> Array:
            return share * (same * values).sum(1)

        ratio = jnp.exp(of_chunk(change.own))
        surrogate = ratios.SURROGATES[self.surrogate]
        loss, flat = surrogate(ratio, advantage, self.clip_low, self.clip_high, of_chunk(change.divergence))
        weight = samples.step_weight * samples.extra.get("step_weight", 1.0)
        loss = (weight * (share * loss).mean(-1)).sum(0) / share[..., 0].sum(0)
        metrics = self.metrics(loss, ratio, flat, change.drawn)
        metrics = {n: m if m.ndim == 1 else (m.max if "deviation" in n else m.mean)(0) for n, m in metrics.items()}
        log_ratio = change.log_ratio.mean(-1)
        point = Point(row.x, row.sigma, v, samples.cond, row.sigma_next, row.eta, change.transition, log_ratio)
        penalty, named = tools.terms(roles, point)
        return loss + penalty, metrics | named
