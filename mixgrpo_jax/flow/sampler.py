"""How a step is taken: what the rollout and the update share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow import kernels, solvers
from mixgrpo_jax.flow.kernels import by_sample

# (x [B, ...], sigma [B], cond) -> v [B, ...]; its parameters are bound
Velocity = Callable[[Array, Array, Any], Array]


@dataclass(frozen=True)
class Sampler:
    """How a step is taken: static settings shared by the rollout and the update.

    Attributes:
      kernel: the stochastic step, one of `kernels.KERNELS`.
      eta: the noise of stochastic steps; a plan may scale it, step by step.
      solver: the deterministic step, one of `solvers.SOLVERS`.
      log_prob: what a log-prob is: "density", or FlowCPS's "squared_error"; see `kernels.log_prob`.
      reference_exact: reproduce two quirks of MixGRPO's released code, for comparisons: the model is fed
        floor(1000 sigma)/1000 in place of sigma, and noise is drawn in bfloat16.

    Raises:
      ValueError: a name that is unknown, or an eta that is not positive.
    """

    kernel: str = "flow"
    eta: float = 0.7
    solver: str = "euler"
    log_prob: kernels.LogProb = "density"
    reference_exact: bool = False

    def __post_init__(self):
        for field, known in (("kernel", kernels.KERNELS), ("solver", solvers.SOLVERS), ("log_prob", kernels.LOG_PROBS)):
            if getattr(self, field) not in known:
                raise ValueError(f"sampler.{field}={getattr(self, field)!r} is unknown; choose from {sorted(known)}")
        if not self.eta > 0:
            raise ValueError(f"sampler.eta={self.eta} leaves the window without noise; choose a positive value")

    def timestep(self, sigma: Array) -> Array:
        """What the model is told of sigma."""
        return jnp.floor(1000 * sigma) / 1000 if self.reference_exact else sigma

    def transition(
        self, velocity: Velocity, x: Array, sigma: Array, sigma_next: Array, cond: Any, eta: Array | float = 1.0
    ) -> tuple[kernels.Transition, Array]:
        """p(x' | x) of the step, and the velocity [B, ...] it rests on. The only place where the two meet.

        sigma, sigma_next are [B] or scalars, and so is eta, in units of the sampler's own.
        """
        v = velocity(x, self.timestep(sigma), cond).astype(jnp.float32)
        return self.step(x, v, sigma, sigma_next, eta), v

    def step(self, x: Array, v: Array, sigma: Array, sigma_next: Array, eta: Array | float = 1.0) -> kernels.Transition:
        """p(x' | x) of the step with velocity v."""
        return kernels.KERNELS[self.kernel](x, v, sigma, sigma_next, self.eta * eta)

    def log_prob_map(self, transition: kernels.Transition, x_next: Array) -> Array:
        """Log-prob of `x_next` by latent position: averaged over the channels alone, [B, ..., C] -> [B, S].

        S is the number of positions, whatever axes they stand in; it is 1 for [B, C].
        """
        value = kernels.log_prob(transition, x_next, self.log_prob).mean(-1)
        return value.reshape(len(value), -1)

    def normal(self, key: Array, ids: Array, shape: tuple[int, ...]) -> Array:
        """Standard normal noise of each of N addresses under a key: [N] -> [N, *shape] fp32."""
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
        return self.normal_of(keys, shape)

    def normal_of(self, keys: Array, shape: tuple[int, ...]) -> Array:
        """One standard normal array per key: [N] keys -> [N, *shape] fp32."""
        dtype = jnp.bfloat16 if self.reference_exact else jnp.float32
        return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys).astype(jnp.float32)

    def noised(self, key: Array, ids: Array, x0: Array, sigma: Array) -> tuple[Array, Array]:
        """`x_sigma = (1 - sigma) x0 + sigma eps` of samples [B, ...] at sigma [B], and eps, by their addresses [B]."""
        eps, level = self.normal(key, ids, x0.shape[1:]), by_sample(sigma, x0)
        return (1 - level) * x0 + level * eps, eps
