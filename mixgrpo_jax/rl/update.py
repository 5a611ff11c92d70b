"""The optimiser updates of one iteration: sharded, accumulated, one program."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.flow.kernels import by_sample
from mixgrpo_jax.flow.plans import Plan
from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.flow.sampler import Velocity
from mixgrpo_jax.rl.samples import Metrics, Objective, Roles, Samples, Tools

# (params, averages, frozen) -> roles with parameters bound
MakeRoles = Callable[[Any, Mapping[str, Any], Any], Roles]


class Batch(NamedTuple):
    """An iteration's B samples, in which a group stands in a row, and what they are trained with.

    x0: [B, S, C] or None. rows: of each recorded segment, or none. What the objective does not need may be absent.
    advantage: [n or 1, B, S or 1]. weight: [B]. cond: pytree with leading axis P. extra: arrays [n or 1, B, ...];
    with "by_reward", [1, B, K], each reward has a gradient of its own, which the optimiser mixes, see `rl.marble`.
    """

    x0: Any
    rows: tuple[Rows, ...]
    advantage: Any
    weight: Any
    cond: Any
    extra: dict[str, Array]


@dataclass(frozen=True)
class Average:
    """A moving average of the parameters, `a <- d a + (1 - d) params`, and its rule.

    Attributes:
      decay: the decay d, in [0, 1); a constant d of 0 keeps no average.
      rate: if positive, d grows with the count c of moves made, `min(rate max(c - start, 0), decay)`.
      start: the count of moves until which d is 0, where it grows.
      by: what moves it: every "update", or the end of every "iteration".

    Raises:
      ValueError: when a field is out of range.
    """

    decay: float = 0.99
    rate: float = 0.0
    start: int = 0
    by: str = "update"

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} is not in [0, 1); 0 keeps no average")
        for field in ("rate", "start"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative")
        if self.by not in ("update", "iteration"):
            raise ValueError(f"by={self.by!r} is unknown; choose 'update' or 'iteration'")

    def at(self, count: Array) -> Array | float:
        """d of the move that follows `count` of them."""
        return jnp.clip(self.rate * (count - self.start), 0, self.decay) if self.rate else self.decay


class TrainState(NamedTuple):
    """What training changes: parameters, the optimiser's state, the parameters' averages by name, and the updates made.

    Averages and the optimiser's moments are fp32, whatever the parameters are.
    """

    params: Any
    opt_state: Any
    averages: dict[str, Any]
    step: Array


def init_state(
    params: Any, optimiser: optax.GradientTransformation, averages: Mapping[str, Average] | None = None
) -> TrainState:
    """A fresh state. Averages are copies, so that the state's buffers can be donated."""

    def fp32() -> Any:
        return jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)

    return TrainState(params, optimiser.init(fp32()), {name: fp32() for name in averages or {}}, jnp.int32(0))


def assign(samples: int, group: int, num_updates: int, micro_batch: int) -> np.ndarray:
    """Which samples make which update: indices [U, M, micro_batch] into a batch, in which a group stands in a row.

    A micro-batch takes one sample of each run of `samples / micro_batch`. Each micro-batch takes equally many samples
    from every device, so none moves. Within a run, groups take turns by their numbers: every update takes an equal
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


def assign_groups(samples: int, group: int, num_updates: int, micro_batch: int) -> np.ndarray:
    """As `assign`, where an update takes whole groups: every U-th one. Raises ValueError where they do not divide.

    >>> assign_groups(8, 2, num_updates=2, micro_batch=2).tolist()
    [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]
    """
    if samples // group % num_updates:
        raise ValueError(
            f"batch.updates={num_updates} does not divide batch.prompts={samples // group}, and the objective takes "
            "whole groups an update: choose a divisor"
        )
    groups = np.arange(samples).reshape(-1, num_updates, group).swapaxes(0, 1)
    return groups.reshape(num_updates, micro_batch, -1).swapaxes(1, 2)


def make_update(
    objective: Objective,
    roles: MakeRoles,
    optimiser: optax.GradientTransformation,
    tools: Tools,
    *,
    num_updates: int,
    micro_batch: int,
    averages: Mapping[str, Average] | None = None,
    key: Array | None = None,
) -> Callable[[TrainState, Any, Batch, Plan], tuple[TrainState, Metrics]]:
    """Build `update(state, frozen, batch, plan) -> state, metrics`.

    The B samples are split into `num_updates` optimiser steps. Each accumulates the gradient over its micro-batches and
    over the n places of the plan where a sample is trained, by `lax.scan`, in fp32: memory is that of one micro-batch
    at one place. The loss is the mean over places, and over samples by their weights. Parameters in bf16 are rounded
    stochastically.

    Args:
        roles: `(params, averages, frozen) -> roles`.
        averages: the rules of the state's.
        key: of the objective's draws, addressed by (iteration, place, sample), and of stochastic rounding.

    Metrics are stacked by update, [U], and by place as well, [U, n], where their names begin with ratio/ or are in
    `on_policy`. Of the latter it is the largest, of all others the mean over samples by their weights. "nfe/update" are
    the model evaluations of all updates in samples, "nfe/gradient" those among them that have a gradient; one of
    `prepare` whose gradient in x is taken counts as two.
    """
    key, averages = jax.random.key(0) if key is None else key, averages or {}
    noise_key = jax.random.fold_in(key, 2**31 - 1)  # apart from every update's own
    spans, of_group = objective.span != "step", objective.span == "group"

    def update(state: TrainState, frozen: Any, batch: Batch, plan: Plan) -> tuple[TrainState, Metrics]:
        count, (places, prompts) = len(batch.weight), plan.train.shape
        split = assign_groups if of_group else assign
        index = jnp.asarray(split(count, count // prompts, num_updates, micro_batch))
        iteration_key = jax.random.fold_in(noise_key, state.step // num_updates)
        keys = jax.vmap(lambda place: jax.random.fold_in(iteration_key, place))(jnp.arange(places))

        # A sample without weight may have no advantage: NaN times 0 would be NaN, in its gradient too.
        batch = batch._replace(advantage=jnp.where(batch.weight[:, None] > 0, batch.advantage, 0))
        before: dict[str, int] = {}
        own = _counted(_row_by_row(roles(state.params, state.averages, frozen), micro_batch), before)
        everything = _samples(batch, plan, jnp.arange(count), near=True)
        with jax.named_scope("prepare"):
            batch = batch._replace(extra=batch.extra | objective.prepare(own, everything, keys, tools))

        def accumulate(
            params: Any, averages: Any, frozen: Any, batch: Batch, plan: Plan, keys: Array, elements: Any, first: Array
        ) -> Any:
            """Sums over micro-batches: of gradients, and by micro-batch of metrics, weights and evaluations."""
            size = micro_batch if of_group else elements[0].shape[-1]

            def bound(params: Any, averages: Any) -> Roles:
                return roles(params, averages, frozen)

            loss = _make_loss(objective, bound, tools, batch, plan, keys, size, first)
            gradient = jax.value_and_grad(loss, has_aux=True)

            def one(total: Any, element: Any) -> Any:
                with jax.named_scope("loss"):
                    (_, aux), gradients = gradient(params, averages, *element)
                return jax.tree.map(jnp.add, total, gradients), aux

            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            return lax.scan(one, zeros, elements)

        ways = _apart(batch, plan, 1 if of_group else micro_batch)
        total_of = _by_part(accumulate, objective, ways, count) if ways > 1 else accumulate

        def apply(state: TrainState, index: Array) -> Any:
            params = state.params
            if spans:  # or the gradients of rows would be added up in the parameters' own dtype
                params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
                elements = (index.T.reshape(1, -1) if of_group else index), jnp.zeros(1 if of_group else len(index))
            else:
                elements = jnp.repeat(index, places, axis=0), jnp.tile(jnp.arange(places), len(index))

            def accumulated(batch: Batch) -> Any:
                return total_of(params, state.averages, frozen, batch, plan, keys, elements, jnp.int32(0))

            apart = "by_reward" in batch.extra
            added = _by_reward(accumulated, batch, objective) if apart else accumulated(batch)
            total, (sums, weight, evaluations) = added
            each = 1 if spans else places
            weight = weight[::each].sum()  # every place has the same
            weight = jnp.where(weight > 0, weight, 1)
            gradients = jax.tree.map(lambda g: g / (weight * each), total)
            with jax.named_scope("optimiser"):
                updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
                params = apply_updates(state.params, updates, jax.random.fold_in(key, state.step))
                moved = _moved(averages, "update", state.averages, params, state.step)
            metrics = {
                name: _over_places(name, name in objective.on_policy, m.reshape(-1, each), weight)
                for name, m in sums.items()
            }
            metrics["grad_norm"], metrics["param_norm"] = optax.global_norm(gradients), _norm(params)
            if apart:
                shares = optax.tree_utils.tree_get(opt_state, "share")
                metrics |= {f"share/{k}": share for k, share in enumerate(shares)}
            return TrainState(params, opt_state, moved, state.step + 1), (metrics, evaluations.sum(0))

        state, (metrics, evaluations) = lax.scan(apply, state, index)
        moved = _moved(averages, "iteration", state.averages, state.params, state.step // num_updates - 1)
        executed, trained = evaluations.sum(0)
        metrics |= {"nfe/update": executed + sum(before.values()), "nfe/gradient": trained}
        return state._replace(averages=moved), metrics

    return update


def _by_reward(accumulated: Callable[[Batch], Any], batch: Batch, objective: Objective) -> Any:
    """Sums of the samples with the advantages of each reward: gradients on a leading axis, metrics as of one."""
    by_reward = jnp.where(batch.weight[:, None] > 0, batch.extra["by_reward"], 0)
    own = jnp.moveaxis(by_reward, -1, 0)[..., None]  # [K, 1, B, 1]
    total, (sums, weight, evaluations) = lax.map(lambda a: accumulated(batch._replace(advantage=a)), own)
    sums = {name: m.max(0) if name in objective.on_policy else m.mean(0) for name, m in sums.items()}
    return total, (sums, weight[0], evaluations.sum(0))


def _apart(batch: Batch, plan: Plan, micro_batch: int) -> int:
    """Parts of the mesh that add up gradients of their own until the end of an update: along data, where it divides
    all that is cut."""
    ways = jax.sharding.get_abstract_mesh().shape.get("data", 1)
    sizes = [micro_batch, len(batch.weight), plan.train.shape[1], *(rows.x.shape[1] for rows in batch.rows)]
    return ways if all(size % ways == 0 for size in sizes) else 1


def _by_part(accumulate: Callable, objective: Objective, ways: int, count: int) -> Callable:
    """`accumulate` where every part of the mesh along data has its own samples, and sums cross once, at the end."""

    def part(params, averages, frozen, batch, plan, keys, elements, first):
        first = lax.axis_index("data") * (count // ways)
        index, places = elements
        total, (sums, weight, evaluations) = accumulate(
            params, averages, frozen, batch, plan, keys, (index - first, places), first
        )
        total, weight = jax.tree.map(lambda a: lax.psum(a, "data") / ways, (total, weight))
        sums = {
            name: lax.pmax(m, "data") if name in objective.on_policy else lax.psum(m, "data") / ways
            for name, m in sums.items()
        }
        return total, (sums, weight, lax.psum(evaluations, "data"))

    whole, first_axis, second_axis = P(), P("data"), P(None, "data")
    cut: Any = Batch(first_axis, second_axis, second_axis, first_axis, first_axis, second_axis)  # type: ignore[arg-type]
    plans: Any = Plan(whole, *[second_axis] * (len(Plan._fields) - 1))  # type: ignore[arg-type]
    specs = whole, whole, whole, cut, plans, whole, (second_axis, whole), whole
    return jax.shard_map(part, in_specs=specs, out_specs=whole, axis_names={"data"}, check_vma=False)


def _make_loss(
    objective: Objective,
    roles: Callable[[Any, Mapping[str, Any]], Roles],
    tools: Tools,
    batch: Batch,
    plan: Plan,
    keys: Array,
    micro_batch: int,
    first: Array,
) -> Callable[[Any, Any, Array, Array], tuple[Array, tuple[Metrics, Array, Array]]]:
    """`loss(params, averages, index [b], place) -> loss, (metrics, weight, evaluations [2])` of some samples.

    `first` is the number, among all, of the batch's first sample.

    The loss, the metrics and the weight are sums over the samples, as a share of a micro-batch.
    """
    spans, of_group = objective.span != "step", objective.span == "group"

    def loss(params: Any, averages: Any, index: Array, place: Array) -> tuple[Array, tuple[Metrics, Array, Array]]:
        calls: dict[str, int] = {}
        own = roles(params, averages)
        if spans:
            own = _row_by_row(own, micro_batch)
            samples, drawn_by = _samples(batch, plan, index, near=not of_group, first=first), keys
        else:
            samples, drawn_by = _samples(batch, plan, index, place, first=first), keys[place]
        value, metrics = objective(_counted(own, calls), samples, drawn_by, tools)
        value = value if spans else samples.step_weight * value
        sums = {
            name: _over_samples(name in objective.on_policy, m, samples.weight, micro_batch)
            for name, m in (metrics | {"loss/total": value}).items()
        }
        trained = calls.get("train", 0)
        evaluations = jnp.array([sum(calls.values()) + spans * trained, trained])
        weight = samples.weight.sum() / micro_batch
        return (samples.weight * value).sum() / micro_batch, (sums, weight, evaluations)

    return loss


def count_evaluations(
    objective: Objective, roles: Iterable[str], tools: Tools, shape: tuple[int, ...], places: int, gradients: int = 1
) -> tuple[int, int]:
    """Evaluations of an update a sample of that shape, and how many of them have a gradient: "nfe/update" and
    "nfe/gradient" before there is an update. `gradients` is of rewards that have each their own."""
    before: dict[str, int] = {}
    calls: dict[str, int] = {}
    own: Roles = dict.fromkeys([*roles, "train"], lambda x, sigma, cond: 0.0 * x)

    def trace() -> Any:
        before.clear()
        calls.clear()
        x, each, positions = jnp.zeros((places, 1, *shape)), jnp.zeros((places, 1)), max(1, math.prod(shape[:-1]))
        rows = Rows(x, x, jnp.zeros((places, 1, positions)), each + 1, each, each)
        one = jnp.ones(1)
        asked = {"reward_grad": x[:1], "reward": each[:1], "map": jnp.zeros((1, 1, positions))}
        batch = Batch(x[0], (rows,), each[:1, :, None], one, one, asked)
        plan = Plan((), *[np.zeros((places, 1), np.int32)] * 5)
        keys, index = jax.random.split(jax.random.key(0), places), jnp.arange(1)
        extra = objective.prepare(_counted(own, before), _samples(batch, plan, index), keys, tools)
        batch, spans = batch._replace(extra=batch.extra | extra), objective.span != "step"
        samples = _samples(batch, plan, index, None if spans else jnp.int32(0))
        return objective(_counted(own, calls), samples, keys if spans else keys[0], tools)

    jax.eval_shape(trace)
    spans, trained = objective.span != "step", calls.get("train", 0)
    each = gradients if spans else gradients * places
    return sum(before.values()) + each * (sum(calls.values()) + spans * trained), each * trained


def _samples(
    batch: Batch, plan: Plan, index: Array, place: Array | None = None, near: bool = True, first: Array | int = 0
) -> Samples:
    """The samples of an index [b] at a place, or without one at all n, on a leading axis.

    `first` is the number of the batch's first sample. `near` says that the r-th of them is in the r-th of b runs of the
    batch, on the device that has that run.
    """
    count, prompts = len(batch.weight), plan.train.shape[1]
    group = index // (count // prompts)

    def take(a: Array, row: Array | int) -> Array:
        return _take(a, jnp.broadcast_to(jnp.asarray(row), index.shape), index, count, near)

    def at(place: Array) -> tuple[Any, tuple[Array, ...], dict[str, Array]]:
        rows, first, row = None, 0, plan.train[place][group]
        for segment in batch.rows:
            here = jnp.clip(row - first, 0, len(segment.sigma) - 1)
            found = Rows(*(take(a, here) for a in segment))
            rows = found if rows is None else _choose(row >= first, found, rows)
            first += len(segment.sigma)
        advantage, extra = jax.tree.map(lambda a: take(a, place if len(a) > 1 else 0), (batch.advantage, batch.extra))
        of_place = (a[place][group] for a in (plan.sigma, plan.weight, plan.chunk))
        return rows, (*of_place, advantage), extra

    plan = jax.tree.map(jnp.asarray, plan)
    rows, (sigma, step_weight, chunk, advantage), extra = (
        jax.vmap(at)(jnp.arange(len(plan.train))) if place is None else at(place)
    )
    alone = jax.tree.map(lambda a: take(a[None], 0), (batch.x0, batch.weight, batch.cond))
    x0, weight, cond = alone
    number = index + first
    group = number // (count // prompts)
    return Samples(x0, rows, sigma, advantage, weight, step_weight, chunk, group, number, cond, extra)


def _take(a: Array, row: Array, index: Array, count: int, near: bool) -> Array:
    """Rows [b] of the samples [b] of an array [N, R, ...] of R nodes, each of `count / R` samples in a row."""
    below, run = count // a.shape[1], count // len(index)
    if not near:
        return a[row, index // below]
    # A look within each run, and nodes repeated no further than to what a run and a node share: nothing moves.
    shared = math.gcd(below, run)
    a = jnp.repeat(a, below // shared, axis=1)
    runs = a.reshape(len(a), len(index), run // shared, *a.shape[2:])
    within = index // shared - jnp.arange(len(index)) * (run // shared)
    return jax.vmap(lambda samples, row, i: samples[row, i], (1, 0, 0))(runs, row, within)


def _choose(condition: Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(by_sample(condition, a), a, b), chosen, other)


def _counted(roles: Roles, calls: dict[str, int]) -> dict[str, Velocity]:
    """The roles, which add the samples that they evaluate to `calls`, by name, as they are traced.

    Where their gradient in x is taken, as `prepare` may, they add them once more: it costs as much.
    """

    def count(name: str, role: Velocity) -> Velocity:
        def velocity(x: Array, sigma: Array, cond: Any) -> Array:
            def add() -> None:
                calls[name] = calls.get(name, 0) + sigma.size

            def back(_: None, gradient: Array) -> tuple[Array]:
                add()
                return (gradient,)

            add()
            same = jax.custom_vjp(lambda x: x)
            same.defvjp(lambda x: (x, None), back)
            return role(same(x), sigma, cond)

        return velocity

    return {name: count(name, role) for name, role in roles.items()}


def _row_by_row(roles: Roles, micro_batch: int) -> dict[str, Velocity]:
    """Roles of x [n, b, ...] and sigma [n, b] with cond of leading axis b, a micro-batch at one place at a time.

    The m-th takes the m-th sample of each run of b / micro_batch. The backward pass computes each of them again.
    """

    def evaluate(role: Velocity, x: Array, sigma: Array, cond: Any) -> Array:
        places, count, run = len(x), x.shape[1], x.shape[1] // micro_batch

        def turns(a: Array) -> Array:  # [b, ...] -> [run, micro_batch, ...]
            return jnp.moveaxis(a.reshape(micro_batch, run, *a.shape[1:]), 1, 0)

        def one(element: tuple[Array, Array, Array]) -> Array:
            x, sigma, turn = element
            # Cast here, as in a step: a compiler may leave out a rounding to bf16 that is undone at once.
            return role(x, sigma, jax.tree.map(lambda a: turns(a)[turn], cond)).astype(jnp.float32)

        x, sigma = (jax.vmap(turns)(a).reshape(places * run, micro_batch, *a.shape[2:]) for a in (x, sigma))
        v = lax.map(one, (x, sigma, jnp.tile(jnp.arange(run), places)))
        return jnp.moveaxis(v.reshape(places, run, *v.shape[1:]), 1, 2).reshape(places, count, *v.shape[2:])

    return {name: partial(evaluate, jax.checkpoint(role)) for name, role in roles.items()}


def _over_samples(largest: bool, values: Array, weight: Array, micro_batch: int) -> Array:
    """[b] -> a scalar: the largest of those with a weight, or the weighted sum as a share of a micro-batch."""
    return jnp.where(weight > 0, values, 0).max() if largest else (weight * values).sum() / micro_batch


def _over_places(name: str, largest: bool, values: Array, weight: Array) -> Array:
    """[micro-batches, places] -> a scalar, or [places] where it is the step that tells what went wrong."""
    if largest:
        return values.max(0)
    values = values / weight
    return values.sum(0) if name.startswith("ratio/") else values.sum() / values.shape[1]


def _norm(params: Any) -> Array:
    """The norm of all parameters, in fp32; not finite if one of them is not."""
    return optax.global_norm(jax.tree.map(lambda p: p.astype(jnp.float32), params))


def _moved(
    rules: Mapping[str, Average], by: str, averages: Mapping[str, Any], params: Any, count: Array
) -> dict[str, Any]:
    """The averages, of which those that move `by` this have moved."""
    return dict(averages) | {
        name: optax.incremental_update(params, averages[name], 1 - rule.at(count))
        for name, rule in rules.items()
        if rule.by == by
    }


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
