"""What an update needs, small, and the same losses by hand: as one function of all samples, without an update."""

from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixgrpo_jax.flow.rollout import Rows, rollout
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.rl.samples import Objective, Samples, Tools
from mixgrpo_jax.rl.terms import make_terms
from mixgrpo_jax.rl.update import Batch, init_state, make_update
from tests.conftest import toy_velocity

SAMPLER = Sampler()
TOOLS = Tools(SAMPLER, make_terms({}, SAMPLER), {})
KEY = jax.random.key(11)


class Case(NamedTuple):
    """Samples, and what they were drawn with."""

    params: dict
    plan: object
    batch: Batch
    ids: jax.Array


def case(toy, planner, state, sampler=SAMPLER, velocity=toy_velocity, advantage=None):
    """Two prompts' samples, with random advantages unless some [1, B, S or 1] are given."""
    _, params, noise, cond = toy
    plan, ids = planner.plan(state, 2), jnp.arange(2 * planner.group)
    if not any(segment.sde for segment in planner.layout):  # nothing but its noise tells samples apart
        noise = jax.random.normal(KEY, (len(ids), *noise.shape[1:]))

    @jax.jit
    def draw(params, plan):
        bound = partial(velocity, params)
        return rollout(bound, plan, noise, cond, jax.random.key(3), ids, layout=planner.layout, sampler=sampler)

    drawn = draw(params, plan)
    advantage = jax.random.normal(jax.random.key(5), (1, len(ids), 1)) if advantage is None else advantage
    return Case(params, plan, Batch(drawn.x0, drawn.rows, advantage, jnp.ones(len(ids)), cond, {}), ids)


def moved(params, scale, seed=9):
    keys = jax.random.split(jax.random.key(seed), len(params))
    return {name: p + scale * jax.random.normal(key, p.shape) for (name, p), key in zip(params.items(), keys)}


def roles(params, averages, frozen, velocity=toy_velocity):
    """The trained policy, averages by their names, and the base, which is what is frozen."""
    every = {"train": params, "base": frozen} | dict(averages)
    return {name: partial(velocity, own) for name, own in every.items() if own is not None}


def tools(sampler=SAMPLER, **weights):
    return Tools(sampler, make_terms(weights, sampler), {})


# Leaves the parameters as they are, and keeps the gradient, in fp32, as its state.
RECORD = optax.GradientTransformation(
    lambda params: params, lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient)
)


def learn(
    objective, case, params=None, *, base=None, averages=None, make=roles, optimiser=RECORD, using=TOOLS, **sizes
):
    """(state, metrics) after an iteration's updates of parameters, which are those of the rollout unless given."""
    sizes = {"num_updates": 1, "micro_batch": 2} | sizes
    update = make_update(objective, make, optimiser, using, averages=averages, key=KEY, **sizes)
    state = init_state(case.params if params is None else params, optimiser, averages)
    return jax.jit(update)(state, base, case.batch, case.plan)


def seen(batch, plan, index, place=None) -> Samples:
    """Samples of an index at a place, or at all on a leading axis: by plain indexing."""
    count, prompts = len(batch.weight), plan.train.shape[1]
    group = index // (count // prompts)
    at = jnp.arange(len(plan.train))[:, None] if place is None else place

    def row(*segments):  # [N, R, ...] each
        leaves = [jnp.repeat(a, count // a.shape[1], axis=1) for a in segments]
        return jnp.concatenate(leaves)[jnp.asarray(plan.train)[at, group], index]

    def by_place(a):
        return a[at if len(a) > 1 else jnp.zeros_like(at), index]

    rows = Rows(*(row(*leaves) for leaves in zip(*batch.rows)))
    sigma, weight, chunk = (jnp.asarray(a)[at, group] for a in (plan.sigma, plan.weight, plan.chunk))
    return Samples(
        x0=batch.x0[index],
        rows=rows,
        sigma=sigma,
        advantage=by_place(batch.advantage),
        weight=batch.weight[index],
        step_weight=weight,
        chunk=chunk,
        group=group,
        id=index,
        cond=batch.cond[group],
        extra={name: by_place(a) for name, a in batch.extra.items()},
    )


def place_keys(iteration, places, key=KEY):
    """Keys of an iteration's places, as an update addresses them."""
    key = jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), iteration)
    return jnp.stack([jax.random.fold_in(key, place) for place in range(places)])


def every_place(role):
    """A role of x [n, b, ...]: of all places at once."""

    def velocity(x, sigma, cond):
        places = len(x)
        v = role(x.reshape(-1, *x.shape[2:]), sigma.reshape(-1), jnp.tile(cond, (places, *[1] * (cond.ndim - 1))))
        return v.reshape(x.shape)

    return velocity


def direct_loss(objective, params, case, index, *, base=None, averages=None, using=TOOLS):
    """The loss of the samples of an index: one function of all of them, with no update around it."""
    own, keys = roles(params, averages or {}, base), place_keys(0, len(case.plan.train))
    weight = case.batch.weight[index]
    if objective.span != "step":
        own = {name: every_place(role) for name, role in own.items()}
        loss, _ = objective(own, seen(case.batch, case.plan, index), keys, using)
        return (weight * loss).sum() / weight.sum()
    total = 0.0
    for place, key in enumerate(keys):
        samples = seen(case.batch, case.plan, index, place)
        total += (weight * samples.step_weight * objective(own, samples, key, using)[0]).sum()
    return total / (len(keys) * weight.sum())


def direct_gradient(objective, params, case, index=None, **others):
    index = case.ids if index is None else index
    return jax.jit(jax.grad(lambda params: direct_loss(objective, params, case, index, **others)))(params)


def log_ratios(role, samples, using):
    """log p / p_old of every row, averaged over the latent: [n, b], of all places at once."""
    row = samples.rows
    v = role(row.x, using.sampler.timestep(row.sigma), samples.cond)

    def now(row, v):
        transition = using.sampler.step(row.x, v, row.sigma, row.sigma_next, row.eta)
        return using.sampler.log_prob_map(transition, row.x_next)

    return jax.vmap(now)(row, v).mean(-1) - row.log_prob.mean(-1), v


class Spanning(Objective):
    """What the two objectives below have in common."""

    roles: ClassVar = frozenset({"base"})
    on_policy: ClassVar = {"ratio/max_deviation": "ratio_tolerance"}


class Sequence(Spanning):
    """One ratio of all rows of a sample, clipped; and a little distance to the base."""

    span: ClassVar = "window"

    def __call__(self, roles, samples, key, tools):
        change, v = log_ratios(roles["train"], samples, tools)
        anchor = roles["base"](samples.rows.x, samples.rows.sigma, samples.cond)
        ratio, advantage = jnp.exp((samples.step_weight * change).mean(0)), samples.advantage[0, :, 0]
        loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 0.9, 1.1))
        loss += 0.1 * jnp.square(v - anchor).mean((0, 2, 3))
        return loss, {"ratio/max_deviation": jnp.abs(ratio - 1), "loss/policy": loss}


class Balance(Spanning):
    """Log-ratios of sequences, normalised over their group, meet the group's advantages."""

    span: ClassVar = "group"

    def __call__(self, roles, samples, key, tools):
        change, _ = log_ratios(roles["train"], samples, tools)
        same = (samples.group[:, None] == samples.group) & (samples.weight > 0)

        def log_softmax(a):
            return a - jax.nn.logsumexp(jnp.where(same, a[None], -jnp.inf), axis=1)

        change = (samples.step_weight * change).sum(0)
        loss = -jnp.exp(log_softmax(samples.advantage[0, :, 0])) * log_softmax(change)
        return loss, {"ratio/max_deviation": jnp.abs(jnp.exp(change) - 1), "loss/policy": loss}
