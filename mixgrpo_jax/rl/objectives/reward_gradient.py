"""Gradients of rewards that go back through the last steps of a deterministic trajectory, and into the parameters.

A sample is trained at n places of its trajectory. From each place, one step of Euler's, a leap x + d v(x), leads to the
next place, and from the last to the clean sample, at which the collector finds dR/dx0. The gradient at the end of a
leap is the one at the end of the next leap, taken back through it:

    g_n = dR/dx0,    g_(i-1) = g_i + nested d_i (dv/dx at x_i)^T g_i,    d_i = sigma_(i+1) - sigma_i,  d_n = -sigma_n.

`prepare` finds all g once an iteration, by the parameters of before its updates. So rewards and decoder are no part of
the update, whose memory is that of one row; each place but the first costs it an evaluation and its gradient in x.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow.kernels import by_sample
from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.flow.sampler import Velocity
from mixgrpo_jax.rl.objectives.forward import Forward
from mixgrpo_jax.rl.samples import Metrics, Point, Roles, Samples, Tools, mean_over_positions


def leaps(samples: Samples) -> Array:
    """d of each place, [n, B]."""
    return jnp.concatenate([samples.sigma[1:], jnp.zeros_like(samples.sigma[:1])]) - samples.sigma


def gradients(role: Velocity, samples: Samples, tools: Tools, nested: float = 1.0) -> Array:
    """g of each place, [n, B, S, C], through a role's velocity. Without `nested`, all are dR/dx0, and cost nothing."""
    found, d = [samples.extra["reward_grad"][-1]], leaps(samples)
    for i in reversed(range(1, len(d))):  # unrolled: n is small, and calls are counted as they are traced

        def velocity(x: Array, sigma: Array = samples.sigma[i]) -> Array:
            return role(x[None], tools.sampler.timestep(sigma)[None], samples.cond)[0]

        g = found[0]
        if nested:
            _, back = jax.vjp(velocity, samples.rows.x[i])
            g = g + nested * by_sample(d[i], g) * back(g)[0]
        found.insert(0, g)
    return jnp.stack(found)


def drawn_with(rows: Rows) -> Array:
    """The velocity of recorded steps of Euler's, [b, S, C]."""
    return (rows.x_next - rows.x) / by_sample(rows.sigma_next - rows.sigma, rows.x)


@dataclass(frozen=True)
class DRaFT(Forward):
    """DRaFT-K (arXiv 2309.17400): the gradient of -R(x0) through the last K steps of the sampler, which the plan
    "tail" records. The loss of a place is

        L_i = -n <d_i g_i, v(x_i) - v of the rollout>,

    by how much less the reward grows, to first order; the mean over places has at the first update the gradient of -R.
    At later updates of an iteration, g is that of before. A plan whose trajectories `jump` to the clean sample makes it
    ReFL; nested=0 drops how a velocity depends on those before it, as DRTune does (arXiv 2405.00760).

    Attributes:
      margin: of the loss max(margin - R, 0): a sample whose R is at least this teaches nothing. None is -R.
      nested: how much of the gradient through a velocity's input is kept; 1 is all.

    Raises:
      ValueError: when a field is out of range.
    """

    margin: float | None = None
    nested: float = 1.0

    needs: ClassVar = Forward.needs | {"ode_tail", "reward_grad"}

    def __post_init__(self):
        if not 0 <= self.nested <= 1:
            raise ValueError(f"objective.nested={self.nested} must be in [0, 1]; 1 keeps the whole gradient")

    def weight(self, samples: Samples) -> Array:
        """Of each sample, [B]."""
        reward = samples.extra["reward"][-1]
        return jnp.ones_like(reward) if self.margin is None else (reward < self.margin).astype(reward.dtype)

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """What `Forward` checks, and n d g of each place, by the sample's weight: [n, B, S, C]."""
        g = gradients(roles["train"], samples, tools, self.nested)
        scale = len(g) * leaps(samples) * self.weight(samples)
        return super().prepare(roles, samples, key, tools) | {"pull": jax.vmap(by_sample)(scale, g) * g}

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        x, pull = samples.rows.x, samples.extra["pull"]
        v = roles["train"](x, tools.sampler.timestep(samples.sigma), samples.cond)
        loss = -(pull * (v - drawn_with(samples.rows))).reshape(len(x), -1).sum(-1)
        penalty, named = tools.terms(roles, Point(x, samples.sigma, v, samples.cond))
        size = jnp.sqrt(jnp.square(pull).reshape(len(x), -1).sum(-1))
        return loss + penalty, {"loss/policy": loss, "gradient/pull": size} | self.checked(samples) | named


@dataclass(frozen=True)
class LeapAlign(DRaFT):
    """LeapAlign (arXiv 2604.15311): two places, drawn anew from the whole trajectory, in place of many steps.

    A leap is a prediction that lands beside the trajectory. Values stay on it, and gradients pass as through the leap,
    of which that through the velocity's input is discounted by `nested`. A sample weighs 1 / sum_i max(e_i, tau) with
    e_i the mean absolute error of leap i.

    Attributes:
      nested: alpha.
      tau: errors of leaps count as at least so much.
    """

    nested: float = 0.3
    tau: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"objective.tau={self.tau} must be positive, as 0.1, for leaps without an error")

    def weight(self, samples: Samples) -> Array:
        """Of each sample, [B]."""
        x, d = samples.rows.x, leaps(samples)
        landed = x + jax.vmap(by_sample)(d, x) * jax.vmap(drawn_with)(samples.rows)
        error = jax.vmap(mean_over_positions)(jnp.abs(landed - jnp.concatenate([x[1:], samples.x0[None]])))
        return super().weight(samples) / jnp.maximum(error, self.tau).sum(0)
