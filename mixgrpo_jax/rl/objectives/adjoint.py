"""Matching the velocity to a target that the reward's gradient gives: adjoint matching, and reward score matching."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow.kernels import by_sample
from mixgrpo_jax.rl.objectives.forward import Forward
from mixgrpo_jax.rl.objectives.reward_gradient import gradients
from mixgrpo_jax.rl.samples import Metrics, Point, Roles, Samples, Tools, mean_over_positions

SCHEDULES = {"constant": jnp.ones_like, "linear": lambda sigma: 1 - sigma}


@dataclass(frozen=True)
class AdjointMatching(Forward):
    """Deterministic adjoint matching (arXiv 2605.06583): at the recorded steps of the trained policy's own samples,

        L = mean |v - v*|^2,    v* = v_base - strength eta(sigma) N g,

    with g the gradient of R at a step's end, taken back from x0 by the base's velocity, and N the latent's elements.

    An approximation: known are the frozen base, the control v - v_base, its regression onto a target from the adjoint
    of the terminal reward under the current policy, and that this goes back over the last K steps; no coefficient is.
    Chosen is eta = 1, the optimal control of R(x0) - int mean |v - v_base|^2 dsigma / (2 strength): its costate is g,
    da/dsigma = -(dv_base/dx)^T a with a(0) = dR/dx0, by steps. Other regularisers are `terms`.

    With nested=0 and schedule="linear" it is the first-order estimator of reward score matching (arXiv 2604.17415).

    Attributes:
      strength: how far the reward may move the velocity.
      nested: how much of the gradient through a velocity's input is kept; 1 is the adjoint, 0 has dR/dx0 everywhere.
      schedule: eta of the noise level: "constant" is 1, "linear" is 1 - sigma.

    Raises:
      ValueError: when a field is out of range.
    """

    strength: float = 1.0
    nested: float = 1.0
    schedule: str = "constant"

    needs: ClassVar = Forward.needs | {"ode_tail", "reward_grad"}
    roles: ClassVar = frozenset({"base"})

    def __post_init__(self):
        if not self.strength > 0:
            raise ValueError(f"objective.strength={self.strength} must be positive")
        if not 0 <= self.nested <= 1:
            raise ValueError(f"objective.nested={self.nested} must be in [0, 1]; 1 is the adjoint")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"objective.schedule={self.schedule!r} is unknown; choose from {tuple(SCHEDULES)}")

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """What `Forward` checks, and v_base - v* of each place, [n, B, S, C]."""
        g = gradients(roles["base"], samples, tools, self.nested)
        scale = self.strength * SCHEDULES[self.schedule](samples.sigma) * g[0, 0].size
        return super().prepare(roles, samples, key, tools) | {"pull": jax.vmap(by_sample)(scale, g) * g}

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        x, pull, sigma = samples.rows.x, samples.extra["pull"], samples.sigma
        v, base = (roles[role](x, tools.sampler.timestep(sigma), samples.cond) for role in ("train", "base"))
        loss = mean_over_positions(jnp.square(v - base + pull))
        penalty, named = tools.terms(roles, Point(x, sigma, v, samples.cond))
        metrics = {
            "loss/policy": loss,
            "velocity/control": mean_over_positions(jnp.square(v - base)),
            "velocity/target": mean_over_positions(jnp.square(pull)),
        }
        return loss + penalty, metrics | self.checked(samples) | named
