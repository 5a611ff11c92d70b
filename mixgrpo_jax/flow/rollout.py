"""Draw samples along a plan: its segments one after the other, each a `lax.scan`.

One compiled program serves all plans of a layout: what moves is data. A step that no prompt takes is gated by a scalar
`lax.cond` and costs nothing; a prompt that takes fewer steps than others holds its state meanwhile.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mixgrpo_jax.flow import kernels, plans, solvers
from mixgrpo_jax.flow.plans import Layout, Plan, Segment, Steps
from mixgrpo_jax.flow.sampler import Sampler, Velocity


class Rows(NamedTuple):
    """The steps of a recorded segment, in order; N of them, each of R nodes.

    A node is what samples share until they branch: sample b of B is below node `b // (B / R)`.

    x, x_next: [N, R, S, C]. log_prob: [N, R, S], a map over latent positions; 0 of a deterministic step.
    sigma, sigma_next, eta: [N, R].
    """

    x: Array
    x_next: Array
    log_prob: Array
    sigma: Array
    sigma_next: Array
    eta: Array


class Rollout(NamedTuple):
    """What a rollout gives.

    x0: [B, S, C]. rows: of each recorded segment.
    executed, used: evaluations of the velocity in samples, int32: those that ran, and those that a sample needed.
    """

    x0: Array
    rows: tuple[Rows, ...]
    executed: Array
    used: Array


class _State(NamedTuple):
    """Where the samples are, and what the solver remembers of how they came there."""

    x: Array
    history: solvers.History


def initial_noise(sampler: Sampler, key: Array, ids: Array, shape: tuple[int, ...]) -> Array:
    """Noise of the samples (or, where a group shares it, of the prompts) with these ids: [N] -> [N, *shape]."""
    return sampler.normal(key, ids, shape)


def rollout(
    velocity: Velocity,
    plan: Plan,
    x: Array,
    cond: Any,
    key: Array,
    ids: Array,
    *,
    layout: Layout,
    sampler: Sampler,
) -> Rollout:
    """Integrate from noise to data along the plan.

    Rows branch where the layout says so, and no further than to the samples asked for: samples that share their noise
    share a deterministic prefix, and where every sample has a row of its own from the start, none is shared.

    Args:
        plan: for P prompts. x: where the samples begin, [R, S, C], the rows of each prompt together; P divides R.
        cond: pytree of arrays with leading axis P.
        key: of this iteration. ids: of the B samples, group by group, [B]. The noise of a step is addressed by
            (key, id // samples below its node, step), so that a sample can be drawn again alone: with the same layout,
            its prompt's column of the plan, and its id.
    Returns:
        The B samples.
    """
    executed, used, rows = jnp.int32(0), jnp.int32(0), []
    state = _State(x.astype(jnp.float32), solvers.empty_history(x))
    sizes = plans.leaves_below(layout), plans.nodes(layout, len(x), len(ids))
    for number, (segment, steps, leaves, nodes) in enumerate(zip(layout, plan.segments, *sizes)):
        state = _repeat(state, nodes // len(state.x))
        address = ids[:: len(ids) // nodes] // leaves
        own = _repeat(cond, nodes // len(steps.taken))
        with jax.named_scope(f"segment_{number}_{'sde' if segment.sde else 'ode'}"):  # as profiles show it
            state, recorded = run_segment(velocity, segment, steps, state, own, key, address, sampler)
        rows += [recorded] if recorded is not None else []
        taken = segment.steps if segment.record else jnp.max(steps.taken, initial=0)
        executed += jnp.asarray(taken * nodes, jnp.int32)
        used += jnp.asarray(steps.taken.sum() * (nodes // len(steps.taken)), jnp.int32)
    return Rollout(state.x, tuple(rows), executed, used)


def run_segment(
    velocity: Velocity,
    segment: Segment,
    steps: Steps,
    state: _State,
    cond: Any,
    key: Array,
    address: Array,
    sampler: Sampler,
) -> tuple[_State, Rows | None]:
    """One segment, of the R rows of a state. Arguments are as in `rollout`, by row; `address` are the nodes'."""
    each, last = len(address) // len(steps.taken), jnp.max(steps.taken, initial=0)

    def stochastic(state: _State, step: Steps) -> tuple[_State, Array]:
        x, history = state
        transition, v = sampler.transition(velocity, x, step.sigma, step.sigma_next, cond, step.eta)
        keys = jax.vmap(lambda node, index: jax.random.fold_in(jax.random.fold_in(key, node), index))
        x_next = kernels.sample(transition, sampler.normal_of(keys(address, step.address), x.shape[1:]))
        return _State(x_next, solvers.push(history, x, v, step.sigma)), sampler.log_prob_map(transition, x_next)

    def deterministic(state: _State, step: Steps) -> tuple[_State, Array]:
        x, history = state
        v = velocity(x, sampler.timestep(step.sigma), cond).astype(jnp.float32)
        history, x_next = solvers.SOLVERS[sampler.solver](history, x, v, step.sigma, step.sigma_next, step.order)
        return _State(x_next, history), jnp.zeros((len(x), x[0, ..., 0].size))

    move = stochastic if segment.sde else deterministic

    def record(state: _State, element: tuple[Array, Steps]) -> tuple[_State, Rows]:
        step = element[1]
        after, log_prob = move(state, step)
        return after, Rows(state.x, after.x, log_prob, step.sigma, step.sigma_next, step.eta)

    def gated(state: _State, element: tuple[Array, Steps]) -> tuple[_State, None]:
        number, step = element

        def advance(state: _State) -> _State:
            after, _ = move(state, step)
            return jax.tree.map(
                lambda new, old: jnp.where(kernels.by_sample(number < step.taken, new), new, old), after, state
            )

        return lax.cond(number < last, advance, lambda state: state, state), None

    by_row = Steps(*(jnp.repeat(jnp.asarray(a), each, axis=-1) for a in steps))
    by_step = by_row._replace(taken=jnp.broadcast_to(by_row.taken, by_row.sigma.shape))
    elements = jnp.arange(segment.steps), by_step
    return lax.scan(record if segment.record else gated, state, elements)


def _repeat(tree: Any, times: int) -> Any:
    return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), tree)


def integrate(
    velocity: Velocity,
    sigmas: np.ndarray,
    noise: Array,
    cond: Any,
    *,
    orders: Sequence[int] | np.ndarray | int = 1,
    solver: str = "euler",
) -> Array:
    """Deterministic sampling over a whole grid, for evaluation and inference: noise [B, S, C] -> x0 [B, S, C]."""
    layout, plan = plans.whole(sigmas, np.asarray(orders), len(noise))
    ids, key = jnp.arange(len(noise)), jax.random.key(0)  # nothing is random
    return rollout(velocity, plan, noise, cond, key, ids, layout=layout, sampler=Sampler(solver=solver)).x0
