from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixgrpo_jax.flow.plans.window import Window, WindowState
from mixgrpo_jax.flow.rollout import rollout
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.update import Batch, count_evaluations
from tests.conftest import toy_velocity
from tests.rl.toys import (
    KEY,
    SAMPLER,
    TOOLS,
    Case,
    case,
    learn,
    moved,
    roles,
    seen,
    tools,
)

ADVANTAGE = jnp.array([1.5, 1.5, -0.5, -0.5])[None, :, None]
WIDE = dict(clip_low=0.1, clip_high=0.1)
OPEN = dict(clip_low=10.0, clip_high=10.0)


def made_by(toy, sampler=SAMPLER, **others):
    return case(toy, Window(num_steps=8, length=3, group=2), WindowState(1, 0, 0), sampler, **others)


def at(case, place=1):
    return seen(case.batch, case.plan, case.ids, place)


def loss_of(objective, samples, using=TOOLS, base=None):
    """params -> (losses [b], metrics), compiled."""
    return jax.jit(lambda params: objective(roles(params, {}, base), samples, KEY, using))


@pytest.fixture(scope="module")
def setting(toy):
    return made_by(toy, advantage=ADVANTAGE)


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps", "precise", "dance_precise"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient(toy, kernel, reduce):
    sampler = Sampler(kernel=kernel)
    made = made_by(toy, sampler, advantage=ADVANTAGE)
    samples, using = at(made), tools(sampler)
    _, metrics = loss_of(GRPO(**WIDE, reduce=reduce), samples, using)(made.params)
    assert metrics["ratio/max_deviation"].max() < 1e-5
    assert (metrics["ratio/clip_fraction"] == 0).all()

    def objective(params):
        return GRPO(**WIDE, reduce=reduce)(roles(params, {}, None), samples, KEY, using)[0].mean()

    def log_prob(params):
        row = samples.rows
        bound = partial(toy_velocity, params)
        transition, _ = sampler.transition(bound, row.x, row.sigma, row.sigma_next, samples.cond, row.eta)
        per_sample = sampler.log_prob_map(transition, row.x_next)
        score = per_sample.mean(1) if reduce == "mean" else 4 * per_sample.sum(1)
        return (-samples.advantage[:, 0] * score).mean()

    gradient, expected = (jax.jit(jax.grad(f))(made.params) for f in (objective, log_prob))
    for name in made.params:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "objective, weights",
    [
        (GRPO(**OPEN), {}),
        (GRPO(**OPEN, reduce="sum"), {}),
        (GRPO(), {"kl_rollout": 2.0}),
        (GRPO(), {"kl_base": 0.7}),
        (GRPO(), {"mse_base": 0.3}),
    ],
)
def test_gradient_against_finite_differences(setting, objective, weights):
    away, base = moved(setting.params, 0.02), moved(setting.params, 0.1)
    losses = loss_of(objective, at(setting), tools(**weights), base)
    gradient = jax.grad(lambda p: losses(p)[0].mean())(away)
    direction = moved(jax.tree.map(jnp.zeros_like, setting.params), 1.0)
    along = sum(jnp.vdot(gradient[name], direction[name]) for name in away)
    step = 3e-3
    ends = [losses(jax.tree.map(lambda p, d: p + s * d, away, direction))[0].mean() for s in (step, -step)]  # noqa: B023
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=2e-4)


def test_the_loss_is_flat_where_it_is_clipped_and_nowhere_else(setting):
    # Each sign of the advantage meets a ratio above and one below the clip range.
    objective, samples = GRPO(**WIDE), at(setting)
    log_ratio = jnp.array([0.3, -0.3, 0.3, -0.3])
    row = samples.rows
    samples = samples._replace(rows=row._replace(log_prob=row.log_prob - log_ratio[:, None]))
    losses = loss_of(objective, samples)
    direction, step = moved(jax.tree.map(jnp.zeros_like, setting.params), 1.0), 3e-3

    def moved_by(s):
        return losses(jax.tree.map(lambda p, d: p + s * d, setting.params, direction))[0]

    change = (moved_by(step) - moved_by(-step)) / (2 * step)
    # What is better already, and likelier by more than the clip, or worse and less likely, teaches nothing.
    np.testing.assert_array_equal(change == 0, [True, False, False, True])
    along = jax.jvp(lambda p: losses(p)[0], (setting.params,), (direction,))[1]
    np.testing.assert_allclose(change, along, rtol=2e-2, atol=1e-4)
    # Elsewhere it is -A r d log p.
    free = jax.jvp(lambda p: loss_of(GRPO(**OPEN), samples)(p)[0], (setting.params,), (direction,))[1]
    np.testing.assert_allclose(along[1:3], free[1:3], rtol=1e-5)
    assert (jnp.abs(free) > 1e-3).all()


def test_clipping_by_hand(toy):
    made = made_by(toy, advantage=jnp.array([1.5, -0.5, 1.5, -0.5])[None, :, None])
    samples = at(made)
    log_ratio = jnp.array([0.3, -0.3] * 2)  # pretend that the rollout's policy found the steps that much less likely
    row = samples.rows
    samples = samples._replace(rows=row._replace(log_prob=row.log_prob - log_ratio[:, None]))
    objective = GRPO(clip_low=0.1, clip_high=0.2)
    loss, metrics = loss_of(objective, samples)(made.params)
    # A=1.5, r=e^.3 is clipped to 1.2; A=-.5, r=e^-.3 is clipped to 0.9, where max takes the clipped, larger loss
    np.testing.assert_allclose(loss, [-1.5 * 1.2, 0.5 * 0.9] * 2, rtol=1e-5)
    assert (metrics["ratio/clip_fraction"] == 1).all()
    np.testing.assert_allclose(metrics["ratio/max_deviation"], np.abs(np.exp(log_ratio) - 1), rtol=1e-4)
    penalised, metrics = loss_of(objective, samples, tools(kl_rollout=2.0))(made.params)
    np.testing.assert_allclose(penalised - loss, 0.3**2, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl/rollout"], 0.3**2 / 2, rtol=1e-4)
    gradient = jax.grad(lambda p: loss_of(objective, samples)(p)[0].mean())(made.params)
    assert all(jnp.abs(g).max() == 0 for g in gradient.values())


def test_an_even_map_of_advantages_is_the_advantage(setting):
    # Without clipping, the mean of the positions' ratios has the gradient of the sample's, at the ratio 1.
    batch = setting.batch
    mapped = setting._replace(batch=batch._replace(advantage=jnp.broadcast_to(batch.advantage, (1, 4, 3))))
    (one, _), (many, metrics) = (learn(GRPO(**OPEN), each) for each in (setting, mapped))
    for name in one.params:
        np.testing.assert_allclose(many.opt_state[name], one.opt_state[name], rtol=1e-4, atol=1e-6)
    assert metrics["ratio/max_deviation"].max() < 1e-5


@pytest.mark.parametrize("reduce, scale", [("mean", 1), ("sum", 4)])
def test_a_ratio_of_each_position_by_hand(setting, reduce, scale):
    advantage = jax.random.normal(KEY, (1, 4, 3))
    made = setting._replace(batch=setting.batch._replace(advantage=advantage))
    samples, change = at(made), 0.1 * jax.random.normal(jax.random.key(1), (4, 3))
    row = samples.rows
    samples = samples._replace(rows=row._replace(log_prob=row.log_prob - change))
    loss, metrics = loss_of(GRPO(**WIDE, reduce=reduce), samples)(made.params)
    ratio, a = np.exp(scale * change), np.asarray(advantage[0])  # a position's sum is over its channels
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 0.9, 1.1))
    np.testing.assert_allclose(loss, expected.mean(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["ratio/max_deviation"], np.abs(ratio - 1).max(-1), rtol=1e-3)
    np.testing.assert_allclose(metrics["ratio/clip_fraction"], (np.abs(ratio - 1) > 0.1).mean(-1), rtol=1e-6)


def plain(params, x, sigma, cond):
    """A velocity of x of any rank."""
    del cond
    return jnp.tanh(x @ params["w"] + sigma.reshape(-1, *[1] * (x.ndim - 1)) * params["b"])


@pytest.mark.parametrize("shape", [(2,), (3, 2), (3, 4, 2)])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_samples_of_any_rank(shape, reduce):
    params = {"w": 0.7 * jax.random.normal(KEY, (2, 2)), "b": jnp.array([0.3, -0.2])}
    planner, noise = Window(num_steps=6, length=2, group=4), jax.random.normal(jax.random.key(1), (2, *shape))
    plan, cond = planner.plan(WindowState(1, 0, 0), 2), jnp.zeros((2, 1))

    @jax.jit
    def draw(params):
        bound = partial(plain, params)
        return rollout(bound, plan, noise, cond, KEY, jnp.arange(8), layout=planner.layout, sampler=SAMPLER)

    drawn = draw(params)
    assert drawn.rows[0].log_prob.shape == (2, 8, int(np.prod(shape[:-1])))
    advantage = 10 * jax.random.normal(jax.random.key(2), (1, 8, 1))
    made = Case(params, plan, Batch(drawn.x0, drawn.rows, advantage, jnp.ones(8), cond, {}), jnp.arange(8))
    objective, own = GRPO(**OPEN, reduce=reduce), partial(roles, velocity=plain)
    away = moved(params, 0.02)
    state, _ = learn(objective, made, away, make=own, micro_batch=4)
    along = optax.global_norm(state.opt_state)
    direction = jax.tree.map(lambda g: g / along, state.opt_state)

    def loss(step):
        at = jax.tree.map(lambda p, d: p + step * d, away, direction)
        return learn(objective, made, at, make=own, micro_batch=4)[1]["loss/total"][0]

    difference = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert along > 5e-2
    np.testing.assert_allclose(along, difference, rtol=2e-2)


def test_old_log_probs_of_the_update_are_the_rollouts(setting):
    objective = GRPO(old_log_prob="update")
    everything = seen(setting.batch, setting.plan, setting.ids)
    every = {"train": jax.vmap(partial(toy_velocity, setting.params), (0, 0, None))}
    log_prob = objective.prepare(every, everything, KEY, TOOLS)["log_prob"]
    assert log_prob.shape == (3, 4, 3)
    np.testing.assert_allclose(log_prob, setting.batch.rows[0].log_prob, atol=1e-5)
    assert GRPO(old_log_prob="rollout").prepare(every, everything, KEY, TOOLS) == {}

    _, metrics = learn(objective, setting)
    assert metrics["ratio/max_deviation"].max() < 1e-6
    assert metrics["ratio/rollout_deviation"].shape == (1, 3) and metrics["ratio/rollout_deviation"].max() < 1e-5
    _, cheaper = learn(GRPO(old_log_prob="rollout"), setting)
    assert "ratio/rollout_deviation" not in cheaper
    assert int(cheaper["nfe/update"]) == int(cheaper["nfe/gradient"]) == int(metrics["nfe/gradient"]) == 4 * 3
    assert int(metrics["nfe/update"]) == 2 * 4 * 3  # one evaluation more a trained row
    assert count_evaluations(objective, (), TOOLS, (3, 4), 3) == (6, 3)
    assert count_evaluations(GRPO(), (), TOOLS, (3, 4), 3) == (3, 3)


def test_old_log_probs_are_those_of_before_the_first_update(setting):
    # Later updates compare with the policy that began the iteration, not with their own start.
    steep = dict(num_updates=2, micro_batch=2)
    away = moved(setting.params, 0.05)
    _, metrics = learn(GRPO(**OPEN, old_log_prob="update"), setting, away, optimiser=optax.sgd(0.5), **steep)
    assert metrics["ratio/max_deviation"][0].max() < 1e-6 < 1e-4 < metrics["ratio/max_deviation"][1].max()
    assert metrics["ratio/rollout_deviation"][0].min() > 1e-4  # the samples are another policy's


def test_in_bf16_the_update_agrees_with_itself(toy):
    """The rollout's program may round where the update's compiler leaves it out: by some half of the clip range."""

    def rounded(params, x, sigma, cond):
        x, w = x.astype(jnp.bfloat16), params["w"].astype(jnp.bfloat16)
        h = jnp.tanh(x @ w + cond[:, None].astype(jnp.bfloat16)) @ w
        return jnp.tanh(h + (sigma[:, None, None] * params["b"]).astype(jnp.bfloat16))

    def rollouts(*given):
        return jax.lax.reduce_precision(rounded(*given).astype(jnp.float32), exponent_bits=8, mantissa_bits=7)

    made = made_by(toy, velocity=rollouts, advantage=ADVANTAGE)
    _, metrics = learn(GRPO(old_log_prob="update"), made, make=partial(roles, velocity=rounded))
    assert metrics["ratio/rollout_deviation"].max() > 2e-5
    assert metrics["ratio/max_deviation"].max() < 1e-6


def test_where_old_log_probs_come_from_by_default():
    assert GRPO().settled("bfloat16", stale=False).old_log_prob == "update"
    assert GRPO().settled("float32", stale=False).old_log_prob == "rollout"
    for chosen in ("rollout", "update"):
        assert GRPO(old_log_prob=chosen).settled("bfloat16", stale=False).old_log_prob == chosen
    assert GRPO(clip_low=2e-4, clip_high=1e-3).tolerance == 1e-4


@pytest.mark.parametrize(
    ("field", "value"), [("reduce", "max"), ("clip_low", 0.0), ("clip_high", -1.0), ("old_log_prob", "mean")]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"objective.{field}={value!r}"):
        GRPO(**{field: value})
