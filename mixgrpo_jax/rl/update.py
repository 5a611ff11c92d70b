"""The optimiser updates of one iteration: sharded, accumulated, one program."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.rl.objectives import Objective, Row


class TrainState(NamedTuple):
    """What training changes: parameters, the optimiser's state, the parameters' moving average, and a count.

    The average and the optimiser's moments are fp32, whatever the parameters are.
    """

    params: Any
    opt_state: Any
    ema: Any  # None where no average is kept
    step: Array


def init_state(params: Any, optimiser: optax.GradientTransformation, average: bool = True) -> TrainState:
    """A fresh state. The average is a copy, so that the state's buffers can be donated."""
    fp32 = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    return TrainState(params, optimiser.init(fp32), fp32 if average else None, jnp.int32(0))


def assign(samples: int, group: int, num_updates: int, micro_batch: int) -> np.ndarray:
    """Which samples make which update: indices [U, M, micro_batch] into a batch, in which a group stands in a row.

    A micro-batch takes one sample of each run of `samples / micro_batch`. So it has as many of every device as the mesh
    leaves there, and none has to move. Within a run, groups take turns by their numbers: every update takes an equal
    share of each group, as far as sizes allow.

    >>> assign(8, 4, num_updates=2, micro_batch=2).tolist()
    [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]
    >>> assign(8, 4, num_updates=2, micro_batch=1).reshape(2, 4).tolist()
    [[0, 4, 1, 5], [2, 6, 3, 7]]
    """
    runs = np.arange(samples).reshape(micro_batch, -1)
    same = runs[:, :, None] // group == runs[:, None, :] // group
    turn = (np.tril(same, -1).sum(2) + 0.5) / same.sum(2)
    taken = np.take_along_axis(runs, np.argsort(turn, axis=1, kind="stable"), axis=1)
    return taken.T.reshape(num_updates, -1, micro_batch)


def _take(a: Array, index: Array, run: int) -> Array:
    """a[index] of samples, the r-th of which is in the r-th run: a look within each run, on the device that has it."""
    within = index - jnp.arange(len(index)) * run
    return jax.vmap(lambda samples, i: samples[i])(a.reshape(len(index), run, *a.shape[1:]), within)


def _take_cond(a: Array, index: Array, samples: int) -> Array:
    """Rows of each sample's group, of a [P, ...]; repeated no further than to what a run and a group share."""
    group, run = samples // len(a), samples // len(index)
    shared = math.gcd(group, run)
    return _take(jnp.repeat(a, group // shared, axis=0), index // shared, run // shared)


def make_update(
    objective: Objective,
    optimiser: optax.GradientTransformation,
    *,
    num_updates: int,
    micro_batch: int,
    ema_decay: float,
    key: Array | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Build `update(state, reference, rows, advantage, cond, train) -> state, metrics`.

    The B samples are split into `num_updates` optimiser steps. Each accumulates the gradient over its micro-batches and
    over the trained window steps by `lax.scan`, in fp32, so memory is that of one micro-batch and one step. Parameters
    in bf16 are rounded stochastically, which needs a `key`; the update's number is folded into it.

    Args of the returned function:
        reference: parameters of the frozen reference policy, or None where the objective needs none.
        rows: the rollout's window, [w, B, ...].
        advantage: [B].
        cond: pytree with leading axis P; each row is of B / P samples in a row.
        train: offsets within the window that are trained, [n] int32.
    Metrics are stacked by update, [U], and those under "ratio/" by trained step as well, [U, n].
    """
    gradient = jax.value_and_grad(objective, has_aux=True)

    def update(state: TrainState, reference, rows: Rows, advantage, cond, train):
        count, prompts = len(advantage), len(jax.tree.leaves(cond)[0])
        samples = jnp.asarray(assign(count, count // prompts, num_updates, micro_batch))
        num_micro, num_train = samples.shape[1], train.shape[0]

        def accumulate(carry, element):
            params, total = carry
            index, step = element
            row = Row(
                *(_take(a[step], index, count // micro_batch) for a in (rows.x, rows.x_next, rows.log_prob)),
                sigma=rows.sigma[step],
                sigma_next=rows.sigma_next[step],
                advantage=_take(advantage, index, count // micro_batch),
                cond=jax.tree.map(lambda a: _take_cond(a, index, count), cond),
            )
            (_, metrics), gradients = gradient(params, reference, row)
            return (params, jax.tree.map(jnp.add, total, gradients)), metrics

        def apply(state: TrainState, samples):
            elements = (jnp.repeat(samples, num_train, axis=0), jnp.tile(train, num_micro))
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
            (_, total), metrics = lax.scan(accumulate, (state.params, zeros), elements)
            gradients = jax.tree.map(lambda g: g / (num_micro * num_train), total)
            updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
            params = apply_updates(state.params, updates, None if key is None else jax.random.fold_in(key, state.step))
            ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
            metrics = {name: _by_step(name, m.reshape(num_micro, num_train)) for name, m in metrics.items()}
            metrics["grad_norm"] = optax.global_norm(gradients)
            return TrainState(params, opt_state, ema, state.step + 1), metrics

        return lax.scan(apply, state, samples)

    return update


def apply_updates(params: Any, updates: Any, key: Array | None) -> Any:
    """params + updates, in fp32; to bf16 by stochastic rounding, since most updates are under half a unit there."""
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda p, u: p.astype(u.dtype) + u, params, updates))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
    if jnp.bfloat16 in dtypes:
        assert key is not None
        keys = jax.random.split(key, len(leaves))
        leaves = [stochastic_round(x, k) if d == jnp.bfloat16 else x for x, d, k in zip(leaves, dtypes, keys)]
    return jax.tree.unflatten(tree, leaves)


def stochastic_round(x: Array, key: Array) -> Array:
    """fp32 -> one of the two nearest bf16, at random with E[round(x)] = x: noise is added to the 16 bits cut off."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _by_step(name: str, values: Array) -> Array:
    """Reduce [micro-batches, steps]: ratios keep the step, since it is the step that tells what went wrong."""
    if not name.startswith("ratio/"):
        return values.mean()
    return values.max(0) if name.endswith("max_deviation") else values.mean(0)
