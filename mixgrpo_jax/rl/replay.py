"""Groups of earlier iterations, which are trained on once more: kept on the devices, and in the checkpoint."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mixgrpo_jax.flow.plans import Plan
from mixgrpo_jax.rl.select import take
from mixgrpo_jax.rl.update import Batch

AXES: Any = Batch(0, 1, 1, 0, 0, 1)  # type: ignore[arg-type]  # of samples, or of prompts, in each field's arrays


class Kept(NamedTuple):
    """K groups, as an update is given them, and their values [K] float32, -inf where there is none."""

    batch: Batch
    plan: Plan
    value: Any


def value_of(reward: np.ndarray) -> np.ndarray:
    """What groups of rewards [P, G] are worth: how far the best is above the mean, [P] float32; -inf of NaN alone.

    >>> value_of(np.array([[0.0, 1.0], [0.5, np.nan], [np.nan, np.nan]])).tolist()
    [0.5, 0.0, -inf]
    """
    scored = ~np.isnan(reward)
    count = np.maximum(scored.sum(1), 1)
    best = np.where(scored, reward, -np.inf).max(1)
    return (best - np.where(scored, reward, 0).sum(1) / count).astype(np.float32)


def join(batch: Batch, plan: Plan, kept: Batch, kept_plan: Plan) -> tuple[Batch, Plan]:
    """P fresh groups and then K kept ones; `extra["replayed"]` [1, B] is 1 of the latter's samples.

    Their plan has no segments: an update reads none, and a checkpoint cannot hold one without steps.
    """

    def of_samples(batch: Batch, replayed: float) -> Batch:
        count = len(batch.weight)
        rows = jax.tree.map(lambda a: jnp.repeat(a, count // a.shape[1], axis=1), batch.rows)
        return batch._replace(rows=rows, extra=batch.extra | {"replayed": jnp.full((1, count), replayed)})

    def beside(axis: int) -> Callable[[Array, Array], Array]:
        return lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)], axis)

    fields = zip(AXES, of_samples(batch, 0.0), of_samples(kept, 1.0))
    joined = Batch(*(jax.tree.map(beside(axis), a, b) for axis, a, b in fields))
    return joined, jax.tree.map(beside(-1), plan._replace(segments=()), kept_plan)


def keep(batch: Batch, plan: Plan, index: Array, group: int) -> tuple[Batch, Plan]:
    """The samples at the positions [K, G] of groups of G, to be joined to others later."""
    batch, plan = take(batch, plan, index, group)
    extra = {name: a for name, a in batch.extra.items() if name != "replayed"}
    return batch._replace(extra=extra), plan._replace(segments=())


def positions(groups: np.ndarray, group: int) -> np.ndarray:
    """Of the samples of some groups of G in a batch, [len(groups), G] int32."""
    return (groups[:, None] * group + np.arange(group)).astype(np.int32)
