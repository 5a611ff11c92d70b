"""What an objective sees: samples, roles and tools; and what it is."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

from jax import Array

from mixgrpo_jax.flow import kernels
from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.flow.sampler import Sampler, Velocity

# "train", "base", averages by their names ("old"), "teacher/NAME". A role is a velocity with its parameters bound.
Roles = Mapping[str, Velocity]
Metrics = dict[str, Array]


class Samples(NamedTuple):
    """Samples as an objective sees them. Of span "step", b samples at one of the n places where each is trained; beyond
    it, all n, on a leading axis that is shown in brackets.

    x0: [b, S, C], None unless needed.
    rows: a recorded step of each, without the axis N of `Rows`: x [(n,) b, S, C], ...; None unless needed.
    sigma: the noise level trained at, [(n,) b].
    advantage: [(n,) b, S], or [(n,) b, 1] of whole samples; 0 where the weight is.
    weight: of each sample, [b]: 0 is a sample that teaches nothing.
    step_weight: of the place in the loss, [(n,) b]. In span "step" it is applied to what the objective returns.
    chunk: the ratio that the place belongs to, [(n,) b].
    group, id: the prompt's and the sample's own number, [b] int32.
    cond: of training, a pytree with leading axis b. It need not be the rollout's.
    extra: what `prepare` found, each [(n,) b, ...].
    """

    x0: Array
    rows: Rows
    sigma: Array
    advantage: Array
    weight: Array
    step_weight: Array
    chunk: Array
    group: Array
    id: Array
    cond: Any
    extra: dict[str, Array]


class Point(NamedTuple):
    """Where the trained velocity was computed: what a term sees of b samples.

    x, v: [b, S, C]. sigma: [b]. cond: with leading axis b. Of a stochastic step also sigma_next, eta, its transition,
    and log_ratio [b], the change of its log-prob since the samples were drawn, as the objective reduces it.
    """

    x: Array
    sigma: Array
    v: Array
    cond: Any
    sigma_next: Any = None
    eta: Any = 1.0
    transition: kernels.Transition | None = None
    log_ratio: Array | None = None


class Tools(NamedTuple):
    """What objectives share.

    sampler: how steps are taken. terms: the config's penalties, see `rl.terms`.
    tokens: of each modality, its slice of a sample's positions.
    """

    sampler: Sampler
    terms: Callable[[Roles, Point], tuple[Array, Metrics]]
    tokens: Mapping[str, slice]

    def transition(self, role: Velocity, samples: Samples) -> tuple[kernels.Transition, Array]:
        """A role's p(x' | x) at the samples' rows, and its velocity: of span "step"."""
        row = samples.rows
        return self.sampler.transition(role, row.x, row.sigma, row.sigma_next, samples.cond, row.eta)


class Objective:
    """A loss of samples, and what it needs to be computed; a frozen dataclass of settings says what differs from this.

    needs: of the rollout, "rows" (recorded stochastic steps), "ode_row" (a recorded deterministic one, to check
        against), "ode_tail" (and all that follow, up to x0), "x0"; in `extra`, "reward_grad", dR/dx0 [B, S, C], with
        "reward", R [B], the sum of rewards by their weights, and "map" [B, S], where in a sample rewards look.
    roles: whom it asks for a velocity beside "train".
    span: what one call sees: a "step", a "window" (all places of its samples), or a "group" (and whole groups). Beyond
        "step", a role takes x [n, b, S, C] and sigma [n, b] with cond of leading axis b, and computes them row by row;
        the backward pass computes each row again, so that memory is one row's, for one evaluation more a row.
    draws: the role that draws the samples.
    on_policy: metrics that must be 0 at an iteration's first update, and the config's field of how far they may be off:
        "ratio_tolerance", or "rollout_tolerance" of those that compare with the rollout's program.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    roles: ClassVar[frozenset[str]] = frozenset()
    span: ClassVar[Literal["step", "window", "group"]] = "step"
    draws: ClassVar[str] = "train"
    on_policy: ClassVar[Mapping[str, str]] = {}

    @property
    def tolerance(self) -> float:
        """The largest `ratio_tolerance` that means something."""
        return math.inf

    def settled(self, dtype: str, stale: bool) -> Self:
        """These settings for matrix products in a dtype, and for samples that are drawn before the last update."""
        del dtype, stale
        return self

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """Arrays [n or 1, B, ...] that every call then finds in `extra`, made once an iteration without gradient.

        Sees all samples of the iteration, as of span "group".
        """
        return {}

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics {name: [b]}.

        `key` is of the iteration and the place ([n] of them beyond span "step"): fold in a sample's id, as
        `Sampler.noised` does, or its group.
        """
        raise NotImplementedError


def mean_over_positions(values: Array) -> Array:
    """[b, ...] -> [b]."""
    return values.reshape(len(values), -1).mean(-1)


def by_position(values: Array, x: Array) -> Array:
    """Values of S positions, or one of the sample, [b, S or 1], so that they broadcast against x [b, ..., C]."""
    positions = x.shape[1:-1] if values.shape[-1] > 1 else [1] * (x.ndim - 2)
    return values.reshape(len(x), *positions, *[1] * (x.ndim > 1))
