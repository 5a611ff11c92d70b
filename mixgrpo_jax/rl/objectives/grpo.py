"""GRPO's clipped objective on steps; ratios, surrogates and weights of six other methods are its settings."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow import kernels
from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.rl import ratios
from mixgrpo_jax.rl.samples import Metrics, Objective, Point, Roles, Samples, Tools


class Change(NamedTuple):
    """How the policy of a step has changed; of b samples, by position or of the sample, [b, S or 1].

    log_ratio: log p / p_old. own: what the objective makes of it. divergence: D, where it is needed.
    drawn: log p / p_rollout.
    """

    transition: kernels.Transition
    log_ratio: Array
    own: Array
    divergence: Array
    drawn: Array


@dataclass(frozen=True)
class GRPO(Objective):
    """L = mean max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = p(x'|x) / p_old(x'|x), a step at a time.

    An advantage of each position, [b, S], has a ratio of each position; one of the sample has the sample's.

    Where ratio or surrogate are others, the update's own program computes the velocity of before, and log-probs are
    densities whatever the sampler has: log p / p_old is mean[w d] - D, see `rl.ratios`.

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. The bounds of other surrogates:
        clip_high where A > 0, clip_low where A < 0.
      ratio: what becomes of the log-ratio, one of `ratios.RATIOS`.
      surrogate: the loss that a ratio makes, one of `ratios.SURROGATES`.
      weights: weights of places in the loss, one of `ratios.WEIGHTS`, with mean 1 over an iteration's rows.
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
    ratio: str = "plain"
    surrogate: str = "clip"
    weights: str = "even"
    reduce: str = "mean"
    old_log_prob: str = "auto"

    on_policy: ClassVar = {
        "ratio/max_deviation": "ratio_tolerance",
        "ratio/rollout_deviation": "rollout_tolerance",
    }

    def __post_init__(self):
        choices = {"reduce": ("mean", "sum"), "old_log_prob": ("auto", "rollout", "update")}
        choices |= {"ratio": (*ratios.RATIOS,), "surrogate": (*ratios.SURROGATES,), "weights": (*ratios.WEIGHTS,)}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(f"objective.{field}={getattr(self, field)!r} is unknown; choose from {known}")
        for field in ("clip_low", "clip_high"):
            if not getattr(self, field) > 0:
                raise ValueError(f"objective.{field}={getattr(self, field)} must be positive, e.g. 1e-4")

    @property
    def anchored(self) -> bool:
        """Whether the velocity of before is needed, and not its log-probs alone."""
        return (self.ratio, self.surrogate) != ("plain", "clip")

    def settled(self, dtype: str, stale: bool) -> Self:
        """With "auto" resolved. Raises ValueError where what is to be computed of before cannot be."""
        if stale and (self.old_log_prob == "update" or self.anchored):
            of = f"ratio={self.ratio!r}, surrogate={self.surrogate!r}" if self.anchored else "old_log_prob='update'"
            raise ValueError(
                f"objective.{of} with one_step_off_policy=True: the parameters that drew the samples are gone when "
                "they are trained on; " + ("set it to False" if self.anchored else "set old_log_prob='rollout'")
            )
        if self.anchored and self.old_log_prob == "rollout":
            raise ValueError(
                f"objective.old_log_prob='rollout' with ratio={self.ratio!r}, surrogate={self.surrogate!r}: these "
                "compare with the velocity of before, which the rollout does not keep; set old_log_prob='auto'"
            )
        chosen = "update" if self.anchored or (dtype == "bfloat16" and not stale) else "rollout"
        return dataclasses.replace(self, old_log_prob=chosen) if self.old_log_prob == "auto" else self

    @property
    def tolerance(self) -> float:
        """Half the clip range: beyond it, rounding decides what is clipped; of a divergence it does not."""
        return math.inf if self.surrogate == "divergence" else min(self.clip_low, self.clip_high) / 2

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """Of before the first step, where it is not the rollout's: log-prob maps [n, B, S], or velocities [n, B, S, C].

        And scales of log-ratios and weights of places [n, B], where they are not 1.
        """
        row, found = samples.rows, {}
        step = ratios.steps_of(tools.sampler, row)
        if self.ratio != "plain":
            found["scale"] = ratios.RATIOS[self.ratio].scale(step)
        if self.weights != "even":
            found["step_weight"] = ratios.normalised(ratios.WEIGHTS[self.weights](step))
        if self.old_log_prob != "update" and not self.anchored:
            return found
        v = roles["train"](row.x, tools.sampler.timestep(row.sigma), samples.cond)
        if self.anchored:
            return found | {"v": v}

        def of_place(row: Rows, v: Array) -> Array:
            transition = tools.sampler.step(row.x, v, row.sigma, row.sigma_next, row.eta)
            return tools.sampler.log_prob_map(transition, row.x_next)

        return found | {"log_prob": jax.vmap(of_place)(row, v)}  # flattened, samples would leave their devices

    def change(self, row: Rows, v: Array, extra: dict[str, Array], positions: int, tools: Tools) -> Change:
        """How a place's step has changed by velocities v [b, S, C], for advantages of 1 or S positions."""
        transition = tools.sampler.step(row.x, v, row.sigma, row.sigma_next, row.eta)
        size = 1 if self.reduce == "mean" else row.x[0].size // positions

        def reduced(change: Array) -> Array:
            return size * (change if positions > 1 else change.mean(-1, keepdims=True))

        if self.anchored:
            before = tools.sampler.step(row.x, extra["v"], row.sigma, row.sigma_next, row.eta)
            linear, divergence = map(reduced, ratios.moved(transition, before, row.x_next))
            log_ratio = linear - divergence
            drawn = reduced(tools.sampler.log_prob_map(before, row.x_next) - row.log_prob) + log_ratio
        else:
            now = tools.sampler.log_prob_map(transition, row.x_next)
            log_ratio, drawn = (reduced(now - old) for old in (extra.get("log_prob", row.log_prob), row.log_prob))
            divergence = jnp.zeros_like(log_ratio)
        own = log_ratio + divergence if ratios.RATIOS[self.ratio].unbiased else log_ratio
        own = own * extra["scale"][:, None] if "scale" in extra else own
        return Change(transition, log_ratio, own, divergence, drawn)

    def metrics(self, loss: Array, ratio: Array, flat: Array, drawn: Array) -> Metrics:
        """The mean and the largest deviation of ratios [..., S or 1], also to the rollout's where that may differ."""
        found = {
            "loss/policy": loss,
            "ratio/mean": ratio.mean(-1),
            "ratio/max_deviation": jnp.abs(ratio - 1).max(-1),
            "ratio/clip_fraction": flat.mean(-1),
        }
        if self.old_log_prob == "update" or self.anchored:
            found["ratio/rollout_deviation"] = jnp.abs(jnp.exp(drawn) - 1).max(-1)
        return found

    def bounds(self, advantage: Array) -> tuple[ratios.Bound, ratios.Bound]:
        """clip_low and clip_high of samples, of which each may have its own, as the advantages [b, S or 1]."""
        del advantage
        return self.clip_low, self.clip_high

    def beside(self, v: Array, samples: Samples) -> tuple[Array, Metrics]:
        """What is added to a place's loss, [b], and its metrics; v [b, S, C] is the trained velocity."""
        del samples
        return jnp.zeros(len(v)), {}

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        row, advantage = samples.rows, samples.advantage
        v = roles["train"](row.x, tools.sampler.timestep(row.sigma), samples.cond).astype(jnp.float32)
        change = self.change(row, v, samples.extra, advantage.shape[-1], tools)
        ratio, surrogate = jnp.exp(change.own), ratios.SURROGATES[self.surrogate]
        loss, flat = surrogate(ratio, advantage, *self.bounds(advantage), change.divergence)
        loss = loss.mean(-1)
        metrics = self.metrics(loss, ratio, flat, change.drawn)
        if "step_weight" in samples.extra:
            loss = samples.extra["step_weight"] * loss
        log_ratio = change.log_ratio.mean(-1)
        point = Point(row.x, row.sigma, v, samples.cond, row.sigma_next, row.eta, change.transition, log_ratio)
        penalty, named = tools.terms(roles, point)
        added, found = self.beside(v, samples)
        return loss + added + penalty, metrics | found | named
