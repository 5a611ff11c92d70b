"""GRPO's clipped objective on the window's steps."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.rl.samples import Metrics, Objective, Point, Roles, Samples, Tools


@dataclass(frozen=True)
class GRPO(Objective):
    """L = mean max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = p(x'|x) / p_old(x'|x), a step at a time.

    An advantage of each position, [b, S], has a ratio of each position; one of the sample has the sample's.

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      reduce: how a log-prob map becomes one log-prob: the "mean" over the latent's elements, as the field has it (hence
        clip ranges of 1e-4), or their "sum", the joint density's.
      old_log_prob: where log p_old comes from: the "rollout", or the "update", whose own program computes it before the
        first step, for one evaluation more a trained row. "auto" is "update" in bfloat16, where another program's
        rounding may be larger than the clip range, and "rollout" in float32 and for stale samples.

    Raises:
      ValueError: when a field is out of range.
    """

    clip_low: float = 1e-4
    clip_high: float = 1e-4
    reduce: str = "mean"
    old_log_prob: str = "auto"

    on_policy: ClassVar = {
        "ratio/max_deviation": "ratio_tolerance",
        "ratio/rollout_deviation": "rollout_tolerance",
    }

    def __post_init__(self):
        for field, known in (("reduce", ("mean", "sum")), ("old_log_prob", ("auto", "rollout", "update"))):
            if getattr(self, field) not in known:
                raise ValueError(f"objective.{field}={getattr(self, field)!r} is unknown; choose from {known}")
        for field in ("clip_low", "clip_high"):
            if not getattr(self, field) > 0:
                raise ValueError(f"objective.{field}={getattr(self, field)} must be positive, e.g. 1e-4")

    def settled(self, dtype: str, stale: bool) -> Self:
        """With "auto" resolved. Raises ValueError for stale samples whose log-probs the update is to compute."""
        if stale and self.old_log_prob == "update":
            raise ValueError(
                "objective.old_log_prob='update' with one_step_off_policy=True: the parameters that drew the samples "
                "are gone when they are trained on; set old_log_prob='rollout'"
            )
        chosen = "update" if dtype == "bfloat16" and not stale else "rollout"
        return dataclasses.replace(self, old_log_prob=chosen) if self.old_log_prob == "auto" else self

    @property
    def tolerance(self) -> float:
        """Half the clip range: beyond it, rounding decides what is clipped."""
        return min(self.clip_low, self.clip_high) / 2

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """The log-prob maps [n, B, S] of before the first step, where they are not the rollout's."""
        if self.old_log_prob != "update":
            return {}
        row = samples.rows
        v = roles["train"](row.x, tools.sampler.timestep(row.sigma), samples.cond)

        def of_place(row: Rows, v: Array) -> Array:
            transition = tools.sampler.step(row.x, v, row.sigma, row.sigma_next, row.eta)
            return tools.sampler.log_prob_map(transition, row.x_next)

        return {"log_prob": jax.vmap(of_place)(row, v)}  # flattened, samples would leave their devices

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        row, advantage = samples.rows, samples.advantage
        transition, v = tools.transition(roles["train"], samples)
        now = tools.sampler.log_prob_map(transition, row.x_next)
        old = samples.extra.get("log_prob", row.log_prob)
        scale = 1 if self.reduce == "mean" else row.x[0].size // advantage.shape[-1]

        def log_ratio(old: Array) -> Array:
            change = now - old
            return scale * (change if advantage.shape[-1] > 1 else change.mean(-1, keepdims=True))

        ratio = jnp.exp(log_ratio(old))
        clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        loss = jnp.maximum(-advantage * ratio, -advantage * clipped).mean(-1)
        metrics = {
            "loss/policy": loss,
            "ratio/mean": ratio.mean(-1),
            "ratio/max_deviation": jnp.abs(ratio - 1).max(-1),
            "ratio/clip_fraction": (clipped != ratio).mean(-1),
        }
        if "log_prob" in samples.extra:
            metrics["ratio/rollout_deviation"] = jnp.abs(jnp.exp(log_ratio(row.log_prob)) - 1).max(-1)
        point = Point(row.x, row.sigma, v, samples.cond, row.sigma_next, row.eta, transition, log_ratio(old).mean(-1))
        penalty, named = tools.terms(roles, point)
        return loss + penalty, metrics | named
