"""Penalties that any objective takes, by name: what keeps a policy near another.

A term's name is its kind and whom it is to: "kl_base" is the KL to the policy before training, "mse_old" the squared
distance to the velocity of the average "old", "kl_rollout" the one of those to whoever drew the samples.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow import kernels
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.rl.samples import Metrics, Point, Roles, mean_over_positions

Term = Callable[[Sampler, Roles, Point], Array]  # -> [b]

DRAWN = "rollout"  # no role: what is recorded of the policy that drew the samples


def kl_to(role: str) -> Term:
    """KL(p || p_role) = |mean - mean_role|^2 / (2 std^2) of the step, averaged over the latent's elements."""

    def term(sampler: Sampler, roles: Roles, point: Point) -> Array:
        if point.transition is None:
            raise ValueError(f"terms.kl_{role}: the objective has no stochastic steps to compare; use terms.mse_{role}")
        anchor, _ = sampler.transition(roles[role], point.x, point.sigma, point.sigma_next, point.cond, point.eta)
        return mean_over_positions(kernels.kl(point.transition, anchor))

    return term


def kl_to_rollout(sampler: Sampler, roles: Roles, point: Point) -> Array:
    """(log p - log p_old)^2 / 2, where p_old drew the sample."""
    del sampler, roles
    if point.log_ratio is None:
        raise ValueError("terms.kl_rollout: the objective has no log-probs of the rollout; set it to 0")
    return 0.5 * point.log_ratio**2


def mse_to(role: str) -> Term:
    """|v - v_role|^2, averaged over the latent's elements."""

    def term(sampler: Sampler, roles: Roles, point: Point) -> Array:
        v = roles[role](point.x, sampler.timestep(point.sigma), point.cond)
        return mean_over_positions(jnp.square(point.v - v))

    return term


KINDS: dict[str, Callable[[str], Term]] = {"kl": kl_to, "mse": mse_to}


def find(name: str) -> tuple[Term, str | None]:
    """The term of a name, and the role that it is to, None for what needs no role. Raises ValueError."""
    kind, _, role = name.partition("_")
    if kind not in KINDS or not role:
        raise ValueError(f"terms.{name} is unknown: write KIND_ROLE with a kind of {', '.join(KINDS)}, as kl_base")
    if role == DRAWN:
        if kind != "kl":
            raise ValueError(f"terms.{name}: of the policy that drew the samples, log-probs alone are kept: kl_{DRAWN}")
        return kl_to_rollout, None
    return KINDS[kind](role), role


def roles_of(weights: Mapping[str, float]) -> set[str]:
    """The roles that terms with a weight are to. Raises ValueError for an unknown term or a negative weight."""
    return {role for _, role, weight in _chosen(weights).values() if role and weight}


def make_terms(weights: Mapping[str, float], sampler: Sampler) -> Callable[[Roles, Point], tuple[Array, Metrics]]:
    """The weighted sum of terms at a point, [b], and each of them by name, as metrics KIND/ROLE.

    Beyond span "step", a point has all n places, on a leading axis of each field but cond, and a term is their mean.
    """
    terms = {name: (term, weight) for name, (term, _, weight) in _chosen(weights).items() if weight}

    def at_place(roles: Roles, point: Point) -> dict[str, Array]:
        return {name: term(sampler, roles, point) for name, (term, _) in terms.items()}

    def at_every_place(roles: Roles, point: Point) -> dict[str, Array]:
        found = {role: roles[role](point.x, sampler.timestep(point.sigma), point.cond) for role in roles_of(weights)}

        def of(point: Point, found: dict[str, Array]) -> dict[str, Array]:
            return at_place({role: partial(_known, v) for role, v in found.items()}, point)

        point = point._replace(eta=jnp.broadcast_to(point.eta, point.sigma.shape), cond=None)
        return jax.tree.map(lambda value: value.mean(0), jax.vmap(of)(point, found))

    def penalise(roles: Roles, point: Point) -> tuple[Array, Metrics]:
        values = (at_every_place if point.sigma.ndim > 1 else at_place)(roles, point)
        total = sum((weight * values[name] for name, (_, weight) in terms.items()), jnp.zeros(point.sigma.shape[-1]))
        return total, {name.replace("_", "/", 1): value for name, value in values.items()}

    return penalise


def _known(v: Array, x: Array, sigma: Array, cond: Any) -> Array:
    """A velocity that is computed already."""
    return v


def _chosen(weights: Mapping[str, float]) -> dict[str, tuple[Term, str | None, float]]:
    """Of each term by its name: the term, its role and its weight."""
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"terms.{name}={weight} must not be negative; 0 turns it off")
    return {name: (*find(name), weight) for name, weight in weights.items()}
