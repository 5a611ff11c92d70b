"""Deterministic steps of the flow's ODE, dx/dsigma = v: Euler, and DPM-Solver++ of orders 1 to 3.

Every solver is `(history, x, v, sigma, sigma_next, order) -> (history, x_next)`: x and v are [B, ...]; the sigmas, with
0 <= sigma_next < sigma <= 1, and the order, an int32 in 1..3, are scalars or [B]; all may be traced. The state is
float32, or float64 when x is.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mixgrpo_jax.flow.kernels import by_sample


class History(NamedTuple):
    """The clean estimates of the last two steps, newest first: what a multistep solver remembers.

    `x0` holds two arrays of the shape of x, `sigma` the noise levels where they were made, and `num_held` (int32, 0..2)
    how many of them are real; both have one value a sample, [B, 1, ...].
    """

    x0: tuple[jax.Array, jax.Array]
    sigma: tuple[jax.Array, jax.Array]
    num_held: jax.Array


Solver = Callable[..., tuple[History, jax.Array]]


def empty_history(x: jax.Array) -> History:
    """The history before the first step of a trajectory of x."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    blank, each = jnp.zeros(x.shape, dtype), (len(x), *[1] * (x.ndim - 1))
    return History((blank, blank), (jnp.ones(each, dtype),) * 2, jnp.zeros(each, jnp.int32))


def push(history: History, x: ArrayLike, v: ArrayLike, sigma: ArrayLike) -> History:
    """Remembers `x0_hat = x - sigma v` and forgets the oldest estimate."""
    x, v, sigma = _state(x, v, sigma)
    num_held = jnp.minimum(history.num_held + 1, 2)
    return History((x - sigma * v, history.x0[0]), (sigma, history.sigma[0]), num_held)


def euler(
    history: History, x: ArrayLike, v: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike, order: ArrayLike
) -> tuple[History, jax.Array]:
    """`x' = x + (sigma' - sigma) v`, whatever the order asked for."""
    history = push(history, x, v, sigma)
    x, v, sigma, sigma_next = _state(x, v, sigma, sigma_next)
    return history, x + (sigma_next - sigma) * v


def dpm_solver(
    history: History,
    x: ArrayLike,
    v: ArrayLike,
    sigma: ArrayLike,
    sigma_next: ArrayLike,
    order: ArrayLike,
    variant: Literal["midpoint", "heun"] = "midpoint",
) -> tuple[History, jax.Array]:
    """Multistep DPM-Solver++ on the clean estimate x0_hat, for alpha = 1 - sigma and lambda = log(alpha / sigma).

    The exact solution is `x' = (sigma'/sigma) x + sigma' int e^lambda x0_hat dlambda`. With u the fraction of the step
    h = lambda' - lambda, x0_hat is extrapolated as `D0 + D1 u + D2 u^2` through the last estimates, and

        x' = (sigma'/sigma) x + I0 D0 + I1 D1 + I2 D2,   I0 = 1 - sigma'/sigma,   Ik = alpha' - (k / h) I(k-1)

    Order 1 keeps D0 and is the Euler step; order 2 keeps D1, with I1 ("heun") or I0 / 2 ("midpoint"). The order is
    limited to what the history holds, and is 1 when sigma' = 0, which gives x0_hat. I2 is exact, which makes order 3
    third order; the multistep formula in common use has I2 / 2 there, and converges with order 2.

    Raises:
      ValueError: for another variant.
    """
    if variant not in ("midpoint", "heun"):
        raise ValueError(f"variant={variant!r} is not a DPM-Solver++ variant; use 'midpoint' or 'heun'")
    x, v, sigma, sigma_next = _state(x, v, sigma, sigma_next)
    later, x_euler = euler(history, x, v, sigma, sigma_next, order)
    h, r0, r1 = _spacing(history, sigma, sigma_next)
    slope = (later.x0[0] - history.x0[0]) / r0
    curvature = (slope - (history.x0[0] - history.x0[1]) / r1) / (r0 + r1)

    alpha_next = 1 - sigma_next
    i0 = 1 - sigma_next / sigma
    i1 = alpha_next - i0 / h
    i2 = alpha_next - 2 * i1 / h
    order = jnp.where(sigma_next > 0, jnp.minimum(by_sample(order, x), history.num_held + 1), 1)
    second = i0 / 2 if variant == "midpoint" else i1
    slope_weight = jnp.select([order == 1, order == 2], [0.0, second], i1)
    curvature_weight = jnp.where(order == 3, i2 + r0 * i1, 0.0)
    return later, x_euler + slope_weight * slope + curvature_weight * curvature


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "dpm_midpoint": partial(dpm_solver, variant="midpoint"),
    "dpm_heun": partial(dpm_solver, variant="heun"),
}

# Stands for the infinite log-SNR at sigma = 0 and 1: finite, so that what a step does not use has no NaN in its
# gradient, and so large that a slope across it vanishes.
_UNBOUNDED = 1e9


def _log_snr(sigma: jax.Array) -> jax.Array:
    """lambda = log((1 - sigma) / sigma)."""
    finite = (sigma > 0) & (sigma < 1)
    limit = jnp.where(sigma > 0, -_UNBOUNDED, _UNBOUNDED)
    return jnp.where(finite, -jax.scipy.special.logit(jnp.where(finite, sigma, 0.5)), limit)


def _spacing(history: History, sigma: jax.Array, sigma_next: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step h in lambda, and the two gaps before it in units of h (1 where the history has no estimate)."""
    after, now, last, oldest = map(_log_snr, (sigma_next, sigma, *history.sigma))
    h = after - now
    r0 = jnp.where(history.num_held >= 1, (now - last) / h, 1.0)
    r1 = jnp.where(history.num_held >= 2, (last - oldest) / h, 1.0)
    return h, r0, r1


def _state(x: ArrayLike, v: ArrayLike, *sigmas: ArrayLike) -> tuple[jax.Array, ...]:
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
    x, v = jnp.asarray(x, dtype), jnp.asarray(v, dtype)
    each = (len(x), *[1] * (x.ndim - 1))
    return x, v, *(jnp.broadcast_to(jnp.asarray(by_sample(sigma, x), dtype), each) for sigma in sigmas)
