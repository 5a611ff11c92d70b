"""Draw samples: a deterministic prefix, a stochastic window, a deterministic suffix; each a `lax.scan`.

One compiled program serves every window position and suffix length: what moves is data (`Plan`), what is static is the
trajectory's and the window's length. Steps that the plan leaves out are gated by a scalar `lax.cond` and cost nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from mixgrpo_jax.flow import kernels, solvers
from mixgrpo_jax.flow.plans import Plan

# (params, x [B, ...], timestep scalar, cond) -> v [B, ...]
Velocity = Callable[[Any, Array, Array, Any], Array]


@dataclass(frozen=True)
class Sampler:
    """How a step is taken: static settings shared by the rollout and the update.

    `reference_exact` reproduces two quirks of MixGRPO's released code, for comparisons: the model is fed
    floor(1000 sigma)/1000 in place of sigma, and noise is drawn in bfloat16.
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
        self, velocity: Velocity, params: Any, x: Array, sigma: Array, sigma_next: Array, cond: Any
    ) -> tuple[kernels.Transition, Array]:
        """p(x' | x) under `params`, and the velocity it rests on. The only place where the two meet."""
        v = velocity(params, x, self.timestep(sigma), cond).astype(jnp.float32)
        return kernels.KERNELS[self.kernel](x, v, sigma, sigma_next, self.eta), v

    def log_prob_map(self, transition: kernels.Transition, x_next: Array) -> Array:
        """Log-prob of `x_next` by latent position: averaged over the channels alone, [B, S, C] -> [B, S]."""
        return kernels.log_prob(transition, x_next, self.log_prob).mean(-1)

    def normal(self, keys: Array, shape: tuple[int, ...]) -> Array:
        """One standard normal array per key: [B] keys -> [B, *shape] fp32."""
        dtype = jnp.bfloat16 if self.reference_exact else jnp.float32
        return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys).astype(jnp.float32)


class Rows(NamedTuple):
    """The window's steps, in order; w of them, for B samples.

    x, x_next: [w, B, S, C]; log_prob: [w, B, S], a map over latent positions; sigma, sigma_next: [w].
    """

    x: Array
    x_next: Array
    log_prob: Array
    sigma: Array
    sigma_next: Array


class Rollout(NamedTuple):
    """x0 [B, S, C], the window's rows, and the model evaluations executed (in samples; int32)."""

    x0: Array
    rows: Rows
    evaluations: Array


def initial_noise(sampler: Sampler, key: Array, ids: Array, shape: tuple[int, ...]) -> Array:
    """Noise of the samples (or, where a group shares it, of the prompts) with these ids: [N] -> [N, *shape]."""
    return sampler.normal(jax.vmap(partial(jax.random.fold_in, key))(ids), shape)


def rollout(
    velocity: Velocity,
    params: Any,
    plan: Plan,
    noise: Array,
    cond: Any,
    key: Array,
    *,
    sampler: Sampler,
    window_length: int,
    group_size: int = 1,
) -> Rollout:
    """Integrate from noise to data; the plan's window is stochastic.

    The prefix is deterministic, so samples of one noise and one prompt are one sample until the window: it runs once
    for each of the P rows of `noise`, which then branch into `group_size` samples each. Where every sample has its own
    noise, `noise` and `cond` hold all of them and `group_size` is 1.

    Args:
        noise: x at sigma 1, [P, S, C].
        cond: pytree of arrays with leading axis P.
        key: of this iteration; the noise of sample b at step i is addressed by (key, b, i).
    Returns:
        B = P * group_size samples, group by group.
    """
    num_steps = plan.sigmas.shape[0] - 1
    rest = num_steps - window_length  # the most steps that prefix or suffix can have
    x = noise.astype(jnp.float32)
    carry = (x, solvers.empty_history(x), jnp.int32(0))

    def deterministic(carry, cond, solver, sigmas, orders, count):
        def move(carry, step):
            (x, history, nfe), (sigma, sigma_next, order) = carry, step
            v = velocity(params, x, sampler.timestep(sigma), cond).astype(jnp.float32)
            history, x = solver(history, x, v, sigma, sigma_next, order)
            return x, history, nfe + x.shape[0]

        def gated(carry, step):
            index, *step = step
            return lax.cond(index < count, move, lambda carry, _: carry, carry, tuple(step)), None

        steps = (jnp.arange(rest), sigmas[:rest], sigmas[1 : rest + 1], orders[:rest])
        return lax.scan(gated, carry, steps)[0]

    def stochastic(carry, step):
        (x, history, nfe), (index, sigma, sigma_next) = carry, step
        transition, v = sampler.transition(velocity, params, x, sigma, sigma_next, cond)
        keys = jax.vmap(lambda b: jax.random.fold_in(jax.random.fold_in(key, b), index))(jnp.arange(x.shape[0]))
        x_next = kernels.sample(transition, sampler.normal(keys, x.shape[1:]))
        row = Rows(x, x_next, sampler.log_prob_map(transition, x_next), sigma, sigma_next)
        return (x_next, solvers.push(history, x, v, sigma), nfe + x.shape[0]), row

    carry = deterministic(carry, cond, solvers.euler, plan.sigmas, jnp.ones(num_steps, jnp.int32), plan.start)

    x, history, nfe = carry
    carry = (jnp.repeat(x, group_size, axis=0), solvers.repeat(history, group_size), nfe)
    cond = jax.tree.map(lambda a: jnp.repeat(a, group_size, axis=0), cond)
    steps = plan.start + jnp.arange(window_length)
    carry, rows = lax.scan(stochastic, carry, (steps, plan.sigmas[steps], plan.sigmas[steps + 1]))

    solver = solvers.SOLVERS[sampler.solver]
    carry = deterministic(carry, cond, solver, plan.suffix_sigmas, plan.suffix_order, plan.suffix_steps)
    return Rollout(carry[0], rows, carry[2])


def integrate(
    velocity: Velocity,
    params: Any,
    sigmas: Array,
    orders: Array,
    noise: Array,
    cond: Any,
    *,
    solver: str = "euler",
) -> Array:
    """Deterministic sampling over a whole grid, for evaluation and inference: noise [B, S, C] -> x0 [B, S, C]."""

    def move(carry, step):
        (history, x), (sigma, sigma_next, order) = carry, step
        v = velocity(params, x, sigma, cond).astype(jnp.float32)
        return solvers.SOLVERS[solver](history, x, v, sigma, sigma_next, order), None

    x = noise.astype(jnp.float32)
    return lax.scan(move, (solvers.empty_history(x), x), (sigmas[:-1], sigmas[1:], orders))[0][1]
