"""Ratios and step weights on kappa: what many methods change of GRPO, each a line of a table.

Of a step N(mean, std^2), kappa = |dmean/dv| / std scales the policy gradient on the velocity: d log p / dv = kappa w,
with w the unit noise that was drawn. With d = (mean - mean_old) / std, of which d = kappa (v - v_old),

    log p / p_old = mean[w d] - D,   D = KL = mean[d^2] / 2,

as means over the latent's elements. Published step weights are normalised by constants that have mean 1 over the steps
that are trained (TempFlow's 2.25 at 10 steps, PCPO's 4.32); here they are, whatever the schedule.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow import kernels
from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.flow.sampler import Sampler


class Step(NamedTuple):
    """What a step is, without its policy: std and kappa of its transition, and dt = sigma - sigma_next; [n, B] each."""

    std: Array
    kappa: Array
    dt: Array


def steps_of(sampler: Sampler, rows: Rows) -> Step:
    """Of the rows of all places, [n, B]."""
    sigma, sigma_next, eta = (jnp.ravel(a) for a in (rows.sigma, rows.sigma_next, rows.eta))
    none = jnp.zeros((sigma.size, 1))
    transition = sampler.step(none, none, sigma, sigma_next, eta)
    values = transition.std, kernels.kappa(transition)
    std, kappa = (jnp.broadcast_to(a, none.shape).reshape(rows.sigma.shape) for a in values)
    return Step(std, kappa, rows.sigma - rows.sigma_next)


def moved(now: kernels.Transition, old: kernels.Transition, x_next: Array) -> tuple[Array, Array]:
    """Maps [b, S] over latent positions, averaged over channels, of w d and of D; 0 where there is no noise."""
    per = inverse(old.std)
    w, d = (x_next - old.mean) * per, (now.mean - old.mean) * per
    return tuple((value.mean(-1)).reshape(len(x_next), -1) for value in (w * d, d**2 / 2))  # type: ignore[return-value]


class Ratio(NamedTuple):
    """log ratio = scale(step) (log p / p_old + unbiased D)."""

    scale: Callable[[Step], Array]
    unbiased: bool = False


RATIOS = {
    "plain": Ratio(lambda step: jnp.ones_like(step.std)),
    # GRPO-Guard (arXiv 2510.22319): std mean[w d], whose mean is 0 at any distance and whose spread every step shares.
    # D is the sample's; the released code takes its mean over the batch.
    "guard": Ratio(lambda step: step.std, unbiased=True),
    # PCPO (arXiv 2509.25774): the credit of a step is its share of the time. kappa's place is taken by zeta dt.
    "pcpo": Ratio(lambda step: inverse(step.kappa) * step.dt * step.kappa.sum() / step.dt.sum()),
    # Reward score matching (arXiv 2604.17415), fair_clip: as far as |mean - mean_old| is the same, so is the ratio.
    "fair": Ratio(lambda step: step.std**2),
}

WEIGHTS: dict[str, Callable[[Step], Array]] = {
    "even": lambda step: jnp.ones_like(step.std),
    "flash": lambda step: inverse(step.kappa),  # Flash-GRPO (arXiv 2605.15980): equal gradients on v
    "tempflow": lambda step: step.std,  # TempFlow-GRPO (arXiv 2508.04324): by the noise that explores
    "guard": lambda step: inverse(step.dt),  # beside the ratio of its name
    "fair": lambda step: inverse(step.std**2),  # likewise
    "fair2": lambda step: inverse(step.std * step.dt),  # likewise, with guard's weight in all
}

Bound = Array | float  # of all samples, or [b, S or 1]


def clip(ratio: Array, advantage: Array, low: Bound, high: Bound, divergence: Array) -> tuple[Array, Array]:
    """PPO's: max(-A r, -A clip(r, 1 - low, 1 + high))."""
    del divergence
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return jnp.maximum(-advantage * ratio, -advantage * clipped), clipped != ratio


def hinge(ratio: Array, advantage: Array, low: Bound, high: Bound, divergence: Array) -> tuple[Array, Array]:
    """Reward score matching's: max(bound |A| - A log r, 0)."""
    del divergence
    loss = jnp.where(advantage > 0, high, low) * jnp.abs(advantage) - advantage * jnp.log(ratio)
    return jnp.maximum(loss, 0), loss < 0


def divergence(ratio: Array, advantage: Array, low: Bound, high: Bound, divergence: Array) -> tuple[Array, Array]:
    """Flow-DPPO's (arXiv 2606.11025): -A r, without what moves on in A's direction where D >= bound already."""
    left = (divergence >= jnp.where(advantage > 0, high, low)) & (advantage * (ratio - 1) > 0)
    return jnp.where(left, 0, -advantage * ratio), left


# (ratio, A, low, high, D), arrays [b, S or 1] -> loss, and where it is flat. The bound is high where A > 0, else low.
SURROGATES = {"clip": clip, "hinge": hinge, "divergence": divergence}


def inverse(values: Array) -> Array:
    """1 / values; 0 where they are 0, as of a step without noise, which teaches nothing."""
    return jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)


def normalised(weights: Array) -> Array:
    """The weights with mean 1."""
    return weights / weights.mean()
