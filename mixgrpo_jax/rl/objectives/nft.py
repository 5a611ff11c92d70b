"""DiffusionNFT (arXiv 2509.16117): good samples attract the velocity, bad ones repel it; no likelihood is needed."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow.kernels import by_sample
from mixgrpo_jax.rl.objectives.forward import Forward, noised
from mixgrpo_jax.rl.samples import Metrics, Point, Roles, Samples, Tools, by_position, mean_over_positions


@dataclass(frozen=True)
class NFT(Forward):
    """The clean sample is noised again to t. With v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v,

        L = adv_max / beta mean[r |x0+ - x0|^2 / w+ + (1 - r) |x0- - x0|^2 / w-],   x0+- = x_t - t v+-,

    where w+- = mean |x0+- - x0|, without gradient, and r = clip(A / adv_max, -1, 1) / 2 + 1/2. Its gradient in v at
    v_old is -2 t (2 r - 1) (x0_hat - x0) / w, times adv_max over the latent's elements.

    The plan is "ode", whose recorded step tells whether v_old is the velocity that drew the samples; "old" is an
    average that the config keeps.

    Attributes:
      beta: how far v+ and v- are from v_old; 1 is v itself.
      adv_max: the advantage at which a sample is all good.

    Raises:
      ValueError: when a field is out of range.
    """

    beta: float = 1.0
    adv_max: float = 5.0

    roles: ClassVar[frozenset[str]] = frozenset({"old"})
    draws: ClassVar = "old"

    def __post_init__(self):
        for field in ("beta", "adv_max"):
            if not getattr(self, field) > 0:
                raise ValueError(f"objective.{field}={getattr(self, field)} must be positive; the paper has 1 and 5")

    def over_positions(self, values: Array, x0_hat: Array, samples: Samples) -> tuple[Array, Metrics]:
        """A sample's loss [b], of its positions' [b, S, C], and metrics; x0_hat is what v says of the clean sample."""
        del x0_hat, samples
        return mean_over_positions(values), {}

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        x0, t = samples.x0, samples.sigma
        x, _ = noised(samples, key, tools)
        v, v_old = (roles[role](x, tools.sampler.timestep(t), samples.cond) for role in ("train", "old"))
        good = jnp.clip(by_position(samples.advantage, x) / self.adv_max, -1, 1) / 2 + 0.5

        def distance(towards: float) -> Array:
            error = x - by_sample(t, x) * (v_old + towards * (v - v_old)) - x0
            w = jnp.maximum(mean_over_positions(jnp.abs(jax.lax.stop_gradient(error))), 1e-5)
            return jnp.square(error) / by_sample(w, x)

        values = good * distance(self.beta) + (1 - good) * distance(-self.beta)
        loss, found = self.over_positions(values, x - by_sample(t, x) * v, samples)
        loss = self.adv_max / self.beta * loss
        penalty, named = tools.terms(roles, Point(x, t, v, samples.cond))
        metrics = {
            "loss/policy": loss,
            "velocity/moved": mean_over_positions(jnp.square(v - v_old)),
        }
        return loss + penalty, metrics | found | self.checked(samples) | named
