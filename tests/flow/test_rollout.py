import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow import plans, schedules, solvers
from mixgrpo_jax.flow.plans import PlanConfig, WindowState, make_plan
from mixgrpo_jax.flow.rollout import Sampler, integrate, rollout
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program

GROUP = 3
FLASH = dict(suffix_ratio=0.4, solver_order=2)
KEY = jax.random.key(7)


def plan_at(start, **fields):
    return make_plan(PlanConfig(**fields), WindowState(start, 0, 0))


def counted(velocity):
    """The velocity, and a list that grows by one entry (rows) at every executed call."""
    calls = []

    def wrapped(params, x, sigma, cond):
        jax.debug.callback(lambda sigma: calls.append(x.shape[0]), sigma)
        return velocity(params, x, sigma, cond)

    return wrapped, calls


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", [{}, FLASH, FLASH | dict(solver_order=3)])
def test_evaluations_executed_are_the_plans(toy, method, shared):
    velocity, params, noise, cond = toy
    velocity, calls = counted(velocity)
    config = PlanConfig(num_steps=9, length=2, bound=9, **method)
    repeats = 1 if shared else GROUP
    noise, cond = jnp.repeat(noise, repeats, 0), jnp.repeat(cond, repeats, 0)
    sampler = Sampler(solver="dpm_midpoint" if method else "euler")
    run = jax.jit(
        partial(rollout, velocity, sampler=sampler, window_length=2, group_size=GROUP // repeats), static_argnames=()
    )
    for start in range(config.last_start + 1):
        calls.clear()
        plan = make_plan(config, WindowState(start, 0, 0))
        sampled = jax.block_until_ready(run(params, plan, noise, cond, KEY))
        jax.effects_barrier()
        expected = plans.evaluations(plan, 2, GROUP, shared)["rollout"]
        prefix_rows = 2 if shared else 2 * GROUP
        suffix = int(plan.suffix_steps)
        assert expected == start * prefix_rows + (2 + suffix) * 2 * GROUP
        assert sorted(calls) == sorted([prefix_rows] * start + [2 * GROUP] * (2 + suffix))
        assert int(sampled.evaluations) == expected
    assert run._cache_size() == 1  # every position and every suffix length by one program


@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("method", [{}, FLASH])
def test_shared_prefix_equals_unshared(toy, start, method):
    velocity, params, noise, cond = toy
    plan = plan_at(start, num_steps=10, length=3, **method)
    sampler = Sampler(solver="dpm_midpoint" if method else "euler")
    run = partial(rollout, velocity, params, plan, key=KEY, sampler=sampler, window_length=3)
    shared = run(noise=noise, cond=cond, group_size=GROUP)
    unshared = run(noise=jnp.repeat(noise, GROUP, 0), cond=jnp.repeat(cond, GROUP, 0))
    for a, b in zip(jax.tree.leaves(shared[:2]), jax.tree.leaves(unshared[:2])):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert jnp.abs(shared.x0[0] - shared.x0[1]).max() > 1e-2  # the window has told the group's members apart


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps", "precise", "dance_precise"])
def test_rows_are_the_trajectory_and_score_themselves(toy, kernel):
    velocity, params, noise, cond = toy
    sampler, plan = Sampler(kernel=kernel), plan_at(2, num_steps=8, length=4)
    rows = rollout(velocity, params, plan, noise, cond, KEY, sampler=sampler, window_length=4, group_size=GROUP).rows
    np.testing.assert_array_equal(rows.x[1:], rows.x_next[:-1])
    np.testing.assert_array_equal(rows.sigma, plan.sigmas[2:6])
    np.testing.assert_array_equal(rows.sigma_next, plan.sigmas[3:7])
    cond = jnp.repeat(cond, GROUP, 0)
    for step in range(4):
        transition, _ = sampler.transition(
            velocity, params, rows.x[step], rows.sigma[step], rows.sigma_next[step], cond
        )
        again = sampler.log_prob_map(transition, rows.x_next[step])
        np.testing.assert_allclose(again, rows.log_prob[step], atol=1e-5)
        # The noise recovered from the step is standard normal, so the step's log-prob is a density's: near entropy.
        recovered = (rows.x_next[step] - transition.mean) / transition.std
        assert 0.5 < recovered.std() < 1.5


def test_without_noise_it_is_the_ode(toy):
    velocity, params, noise, cond = toy
    plan = plan_at(3, num_steps=8, length=2)
    sampled = rollout(velocity, params, plan, noise, cond, KEY, sampler=Sampler(eta=1e-6), window_length=2)
    ones = np.ones(8, np.int32)
    exact = integrate(velocity, params, schedules.shifted_sigmas(8, 3.0), ones, noise, cond)
    np.testing.assert_allclose(sampled.x0, exact, atol=1e-4)


def test_noise_is_addressed_by_sample_and_step(toy):
    velocity, params, noise, cond = toy
    run = partial(rollout, velocity, params, sampler=Sampler(), window_length=2)
    plan = plan_at(0, num_steps=6, length=2)
    both = run(plan, noise, cond, KEY).rows.x_next[0]
    first = run(plan, noise[:1], cond[:1], KEY).rows.x_next[0]
    np.testing.assert_allclose(both[:1], first, atol=1e-6)  # a sample's noise does not depend on the batch
    other = run(plan, noise, cond, jax.random.key(8)).rows.x_next[0]
    assert jnp.abs(both - other).max() > 1e-2
    # Noise of step 2 is the same wherever the window began.
    later = run(plan_at(1, num_steps=6, length=2), noise, cond, KEY).rows
    sampler = Sampler()
    recovered = []
    for rows, offset in ((run(plan, noise, cond, KEY).rows, 1), (later, 0)):
        transition, _ = sampler.transition(
            velocity, params, rows.x[offset], rows.sigma[offset], rows.sigma_next[offset], cond
        )
        recovered.append((rows.x_next[offset] - transition.mean) / transition.std)
    np.testing.assert_allclose(*recovered, atol=1e-4)


ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mixgrpo_jax.flow.plans import PlanConfig, WindowState, make_plan
from mixgrpo_jax.flow.rollout import Sampler, initial_noise, rollout
from mixgrpo_jax.runtime.mesh import make_mesh

def draw(plan, key):
    noise = initial_noise(Sampler(), key, jnp.arange(8), (16, 4))
    still = lambda params, x, sigma, cond: jnp.zeros_like(x)
    drawn = rollout(still, None, plan, noise, noise, key, sampler=Sampler(), window_length=2, group_size=2)
    return noise, drawn.x0, drawn.rows.x_next[0], drawn.rows.x_next[1]

asked = make_plan(PlanConfig(num_steps=4, length=2), WindowState(1, 0, 0)), jax.random.key(3)
one = jax.jit(draw)(*asked)
assert len(jax.devices()) == 8 and one[0].std() > 0.9 and (one[1] != one[2]).mean() > 0.9
for sizes in ({"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "context": 4}, {"data": 2, "fsdp": 2, "context": 2}):
    place = NamedSharding(make_mesh(sizes), P(("data", "fsdp"), "context"))
    on_mesh = jax.jit(draw, out_shardings=(place,) * 4)(*asked)
    assert len({shard.device for shard in on_mesh[0].addressable_shards}) == 8
    jax.tree.map(np.testing.assert_array_equal, on_mesh, one)
"""


def test_noise_is_identical_whatever_the_mesh():
    run_program(ON_EIGHT, **virtual_devices(8))


def test_reference_exact_truncates_timesteps_and_rounds_noise():
    sampler = Sampler(reference_exact=True)
    sigmas = schedules.shifted_sigmas(25, 3.0)
    assert np.rint(1000 * sampler.timestep(jnp.asarray(sigmas[:6]))).tolist() == [1000, 986, 971, 956, 940, 923]
    noise = sampler.normal(jax.random.split(KEY, 2), (64,))
    np.testing.assert_array_equal(noise, noise.astype(jnp.bfloat16).astype(jnp.float32))
    assert Sampler().timestep(0.1234) == 0.1234


def test_integrate_by_hand(toy):
    velocity, params, x, cond = toy
    sigmas = schedules.shifted_sigmas(5, 3.0)
    result = integrate(velocity, params, sigmas, np.full(5, 2, np.int32), x, cond, solver="dpm_heun")
    history = solvers.empty_history(x)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        v = velocity(params, x, sigma, cond)
        history, x = solvers.dpm_solver(history, x, v, sigma, sigma_next, 2, variant="heun")
    np.testing.assert_allclose(result, x, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("kernel", "flux"), ("solver", "rk4"), ("log_prob", "mean"), ("eta", 0.0)]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"sampler.{field}={value!r}"):
        Sampler(**{field: value})
