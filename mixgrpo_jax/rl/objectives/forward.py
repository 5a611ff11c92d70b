"""What objectives of the forward process share: clean samples are noised again, and no path has a likelihood."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow.kernels import by_sample
from mixgrpo_jax.rl.samples import Metrics, Objective, Roles, Samples, Tools, mean_over_positions


class Forward(Objective):
    """Samples of an ODE of any solver, of which nothing is kept but x0 and the first step.

    By that step, which every solver takes by Euler, `prepare` checks that the role which drew the samples has in the
    update's program the velocity that it had in the rollout's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"x0", "ode_row"})
    on_policy: ClassVar[Mapping[str, str]] = {"velocity/rollout_deviation": "rollout_tolerance"}

    def prepare(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> dict[str, Array]:
        """How far the drawing role's velocity is from the rollout's at the recorded step, relatively: [1, B]."""
        first = jax.tree.map(lambda a: a[:1], samples.rows)
        v = roles[self.draws](first.x, tools.sampler.timestep(first.sigma), samples.cond)[0]
        moved = (first.x_next - first.x)[0]
        expected = by_sample((first.sigma_next - first.sigma)[0], v) * v
        size, error = (jnp.sqrt(mean_over_positions(jnp.square(a))) for a in (expected, moved - expected))
        return {"deviation": (error / jnp.maximum(size, 1e-6))[None]}

    def checked(self, samples: Samples) -> Metrics:
        """What `on_policy` names of what `prepare` found, [b]."""
        deviation = samples.extra["deviation"]
        return {"velocity/rollout_deviation": deviation if deviation.ndim == 1 else deviation.max(0)}


def noised(samples: Samples, key: Array, tools: Tools, shared: bool = False) -> tuple[Array, Array]:
    """x_t and eps, [(n,) b, S, C], of the samples at their noise levels; `shared` gives a group the same eps."""
    address = samples.group if shared else samples.id

    def at_place(key: Array, sigma: Array) -> tuple[Array, Array]:
        return tools.sampler.noised(key, address, samples.x0, sigma)

    return (jax.vmap(at_place) if samples.sigma.ndim > 1 else at_place)(key, samples.sigma)
