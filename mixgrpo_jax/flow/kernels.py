"""Stochastic steps: Gaussian transitions p(x' | x) that keep the flow's marginals and make its samples explorable.

A kernel's signature is `Kernel`'s. Everything is computed in float32. eta scales the noise, and eta = 0 is the Euler
step of the ODE.

Sampling, log-densities, divergences and the policy-gradient scale are derived from the `Transition` alone.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Transition(NamedTuple):
    """N(mean, std^2), elementwise independent, with a mean that is affine in the velocity.

    `mean` has the shape of x; `std` and `dmean_dv`, the derivative of the mean in the velocity, broadcast against it.
    A `std` of 0 is a deterministic step.
    """

    mean: jax.Array
    std: jax.Array
    dmean_dv: jax.Array


class Kernel(Protocol):
    """A stochastic step."""

    def __call__(
        self,
        x: ArrayLike,
        v: ArrayLike,
        sigma: ArrayLike,
        sigma_next: ArrayLike,
        eta: ArrayLike,
        sigma_max: ArrayLike | None = None,
    ) -> Transition:
        """p(x' | x) of the step from sigma to sigma_next.

        Args:
          x, v: of any shape [B, ...].
          sigma, sigma_next, eta: scalars, [B], or of a shape that broadcasts against x; 0 <= sigma_next < sigma <= 1.
          sigma_max: what stands for sigma where `flow_sde` would divide by 0; no other kernel reads it.
        """


LogProb = Literal["density", "squared_error"]
LOG_PROBS: tuple[LogProb, ...] = get_args(LogProb)


def kernel(step: Callable[..., Transition]) -> Kernel:
    """The kernel of a function `(x, v, sigma, sigma_next, eta, sigma_max)` of float32 arrays that broadcast."""

    @functools.wraps(step)
    def call(x, v, sigma, sigma_next, eta, sigma_max=None):
        x, v = _float32(x, v)
        sigma, sigma_next = _float32(by_sample(sigma, x), by_sample(sigma_next, x))
        return step(x, v, sigma, sigma_next, by_sample(eta, x), sigma_max)

    return call


def by_sample(value: Any, x: jax.Array) -> Any:
    """A scalar for each sample, [B], in a shape that broadcasts against x [B, ...]; others as they are."""
    return jnp.reshape(value, (-1, *[1] * (x.ndim - 1))) if jnp.ndim(value) == 1 else value


@kernel
def flow_sde(x, v, sigma, sigma_next, eta, sigma_max):
    """Euler-Maruyama step of the SDE with diffusion `g = eta sqrt(sigma / (1 - sigma))`, as in Flow-GRPO.

    g diverges at sigma = 1. There `sigma_max`, the schedule's second sigma, stands for sigma in the denominator; None
    means `sigma_next`, the same number at a schedule's first step, which then has std = eta exactly.
    """
    regular = jnp.where(sigma < 1, sigma, sigma_next if sigma_max is None else sigma_max)
    return _euler_maruyama(x, v, sigma, sigma_next, eta * jnp.sqrt(sigma / (1 - regular)))


@kernel
def dance_sde(x, v, sigma, sigma_next, eta, sigma_max):
    """Euler-Maruyama step of the SDE with constant diffusion `g = eta`, as in DanceGRPO."""
    return _euler_maruyama(x, v, sigma, sigma_next, eta)


@kernel
def linear_sde(x, v, sigma, sigma_next, eta, sigma_max):
    """Euler-Maruyama step of the SDE with diffusion `g = eta sigma`, as Flow-GRPO and Flash-GRPO have it for Wan."""
    return _euler_maruyama(x, v, sigma, sigma_next, eta * sigma)


@kernel
def cps(x, v, sigma, sigma_next, eta, sigma_max):
    """Coefficients-preserving sampling (FlowCPS): `rho = cos(eta pi / 2)`, eta in [0, 1], the same at every step."""
    angle = eta * (math.pi / 2)
    return _ddim(x, v, sigma, sigma_next, jnp.cos(angle), jnp.sin(angle))


@kernel
def precise(x, v, sigma, sigma_next, eta, sigma_max):
    """The SDE of `flow_sde` solved exactly for a frozen clean estimate: `rho = R^(eta^2 / 2)`.

    `R = sigma' (1 - sigma) / (sigma (1 - sigma'))`, so equal steps of log-SNR explore equally. At sigma = 1, R = 0: the
    noise is drawn afresh.
    """
    finite = (sigma < 1) & (sigma_next > 0)
    start, end = jnp.where(finite, sigma, 0.5), jnp.where(finite, sigma_next, 0.25)
    integral = jax.scipy.special.logit(start) - jax.scipy.special.logit(end)
    return _frozen_x0(x, v, sigma, sigma_next, eta, jnp.where(finite, integral, _UNBOUNDED))


@kernel
def dance_precise(x, v, sigma, sigma_next, eta, sigma_max):
    """The SDE of `dance_sde` solved exactly for a frozen clean estimate.

    `rho = exp(-eta^2 (1/sigma' - 1/sigma) / 2)`.
    """
    end = jnp.where(sigma_next > 0, sigma_next, 0.5)
    integral = jnp.where(sigma_next > 0, 1 / end - 1 / sigma, _UNBOUNDED)
    return _frozen_x0(x, v, sigma, sigma_next, eta, integral)


KERNELS: dict[str, Kernel] = {
    "flow": flow_sde,
    "dance": dance_sde,
    "linear": linear_sde,
    "cps": cps,
    "precise": precise,
    "dance_precise": dance_precise,
}


def sample(transition: Transition, noise: ArrayLike) -> jax.Array:
    """`x' = mean + std noise`, float32 of the shape of x, for standard normal noise of that shape."""
    return transition.mean + transition.std * jnp.asarray(noise, jnp.float32)


def log_prob(transition: Transition, x_next: ArrayLike, kind: LogProb = "density") -> jax.Array:
    """Log-probability of `x_next`, one value for each element (reduce it as the objective requires).

    "density" is the normal log-density, `-(x' - mean)^2 / (2 std^2) - log std - log sqrt(2 pi)`; "squared_error" is
    `-(x' - mean)^2`, FlowCPS's score, which is not a density. A deterministic step has 0 and no gradient.

    Raises:
      ValueError: for another kind.
    """
    if kind not in LOG_PROBS:
        raise ValueError(f"kind={kind!r} is not a log-probability; choose one of {LOG_PROBS}")
    value = -jnp.square(jnp.asarray(x_next, jnp.float32) - transition.mean)
    if kind == "density":
        std = _divisor(transition.std)
        value = value / (2 * std**2) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    return jnp.where(transition.std > 0, value, 0.0)


def kl(p: Transition, q: Transition) -> jax.Array:
    """KL(p || q) of each element for transitions of one std, `(mean_p - mean_q)^2 / (2 std^2)`; 0 where std is 0."""
    return jnp.where(p.std > 0, jnp.square(p.mean - q.mean) / (2 * _divisor(p.std) ** 2), 0.0)


def kappa(transition: Transition) -> jax.Array:
    """Scale of the policy gradient on the velocity, `|dmean_dv| / std`; 0 where std is 0.

    With w the unit noise that was drawn, d log p / dv = +-kappa w; a velocity that moves by dv moves the policy by
    `KL = (kappa dv)^2 / 2`.
    """
    return jnp.where(transition.std > 0, jnp.abs(transition.dmean_dv) / _divisor(transition.std), 0.0)


# Stands for an infinite integral: exp(-eta^2 _UNBOUNDED) is 0 for any eta in use, and eta = 0 still gives rho = 1.
_UNBOUNDED = 1e30


def _float32(*values: ArrayLike) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(value, jnp.float32) for value in values)


def _divisor(std: jax.Array) -> jax.Array:
    # Selecting after the division would leave 0 * inf = NaN in the gradient.
    return jnp.where(std > 0, std, 1.0)


def _euler_maruyama(x, v, sigma, sigma_next, g) -> Transition:
    """`dx = (v + g^2 / (2 sigma) (x + (1 - sigma) v)) dsigma + g dW`, with dsigma < 0 and W of unit rate in -sigma."""
    step = sigma_next - sigma
    correction = g**2 / (2 * sigma)
    dmean_dv = step * (1 + correction * (1 - sigma))
    return Transition(x * (1 + correction * step) + v * dmean_dv, g * jnp.sqrt(-step), dmean_dv)


def _ddim(x, v, sigma, sigma_next, rho, noise_fraction) -> Transition:
    """`x' = (1 - sigma') x0_hat + sigma' (rho eps_hat + noise_fraction w)`, where noise_fraction^2 = 1 - rho^2."""
    x0_hat, eps_hat = x - sigma * v, x + (1 - sigma) * v
    mean = (1 - sigma_next) * x0_hat + sigma_next * rho * eps_hat
    dmean_dv = sigma_next * rho * (1 - sigma) - (1 - sigma_next) * sigma
    return Transition(mean, sigma_next * noise_fraction, dmean_dv)


def _frozen_x0(x, v, sigma, sigma_next, eta, integral) -> Transition:
    """`rho = exp(-eta^2 integral / 2)`, where eta^2 integral is that of g(s)^2 / s^2 from sigma' to sigma."""
    exponent = eta**2 * integral
    return _ddim(x, v, sigma, sigma_next, jnp.exp(-exponent / 2), jnp.sqrt(-jnp.expm1(-exponent)))
