import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixgrpo_jax.flow.plans import PlanConfig, WindowState, make_plan
from mixgrpo_jax.flow.rollout import Sampler, rollout
from mixgrpo_jax.rl.objectives import GRPOConfig, Row, grpo
from mixgrpo_jax.rl.update import apply_updates, assign, init_state, make_update, stochastic_round
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program

GROUP_ID = jnp.repeat(jnp.arange(2), 4)
ADVANTAGE = jnp.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.1, -0.1])
TRAIN = np.array([0, 2], np.int32)


@pytest.fixture
def setting(toy):
    velocity, params, noise, cond = toy
    sampler = Sampler()
    plan = make_plan(PlanConfig(num_steps=8, length=3), WindowState(1, 0, 0))
    sampled = rollout(
        velocity, params, plan, noise, cond, jax.random.key(3), sampler=sampler, window_length=3, group_size=4
    )
    objective = grpo(velocity, sampler, GRPOConfig(clip_low=0.2, clip_high=0.2))
    return objective, params, sampled.rows, cond


def run(setting, optimiser, num_updates, micro_batch, ema_decay=0.9):
    objective, params, rows, cond = setting
    update = make_update(objective, optimiser, num_updates=num_updates, micro_batch=micro_batch, ema_decay=ema_decay)
    return jax.jit(update)(init_state(params, optimiser), None, rows, ADVANTAGE, cond, TRAIN)


def full_gradient(setting, samples, params=None):
    objective, start, rows, cond = setting
    params = start if params is None else params

    def loss(params):
        total = 0.0
        for step in TRAIN:
            row = Row(
                rows.x[step][samples],
                rows.x_next[step][samples],
                rows.log_prob[step][samples],
                rows.sigma[step],
                rows.sigma_next[step],
                ADVANTAGE[samples],
                cond[GROUP_ID[samples]],
            )
            total += objective(params, None, row)[0] / len(TRAIN)
        return total

    return jax.grad(loss)(params)


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_accumulation_does_not_change_the_gradient(setting, micro_batch):
    state, _ = run(setting, optax.sgd(1.0), num_updates=1, micro_batch=micro_batch)
    expected = full_gradient(setting, jnp.arange(8))
    for name, start in setting[1].items():
        np.testing.assert_allclose(start - state.params[name], expected[name], rtol=1e-4, atol=1e-6)


def test_updates_follow_each_other(setting):
    state, metrics = run(setting, optax.sgd(0.1), num_updates=2, micro_batch=2)
    params = setting[1]
    for samples in (jnp.array([0, 4, 1, 5]), jnp.array([2, 6, 3, 7])):
        gradient = full_gradient(setting, samples, params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    for name in params:
        np.testing.assert_allclose(state.params[name], params[name], rtol=1e-4, atol=1e-6)
    assert state.step == 2
    assert metrics["ratio/max_deviation"].shape == (2, 2)  # by update and trained step
    assert metrics["ratio/max_deviation"][0].max() < 1e-5  # the first is on policy,
    assert metrics["ratio/max_deviation"][1].max() > 2e-5  # the second is not
    assert metrics["grad_norm"].shape == (2,)


def test_average_of_the_parameters(setting):
    state, _ = run(setting, optax.sgd(0.1), num_updates=1, micro_batch=4, ema_decay=0.75)
    for name, start in setting[1].items():
        np.testing.assert_allclose(state.ema[name], 0.75 * start + 0.25 * state.params[name], rtol=1e-5)


def test_no_average_is_kept_where_none_is_asked_for(setting):
    objective, params, rows, cond = setting
    optimiser = optax.sgd(0.1)
    update = make_update(objective, optimiser, num_updates=2, micro_batch=2, ema_decay=0.0)
    state, _ = jax.jit(update)(init_state(params, optimiser, False), None, rows, ADVANTAGE, cond, TRAIN)
    assert state.ema is None
    averaged, _ = run(setting, optimiser, num_updates=2, micro_batch=2)
    jax.tree.map(np.testing.assert_array_equal, state.params, averaged.params)


@pytest.mark.parametrize("value", [1.0, -1.00390625 + 2**-12, 3e-5, 1e30])
def test_stochastic_rounding_is_right_on_average(value):
    x = jnp.full(200_000, value)
    rounded = stochastic_round(x, jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16 and len(np.unique(np.asarray(rounded, np.float32))) <= 2
    np.testing.assert_allclose(np.asarray(rounded, np.float64).mean(), np.float32(value), rtol=3e-5)
    special = jnp.array([0.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(np.asarray(stochastic_round(special, jax.random.key(1)), np.float32), special)


def test_small_updates_of_bf16_parameters_add_up():
    params, step = {"w": jnp.ones(1000, jnp.bfloat16)}, {"w": jnp.full(1000, 1e-4)}  # a fortieth of a unit
    for index in range(100):
        params = apply_updates(params, step, jax.random.key(index))
    assert params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(params["w"], np.float32).mean(), 1.01, rtol=1e-3)


def test_the_state_of_bf16_parameters_is_fp32(setting):
    objective, params, rows, cond = setting
    params, optimiser = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), optax.adamw(1e-3)
    update = make_update(objective, optimiser, num_updates=2, micro_batch=2, ema_decay=0.5, key=jax.random.key(0))
    before = init_state(params, optimiser)
    after, _ = jax.jit(update)(before, None, rows, ADVANTAGE, cond, TRAIN)
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, before)
    assert {a.dtype for a in jax.tree.leaves((after.opt_state[0].nu, after.ema))} == {jnp.dtype(jnp.float32)}
    assert {a.dtype for a in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("prompts", "group", "updates", "micro_batch"),
    [(16, 12, 4, 24), (8, 4, 2, 16), (4, 6, 3, 2), (3, 8, 2, 4), (6, 2, 1, 3)],
)
def test_every_update_takes_its_share_of_every_group_and_of_every_device(prompts, group, updates, micro_batch):
    samples = assign(prompts * group, group, updates, micro_batch)
    assert sorted(samples.ravel()) == list(range(prompts * group))
    for update in samples:
        assert set(np.bincount(update.ravel() // group)) == {group // updates}
    for ways in (n for n in range(1, micro_batch + 1) if micro_batch % n == 0):
        device = samples * ways // (prompts * group)
        np.testing.assert_array_equal(
            device, np.broadcast_to(np.repeat(np.arange(ways), micro_batch // ways), samples.shape)
        )


ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from mixgrpo_jax.flow.rollout import Rows, Sampler
from mixgrpo_jax.rl.objectives import GRPOConfig, grpo
from mixgrpo_jax.rl.update import init_state, make_update
from mixgrpo_jax.runtime import hlo, mesh as meshes
from tests.conftest import toy_velocity

mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
objective = grpo(toy_velocity, Sampler(), GRPOConfig())
for prompts, group, micro_batch in ((16, 12, 24), (8, 6, 24), (32, 2, 8)):
    update = make_update(objective, optax.sgd(0.1), num_updates=2, micro_batch=micro_batch, ema_decay=0.0)
    place = lambda size, axis: meshes.batch_sharding(mesh, size, axis)
    array = lambda size, axis, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(size, axis))
    count, whole = prompts * group, NamedSharding(mesh, P())
    maps = array(count, 1, 3, count, 64, 4), array(count, 1, 3, count, 64, 4), array(count, 1, 3, count, 64)
    rows, sigma = Rows(*maps, *(jax.ShapeDtypeStruct((3,), jnp.float32, sharding=whole),) * 2), None
    params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
    state = jax.eval_shape(lambda: init_state(params, optax.sgd(0.1), False))
    state = meshes.placed(state, jax.tree.map(lambda _: whole, state))
    arguments = (state, None, rows, array(count, 0, count), array(prompts, 0, prompts, 4), np.arange(2))
    cost = hlo.cost(jax.jit(update, out_shardings=whole).lower(*arguments).compile().as_text())
    assert cost.collectives.keys() == {"all-reduce"}, cost.collectives  # of gradients and metrics
    assert cost.moved < 1000 * 2 * count // micro_batch, cost.moved  # bytes; a sample has 1024 in each map
"""


def test_no_sample_moves_on_a_mesh():
    run_program(ON_EIGHT, **virtual_devices(8))
