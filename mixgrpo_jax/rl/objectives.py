"""Losses on the rows of a rollout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow import kernels
from mixgrpo_jax.flow.rollout import Sampler, Velocity


class Row(NamedTuple):
    """One window step of b samples: x, x_next [b, S, C]; log_prob [b, S]; sigma, sigma_next scalars; advantage [b];
    cond, a pytree with leading axis b."""

    x: Array
    x_next: Array
    log_prob: Array
    sigma: Array
    sigma_next: Array
    advantage: Array
    cond: Any


# (params, reference params or None, row) -> loss scalar, metrics {name: scalar}
Objective = Callable[[Any, Any, Row], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True)
class GRPOConfig:
    """GRPO's clipped objective.

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    reduce: how a log-prob map becomes a sample's log-prob: its "mean" over the latent's elements, as the field has it
        (hence clip ranges of 1e-4), or their "sum", the joint density's.
    kl_rollout: weight of (log p - log p_old)^2 / 2, a penalty for leaving the policy that drew the samples.
    kl_reference: weight of KL(p || p_ref) = |mean - mean_ref|^2 / (2 std^2), averaged over the latent's elements.
    """

    clip_low: float = 1e-4
    clip_high: float = 1e-4
    reduce: str = "mean"
    kl_rollout: float = 0.0
    kl_reference: float = 0.0

    def __post_init__(self):
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"objective.reduce={self.reduce!r} is unknown; choose 'mean' or 'sum'")
        for field in ("clip_low", "clip_high"):
            if not getattr(self, field) > 0:
                raise ValueError(f"objective.{field}={getattr(self, field)} must be positive, e.g. 1e-4")
        for field in ("kl_rollout", "kl_reference"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"objective.{field}={getattr(self, field)} must not be negative; 0 turns it off")


def grpo(velocity: Velocity, sampler: Sampler, config: GRPOConfig) -> Objective:
    """L = mean max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = p(x'|x) / p_old(x'|x), and its penalties."""

    def objective(params, reference, row):
        transition, _ = sampler.transition(velocity, params, row.x, row.sigma, row.sigma_next, row.cond)
        elements = 1 if config.reduce == "mean" else row.x[0].size
        log_ratio = (sampler.log_prob_map(transition, row.x_next) - row.log_prob).mean(-1) * elements
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        loss = jnp.maximum(-row.advantage * ratio, -row.advantage * clipped).mean()
        metrics = {
            "loss/policy": loss,
            "ratio/mean": ratio.mean(),
            "ratio/max_deviation": jnp.abs(ratio - 1).max(),
            "ratio/clip_fraction": (clipped != ratio).mean(),
        }
        if config.kl_rollout:
            penalty = 0.5 * (log_ratio**2).mean()
            loss, metrics = loss + config.kl_rollout * penalty, metrics | {"kl/rollout": penalty}
        if config.kl_reference:
            anchor, _ = sampler.transition(velocity, reference, row.x, row.sigma, row.sigma_next, row.cond)
            penalty = kernels.kl(transition, anchor).mean()
            loss, metrics = loss + config.kl_reference * penalty, metrics | {"kl/reference": penalty}
        return loss, metrics | {"loss/total": loss}

    return objective
