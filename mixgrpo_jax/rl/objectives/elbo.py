"""GRPO's objective where a bound of the clean sample's likelihood stands for that of its path: AWM and V-GRPO.

The file is long because both are one loss, and its settings have to be said.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.rl.objectives.forward import Forward, noised
from mixgrpo_jax.rl.samples import Metrics, Point, Roles, Samples, Tools, mean_over_positions

TINY = 1e-10

# Of the mean square y and the mean absolute value a of v - (eps - x0), and of t: -log p.
WEIGHTINGS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "none": lambda y, a, t: y,
    "t": lambda y, a, t: t * y,
    "t2": lambda y, a, t: t**2 * y,
    "huber": lambda y, a, t: t * (jnp.sqrt(y + TINY) - TINY**0.5),
    "ghuber": lambda y, a, t: t * ((y + TINY) ** 0.25 - TINY**0.25) / 0.25,
    "x0": lambda y, a, t: t**2 * y / jnp.maximum(t * jax.lax.stop_gradient(a), 1e-5),
}


@dataclass(frozen=True)
class AWM(Forward):
    """Advantage weighted matching (arXiv 2509.25050): L = max(-A r, -A clip(r)) with log r = log p - log p_old and

        log p = -w(t, mean |v(x_t) - (eps - x0)|^2),

    the loss of pretraining. A place has a ratio of its own. At the old parameters the gradient is A times that of w. An
    advantage of each position has a ratio of each; of a map of ones the gradient there is that of one number, where w
    is linear in the square ("none", "t", "t2", "x0").

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      weighting: w of the mean square y: "none" is y, "t" and "t2" times the noise level and its square, "huber" t
        sqrt(y), "ghuber" t y^(1/4) / (1/4), the paper's, and "x0" the mean square of x0_hat - x0 over its mean absolute
        value, without gradient: V-GRPO's.
      shared_noise: whether the samples of a group are noised by the same eps.
      old: where log p_old comes from: the "update", whose program computes it before the first step, for an evaluation
        more a trained place; or "current", which is log p without its gradient, and the same where batch.updates=1.

    Raises:
      ValueError: when a field is out of range.
    """

    clip_low: float = 1.0
    clip_high: float = 1.0
    weighting: str = "ghuber"
    shared_noise: bool = False
    old: str = "update"

    on_policy: ClassVar = {**Forward.on_policy, "ratio/max_deviation": "ratio_tolerance"}

    def __post_init__(self):
        for field, known in (("weighting", WEIGHTINGS), ("old", ("update", "current"))):
            if getattr(self, field) not in known:
                raise ValueError(f"objective.{field}={getattr(self, field)!r} is unknown; choose from {tuple(known)}")
        for field in ("clip_low", "clip_high"):
            if not getattr(self, field) > 0:
                raise ValueError(f"objective.{field}={getattr(self, field)} must be positive, e.g. 0.01")

    @property
    def tolerance(self) -> float:
        """Half the clip range: beyond it, rounding decides what is clipped."""
        return min(self.clip_low, self.clip_high) / 2

    def log_prob(self, v: Array, eps: Array, samples: Samples) -> Array:
        """The bound, [(n,) b, S], or [(n,) b, 1] where the advantage is one of the sample."""

        def at_place(v: Array, eps: Array, t: Array) -> Array:
            error = (v - (eps - samples.x0)).reshape(len(v), -1, v.shape[-1])
            y = jnp.square(error).mean(-1)
            y = y if samples.advantage.shape[-1] > 1 else y.mean(-1, keepdims=True)
            return -WEIGHTINGS[self.weighting](y, mean_over_positions(jnp.abs(error))[:, None], t[:, None])

        return (jax.vmap(at_place) if samples.sigma.ndim > 1 else at_place)(v, eps, samples.sigma)

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """What `Forward` checks, and log p [n, B, S or 1] of before the first step."""
        found = super().prepare(roles, samples, key, tools)
        if self.old == "current":
            return found
        x, eps = noised(samples, key, tools, self.shared_noise)
        v = roles["train"](x, tools.sampler.timestep(samples.sigma), samples.cond)
        return found | {"log_prob": self.log_prob(v, eps, samples)}

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        x, eps = noised(samples, key, tools, self.shared_noise)
        v = roles["train"](x, tools.sampler.timestep(samples.sigma), samples.cond)
        now = self.log_prob(v, eps, samples)
        change, advantage = now - samples.extra.get("log_prob", jax.lax.stop_gradient(now)), samples.advantage
        if change.ndim > 2:
            change, advantage = (samples.step_weight[..., None] * change).mean(0), advantage[0]
        ratio = jnp.exp(change)
        clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        loss = jnp.maximum(-advantage * ratio, -advantage * clipped).mean(-1)
        metrics = {
            "loss/policy": loss,
            "ratio/mean": ratio.mean(-1),
            "ratio/max_deviation": jnp.abs(ratio - 1).max(-1),
            "ratio/clip_fraction": (clipped != ratio).mean(-1),
        }
        penalty, named = tools.terms(roles, Point(x, samples.sigma, v, samples.cond))
        return loss + penalty, metrics | self.checked(samples) | named


@dataclass(frozen=True)
class VGRPO(AWM):
    """V-GRPO (arXiv 2604.23380): one ratio a sample, exp(mean_j L_old(t_j, eps_j) - L(t_j, eps_j)), over all its places
    j, with L the self-normalised loss of the clean estimate; a group shares its pairs (t_j, eps_j).

    The plan "ode" with train_choice="stratified" draws a prompt's t_j, one from each equal part of the schedule.
    """

    clip_low: float = 1e-2
    clip_high: float = 1e-2
    weighting: str = "x0"
    shared_noise: bool = True

    span: ClassVar = "window"
