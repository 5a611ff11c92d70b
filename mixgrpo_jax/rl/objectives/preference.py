"""Samples of a group against each other, by the loss of pretraining: DPO (with Diffusion-APO), DGPO and CRD.

The loss of a sample at a noise level is e = |v(x_t) - (eps - x0)|^2, averaged over the latent's elements; what a
reference has less of it is the sample's implicit reward. Each call sees whole groups at all their places, whose losses
are averaged: a pair is of one place. The file is long because the three share all but `by_place`, and stand together.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow.kernels import by_sample
from mixgrpo_jax.rl.objectives.forward import Forward, noised
from mixgrpo_jax.rl.samples import Metrics, Point, Roles, Samples, Tools


class Preference(Forward):
    """What the three share: the roles' velocities at the same noise, and sums over a group."""

    span: ClassVar = "group"

    def pairs(self, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Array]:
        """x_t and eps [n, b, S, C], which a group shares."""
        return noised(samples, key, tools, shared=True)

    def by_place(self, errors: dict[str, Array], advantage: Array, mates: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] at a place, from v - (eps - x0) [b, S, C] of every role but the drawing one.

        advantage is [b], and mates [b, b], 1 where two samples with a weight are of one group.
        """
        raise NotImplementedError

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        x, eps = self.pairs(samples, key, tools)
        asked = x, tools.sampler.timestep(samples.sigma), samples.cond
        v = {role: roles[role](*asked) for role in ("train", *sorted(self.roles - {self.draws}))}
        there = samples.weight > 0
        mates = ((samples.group[:, None] == samples.group) & there[:, None] & there).astype(jnp.float32)

        def at_place(v: dict[str, Array], eps: Array, advantage: Array) -> tuple[Array, Metrics]:
            errors = {role: own - (eps - samples.x0) for role, own in v.items()}
            return self.by_place(errors, advantage.mean(-1), mates, tools)

        loss, metrics = jax.vmap(at_place)(v, eps, samples.advantage)
        loss, metrics = (samples.step_weight * loss).mean(0), {name: m.mean(0) for name, m in metrics.items()}
        penalty, named = tools.terms(roles, Point(x, samples.sigma, v["train"], samples.cond))
        return loss + penalty, metrics | {"loss/policy": loss} | self.checked(samples) | named


def mean_square(error: Array) -> Array:
    """e, [b]."""
    return jnp.square(error).reshape(len(error), -1).mean(-1)


def over_mates(values: Array, mates: Array) -> Array:
    """The mean of [b] over each sample's group, [b]."""
    return mates @ values / jnp.maximum(mates.sum(1), 1)


def _positive(settings: Preference, *fields: str) -> None:
    for field in fields:
        if not getattr(settings, field) > 0:
            raise ValueError(f"objective.{field}={getattr(settings, field)} must be positive")


@dataclass(frozen=True)
class DPO(Preference):
    """Online DPO of diffusion (arXiv 2311.12908): L = -log sigmoid(beta / 2 (d_l - d_w)), d = e - e_base, of every pair
    of a group in which w has the larger advantage; the mean over pairs, and over groups. With the selection "extremes"
    and a count of 1, the best and the worst of a group are its pair.

    Diffusion-APO (arXiv 2605.07503) is noise="rollout", an approximation: published is that noise and times come from
    the paths of inference and not from independent draws, and no formula. Here eps is the noise that the sample was
    drawn from, and x_t lies on the line between them; its anchoring, offline and distillation parts are left out. A
    small policy did not learn to draw brighter pictures so; by DPO it did. The noise of a sample leads back to it.

    Attributes:
      beta: how sharp preferences are, of errors that are averaged over elements.
      noise: the eps of a pair: "shared" by its group, each sample's "own", or the "rollout"'s first state.

    Raises:
      ValueError: when a field is out of range.
    """

    beta: float = 2000.0
    noise: str = "shared"

    roles: ClassVar[frozenset[str]] = frozenset({"base"})

    def __post_init__(self):
        _positive(self, "beta")
        if self.noise not in ("shared", "own", "rollout"):
            raise ValueError(f"objective.noise={self.noise!r} is unknown; choose 'shared', 'own' or 'rollout'")

    def pairs(self, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Array]:
        """x_t and eps, [n, b, S, C]."""
        if self.noise != "rollout":
            return noised(samples, key, tools, shared=self.noise == "shared")
        eps = samples.rows.x  # the recorded step is the first
        return jax.vmap(lambda eps, t: samples.x0 + by_sample(t, eps) * (eps - samples.x0))(eps, samples.sigma), eps

    def by_place(self, errors: dict[str, Array], advantage: Array, mates: Array, tools: Tools) -> tuple[Array, Metrics]:
        """See `Preference.by_place`."""
        d = mean_square(errors["train"]) - mean_square(errors["base"])
        wins = mates * (advantage[:, None] > advantage)
        loss = -jax.nn.log_sigmoid(self.beta / 2 * (d - d[:, None]))  # [winner, loser]
        share = mates.sum(1) / jnp.maximum((mates @ wins).sum(1), 1)  # a group's samples over its pairs
        right = (d[:, None] < d) * wins
        return share * (wins * loss).sum(1), {"preference/right": share * right.sum(1), "reward/implicit": -d}


@dataclass(frozen=True)
class DGPO(Preference):
    """Direct group preference optimisation (arXiv 2510.08425): L = sigmoid(s) A e, where s = mean_group(beta A (e -
    e_base)) has no gradient. Where exp(e_old - e) is past the clip on the side that A moves it to, e has none.

    Attributes:
      beta: how sharp the group's preference is.
      clip: how far exp(e_old - e) may be from 1; "old" is an average that the config keeps.

    Raises:
      ValueError: when a field is out of range.
    """

    beta: float = 10.0
    clip: float = 0.05

    roles: ClassVar[frozenset[str]] = frozenset({"base", "old"})

    def __post_init__(self):
        _positive(self, "beta", "clip")

    def by_place(self, errors: dict[str, Array], advantage: Array, mates: Array, tools: Tools) -> tuple[Array, Metrics]:
        """See `Preference.by_place`."""
        e, old, base = (mean_square(errors[role]) for role in ("train", "old", "base"))
        weight = jax.nn.sigmoid(over_mates(self.beta * advantage * (e - base), mates))
        ratio = jnp.exp(old - e)
        past = jnp.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
        loss = jax.lax.stop_gradient(weight) * advantage * jnp.where(past, jax.lax.stop_gradient(e), e)
        return loss, {"ratio/clip_fraction": past.astype(jnp.float32), "reward/implicit": base - e}


@dataclass(frozen=True)
class CRD(Preference):
    """Centred reward distillation (arXiv 2603.14128): L = adv_max / beta (beta (r - mean r) - (R - mean R))^2.

    Means are over the group, that of r without gradient, the reward is R = clip(A / adv_max, -1, 1) / 2 + 1/2, and the
    implicit one

        r = mean(e_old^2) / w_old - mean(e^2) / w,   e = v - (eps - x0), w = mean |e| without gradient.

    "old" and "sampling", which draws the samples, are averages that the config keeps.

    Attributes:
      beta: the scale of the implicit reward.
      adv_max: the advantage at which a sample is all good.

    Raises:
      ValueError: when a field is out of range.
    """

    beta: float = 1.0
    adv_max: float = 5.0

    roles: ClassVar[frozenset[str]] = frozenset({"old", "sampling"})
    draws: ClassVar[str] = "sampling"

    def __post_init__(self):
        _positive(self, "beta", "adv_max")

    def by_place(self, errors: dict[str, Array], advantage: Array, mates: Array, tools: Tools) -> tuple[Array, Metrics]:
        """See `Preference.by_place`."""

        def normalised(error: Array) -> Array:
            size = jnp.abs(jax.lax.stop_gradient(error)).reshape(len(error), -1).mean(-1)
            return mean_square(error) / jnp.maximum(size, 1e-5)

        implicit = normalised(errors["old"]) - normalised(errors["train"])
        reward = jnp.clip(advantage / self.adv_max, -1, 1) / 2 + 0.5
        centred = implicit - jax.lax.stop_gradient(over_mates(implicit, mates))
        loss = jnp.square(self.beta * centred - (reward - over_mates(reward, mates)))
        return self.adv_max / self.beta * loss, {"reward/implicit": implicit}
