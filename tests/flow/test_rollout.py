import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mixgrpo_jax.flow import plans, schedules, solvers
from mixgrpo_jax.flow.plans.ode import ODE
from mixgrpo_jax.flow.plans.per_prompt import PerPrompt
from mixgrpo_jax.flow.plans.tree import Tree
from mixgrpo_jax.flow.plans.window import Window, WindowState
from mixgrpo_jax.flow.rollout import integrate, rollout
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.runtime.mesh import virtual_devices
from mixgrpo_jax.runtime.metrics import compilations
from tests.python import run_program

GROUP = 3
FLASH = dict(suffix_ratio=0.4, solver_order=2)
TREE = Tree(num_steps=12, splits=(2, 6), factors=(2, 3), length=1, group=6)
KEY = jax.random.key(7)
EULER = Sampler()


def planned(start, group=1, **fields):
    """A planner with a window, and its plan for two prompts."""
    planner = Window(group=group, **fields)
    return planner, planner.plan(WindowState(start, 0, 0), 2)


@partial(jax.jit, static_argnames=("velocity", "layout", "sampler"))
def run(velocity, params, plan, x, cond, key, ids, layout, sampler):
    return rollout(partial(velocity, params), plan, x, cond, key, ids, layout=layout, sampler=sampler)


def draw(toy, planner, plan, sampler=EULER, rows=2, key=KEY):
    """Two prompts' groups, beginning with so many rows."""
    velocity, params, noise, cond = toy
    x, ids = jnp.repeat(noise, rows // 2, 0), jnp.arange(2 * planner.group)
    return run(velocity, params, plan, x, cond, key, ids, planner.layout, sampler)


def draw_alone(toy, planner, plan, prompt, ids, sampler=EULER):
    """Samples of one prompt, by its column of the plan."""
    velocity, params, noise, cond = toy
    own = jax.tree.map(lambda a: a[..., prompt : prompt + 1], plan)
    x, cond = noise[prompt : prompt + 1], cond[prompt : prompt + 1]
    return run(velocity, params, own, x, cond, KEY, ids, planner.layout, sampler)


def counted(velocity):
    """The velocity, and a list that grows by one entry (rows) at every executed call."""
    calls = []

    def wrapped(x, sigma, cond):
        jax.debug.callback(lambda sigma: calls.append(x.shape[0]), sigma)
        return velocity(x, sigma, cond)

    return wrapped, calls


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", [{}, FLASH, FLASH | dict(solver_order=3)])
def test_evaluations_executed_are_the_plans(toy, method, shared):
    velocity, params, noise, cond = toy
    velocity, calls = counted(partial(velocity, params))
    planner = Window(num_steps=9, length=2, bound=9, group=GROUP, **method)
    sampler = Sampler(solver="dpm_midpoint" if method else "euler")
    prefix_rows = 2 if shared else 2 * GROUP
    noise = jnp.repeat(noise, prefix_rows // 2, 0)

    def draw_counted(plan):
        ids = jnp.arange(2 * GROUP)
        return rollout(velocity, plan, noise, cond, KEY, ids, layout=planner.layout, sampler=sampler)

    program, before = jax.jit(draw_counted), compilations("draw_counted")
    for start in range(planner.last_start + 1):
        calls.clear()
        plan = planner.plan(WindowState(start, 0, 0), 2)
        sampled = jax.block_until_ready(program(plan))
        jax.effects_barrier()
        expected = plans.evaluations(planner.layout, plan, prefix_rows, 2 * GROUP)
        suffix = int(plan.segments[2].taken[0])
        assert expected == start * prefix_rows + (2 + suffix) * 2 * GROUP
        assert sorted(calls) == sorted([prefix_rows] * start + [2 * GROUP] * (2 + suffix))
        assert int(sampled.executed) == int(sampled.used) == expected
    assert compilations("draw_counted") - before == 1  # every position and every suffix length by one program


@pytest.mark.parametrize("shared", [True, False])
def test_a_tree_shares_its_evaluations(toy, shared):
    velocity, params, noise, cond = toy
    velocity, calls = counted(partial(velocity, params))
    plan, rows = TREE.plan(TREE.initial(), 1), 1 if shared else 6
    x = jnp.repeat(noise[:1], rows, 0)
    sampled = rollout(velocity, plan, x, cond[:1], KEY, jnp.arange(6), layout=TREE.layout, sampler=Sampler())
    jax.block_until_ready(sampled)
    jax.effects_barrier()
    # Two steps shared by one row, four by two, six by six: 46 evaluations of 72.
    assert sorted(calls) == ([1] * 2 + [2] * 4 + [6] * 6 if shared else [6] * 12)
    assert sum(calls) == int(sampled.executed) == int(sampled.used) == (46 if shared else 72)
    assert plans.evaluations(TREE.layout, plan, rows, 6) == sum(calls)


@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("method", [{}, FLASH])
def test_shared_prefix_equals_unshared(toy, start, method):
    planner, plan = planned(start, GROUP, num_steps=10, length=3, **method)
    sampler = Sampler(solver="dpm_midpoint" if method else "euler")
    shared, unshared = (draw(toy, planner, plan, sampler, rows) for rows in (2, 2 * GROUP))
    for a, b in zip(jax.tree.leaves(shared[:2]), jax.tree.leaves(unshared[:2])):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert jnp.abs(shared.x0[0] - shared.x0[1]).max() > 1e-2  # the window has told the group's members apart


def test_siblings_share_their_trajectory_and_cousins_differ(toy):
    plan = TREE.plan(TREE.initial(), 2)
    shared = draw(toy, TREE, plan)
    first, second = shared.rows
    assert first.x.shape == (1, 4, 3, 4) and second.x.shape == (1, 12, 3, 4)
    # Before the first branch, what will be two nodes is one row; after it, they are apart.
    np.testing.assert_array_equal(first.x[0, 0::2], first.x[0, 1::2])
    assert jnp.abs(first.x_next[0, 0::2] - first.x_next[0, 1::2]).max() > 1e-2
    # At the second, three siblings each are still one, and the nodes' trajectories are not.
    triples = second.x[0].reshape(4, 3, 3, 4)
    np.testing.assert_array_equal(triples, jnp.broadcast_to(triples[:, :1], triples.shape))
    for a, b in itertools.combinations(triples[:, 0], 2):
        assert jnp.abs(a - b).max() > 1e-2
    for a, b in itertools.combinations(shared.x0, 2):
        assert jnp.abs(a - b).max() > 1e-2
    # Where every sample has a row of its own from the start, leaves below one node have the same rows there.
    alone = draw(toy, TREE, plan, rows=12)
    np.testing.assert_allclose(alone.x0, shared.x0, atol=1e-5)
    for own, nodes, leaves in zip(alone.rows, shared.rows, (3, 1)):
        for a, b in zip(own, nodes):
            np.testing.assert_allclose(a, jnp.repeat(b, leaves, axis=1), atol=1e-5)


def test_one_program_serves_every_place_of_a_trees_splits(toy):
    planner = Tree(num_steps=8, splits=(0, 2), late=(3, 6), late_after=3, jitter=6.0, group=6)
    before, starts = compilations("run"), set()
    for iteration in range(4):
        state = planner.initial()._replace(iteration=iteration)
        plan = planner.plan(state, 2)
        drawn = draw(toy, planner, plan)
        assert int(drawn.executed) == int(drawn.used) == plans.evaluations(planner.layout, plan, 2, 12)
        starts.add(tuple(planner.starts(state)))
    assert compilations("run") - before == 1 and len(starts) > 2


def test_the_noise_of_a_depth_is_the_densitys_too(toy):
    """BranchGRPO's fourfold noise: what is recorded is the log-density of what was sampled."""
    velocity, params, _, cond = toy
    planner = dataclasses.replace(TREE, noise=(4.0, 1.0))
    first, second = draw(toy, planner, planner.plan(planner.initial(), 2)).rows
    x, cond = first.x[0], jnp.repeat(cond, 2, 0)
    sigma, sigma_next = (float(a[0, 0]) for a in (first.sigma, first.sigma_next))
    v, step = velocity(params, x, first.sigma[0], cond), sigma_next - sigma
    g = 4 * EULER.eta * np.sqrt(sigma / (1 - sigma))
    mean = x + step * (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v))
    own, other = (stats.norm.logpdf(first.x_next[0], mean, of * np.sqrt(-step)).mean(-1) for of in (g, g / 4))
    np.testing.assert_allclose(first.log_prob[0], own, atol=1e-4)
    assert np.abs(first.log_prob[0] - other).mean() > 1
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, node), 2) for node in range(4)]
    noise = (first.x_next[0] - mean) / (g * np.sqrt(-step))
    np.testing.assert_allclose(noise, EULER.normal_of(jnp.stack(keys), (3, 4)), atol=1e-4)
    assert (first.eta == 4).all() and (second.eta == 1).all()


@pytest.mark.parametrize("solver", ["euler", "dpm_midpoint"])
@pytest.mark.parametrize("method", [{}, FLASH])
def test_windows_per_prompt_equal_each_prompt_alone(toy, solver, method):
    planner, sampler = PerPrompt(num_steps=10, length=2, bound=10, group=GROUP, **method), Sampler(solver=solver)
    plan = next(p for p in (planner.plan(WindowState(0, 0, i), 2) for i in range(99)) if np.ptp(p.step[0]) > 4)
    prefix, _, suffix = plan.segments
    assert prefix.taken[0] != prefix.taken[1] and suffix.taken[0] != suffix.taken[1]
    together = draw(toy, planner, plan, sampler)
    assert int(together.executed) == plans.evaluations(planner.layout, plan, 2, 2 * GROUP)
    used = 0
    for prompt in range(2):
        members = slice(prompt * GROUP, (prompt + 1) * GROUP)
        alone = draw_alone(toy, planner, plan, prompt, jnp.arange(2 * GROUP)[members], sampler)
        np.testing.assert_allclose(together.x0[members], alone.x0, atol=1e-5)
        for a, b in zip(together.rows[0], alone.rows[0]):
            np.testing.assert_allclose(a[:, members], b, atol=1e-5)
        assert int(alone.executed) == int(alone.used)
        used += int(alone.used)
    assert int(together.used) == used < int(together.executed)  # a prompt that is done waits for the other


@pytest.mark.parametrize(
    "planner",
    [
        Window(num_steps=8, length=2, group=6, **FLASH),
        PerPrompt(num_steps=8, length=2, group=6),
        TREE,
        Tree(num_steps=8, splits=(0, 3), factors=(3, 2), length=2, group=6, solver_order=2),
    ],
)
def test_a_sample_is_drawn_again_by_its_id_alone(toy, planner):
    heard = []

    class Heard(Sampler):
        def normal_of(self, keys, shape):
            noise = super().normal_of(keys, shape)
            jax.debug.callback(lambda noise: heard.append(np.asarray(noise)), noise, ordered=True)
            return noise

    sampler = Heard(solver="dpm_midpoint")
    plan = planner.plan(planner.initial()._replace(iteration=4), 2)
    drawn = jax.block_until_ready(draw(toy, planner, plan, sampler))
    jax.effects_barrier()
    noise = heard.copy()
    for sample in (1, 8, 11):
        heard.clear()
        again = draw_alone(toy, planner, plan, sample // 6, jnp.array([sample]), sampler)
        jax.block_until_ready(again)
        jax.effects_barrier()
        assert len(heard) == len(noise) == sum(segment.steps for segment in planner.layout if segment.sde)
        for whole, one in zip(noise, heard):
            np.testing.assert_array_equal(whole[sample * len(whole) // 12], one[0])
        np.testing.assert_allclose(again.x0[0], drawn.x0[sample], atol=1e-5)
        for whole, one in zip(drawn.rows, again.rows):
            own = jax.tree.map(lambda a: a[:, sample * a.shape[1] // 12], whole)  # noqa: B023
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:, 0], atol=1e-5), own, one)


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps", "precise", "dance_precise"])
def test_rows_are_the_trajectory_and_score_themselves(toy, kernel):
    velocity, params, _, cond = toy
    sampler = Sampler(kernel=kernel)
    planner, plan = planned(2, GROUP, num_steps=8, length=4)
    (rows,) = draw(toy, planner, plan, sampler).rows
    sigmas = schedules.shifted_sigmas(8, 3.0)
    np.testing.assert_array_equal(rows.x[1:], rows.x_next[:-1])
    np.testing.assert_array_equal(rows.sigma, np.tile(sigmas[2:6, None], 2 * GROUP))
    np.testing.assert_array_equal(rows.sigma_next, np.tile(sigmas[3:7, None], 2 * GROUP))
    assert rows.log_prob.shape == (4, 2 * GROUP, 3) and (rows.eta == 1).all()
    cond = jnp.repeat(cond, GROUP, 0)
    for step in range(4):
        transition, _ = sampler.transition(
            partial(velocity, params), rows.x[step], rows.sigma[step], rows.sigma_next[step], cond, rows.eta[step]
        )
        again = sampler.log_prob_map(transition, rows.x_next[step])
        np.testing.assert_allclose(again, rows.log_prob[step], atol=1e-5)
        # What was added to the mean is the noise at (key, sample, step of the schedule), in units of the std.
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, sample), 2 + step) for sample in range(2 * GROUP)]
        recovered = (rows.x_next[step] - transition.mean) / transition.std
        np.testing.assert_allclose(recovered, sampler.normal_of(jnp.stack(keys), (3, 4)), atol=1e-4)


def test_a_plans_eta_scales_the_noise_of_a_prompts_step(toy):
    planner, plan = planned(1, GROUP, num_steps=6, length=2)
    window = plan.segments[1]
    quiet = window._replace(eta=np.array([[1.0, 0.0], [1.0, 0.5]], np.float32))
    changed = plan._replace(segments=(plan.segments[0], quiet, plan.segments[2]))
    loud, mixed = (draw(toy, planner, each).rows[0] for each in (plan, changed))
    for a, b in zip(loud, mixed):
        np.testing.assert_array_equal(a[:, :GROUP], b[:, :GROUP])
    assert (mixed.log_prob[0, GROUP:] == 0).all()  # a deterministic step; its samples are still together
    np.testing.assert_array_equal(mixed.x_next[0, GROUP], mixed.x_next[0, GROUP + 1])
    # From one place, two samples are put apart by the noise alone: by half of it.
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, sample), 2) for sample in (GROUP, GROUP + 1)]
    noise, zero = Sampler().normal_of(jnp.stack(keys), (3, 4)), jnp.zeros((1, 3, 4))
    std = Sampler(eta=0.35).step(zero, zero, window.sigma[1, 1], window.sigma_next[1, 1]).std
    apart = mixed.x_next[1, GROUP] - mixed.x_next[1, GROUP + 1]
    np.testing.assert_allclose(apart, std * (noise[0] - noise[1]), atol=1e-5)


def test_without_noise_it_is_the_ode(toy):
    velocity, params, noise, cond = toy
    planner, plan = planned(3, num_steps=8, length=2)
    sampled = draw(toy, planner, plan, Sampler(eta=1e-6))
    exact = integrate(partial(velocity, params), schedules.shifted_sigmas(8, 3.0), noise, cond)
    np.testing.assert_allclose(sampled.x0, exact, atol=1e-4)


def test_an_ode_records_its_first_step(toy):
    velocity, params, noise, cond = toy
    planner, sampler = ODE(num_steps=8, group=2), Sampler(solver="dpm_midpoint")
    plan = planner.plan(planner.initial(), 2)
    drawn = draw(toy, planner, plan, sampler, rows=4)
    x, own, sigmas = jnp.repeat(noise, 2, 0), jnp.repeat(cond, 2, 0), schedules.shifted_sigmas(8, 3.0)
    (rows,) = drawn.rows
    np.testing.assert_array_equal(rows.x[0], x)
    v = velocity(params, x, jnp.ones(4), own)
    np.testing.assert_allclose(rows.x_next[0], x + (sigmas[1] - 1) * v, atol=1e-6)
    assert (rows.log_prob == 0).all() and (rows.eta == 0).all() and rows.log_prob.shape == (1, 4, 3)
    orders = plans.solver_orders(2, 8)
    exact = integrate(partial(velocity, params), sigmas, x, own, orders=orders, solver="dpm_midpoint")
    np.testing.assert_allclose(drawn.x0, exact, atol=1e-5)
    assert int(drawn.executed) == 4 * 8


def test_noise_is_addressed_by_sample_and_step(toy):
    velocity, params, _, cond = toy
    planner, plan = planned(0, num_steps=6, length=2)
    both = draw(toy, planner, plan).rows[0].x_next[0]
    first = draw_alone(toy, planner, plan, 0, jnp.arange(1)).rows[0].x_next[0]
    np.testing.assert_allclose(both[:1], first, atol=1e-6)  # a sample's noise does not depend on the batch
    other = draw(toy, planner, plan, key=jax.random.key(8)).rows[0].x_next[0]
    assert jnp.abs(both - other).max() > 1e-2
    # Noise of step 2 is the same wherever the window began.
    later = draw(toy, *planned(1, num_steps=6, length=2)).rows[0]
    sampler = Sampler()
    recovered = []
    for rows, offset in ((draw(toy, planner, plan).rows[0], 1), (later, 0)):
        transition, _ = sampler.transition(
            partial(velocity, params), rows.x[offset], rows.sigma[offset], rows.sigma_next[offset], cond
        )
        recovered.append((rows.x_next[offset] - transition.mean) / transition.std)
    np.testing.assert_allclose(*recovered, atol=1e-4)


ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mixgrpo_jax.flow.plans.tree import Tree, TreeState
from mixgrpo_jax.flow.plans.window import Window, WindowState
from mixgrpo_jax.flow.rollout import initial_noise, rollout
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.runtime.mesh import make_mesh

for planner, state in (
    (Window(num_steps=4, length=2, group=2), WindowState(1, 0, 0)),
    (Tree(num_steps=5, splits=(1, 3), factors=(2, 2), length=1, group=4), TreeState(0)),
):
    def draw(plan, key):
        noise = initial_noise(Sampler(), key, jnp.arange(8), (16, 4))
        still = lambda x, sigma, cond: jnp.zeros_like(x)
        ids = jnp.arange(8 * planner.group)
        drawn = rollout(still, plan, noise, noise, key, ids, layout=planner.layout, sampler=Sampler())
        return noise, drawn.x0, *[x for rows in drawn.rows for x in rows.x_next]

    asked = planner.plan(state, 8), jax.random.key(3)
    one = jax.jit(draw)(*asked)
    assert len(jax.devices()) == 8 and one[0].std() > 0.9 and (one[0][0] != one[2][0]).mean() > 0.9
    for sizes in ({"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "context": 4}, {"data": 2, "fsdp": 2, "context": 2}):
        place = NamedSharding(make_mesh(sizes), P(("data", "fsdp"), "context"))
        on_mesh = jax.jit(draw, out_shardings=(place,) * 4)(*asked)
        assert len({shard.device for shard in on_mesh[0].addressable_shards}) == 8
        if jax.__version_info__ < (0, 11):
            jax.tree.map(np.testing.assert_array_equal, on_mesh, one)
        else:  # whose compiler fuses the arithmetic after the draws in another way on a mesh
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), on_mesh, one)
"""


def test_noise_is_identical_whatever_the_mesh():
    run_program(ON_EIGHT, **virtual_devices(8))


def test_reference_exact_truncates_timesteps_and_rounds_noise():
    sampler = Sampler(reference_exact=True)
    sigmas = schedules.shifted_sigmas(25, 3.0)
    assert np.rint(1000 * sampler.timestep(jnp.asarray(sigmas[:6]))).tolist() == [1000, 986, 971, 956, 940, 923]
    noise = sampler.normal(KEY, jnp.arange(2), (64,))
    np.testing.assert_array_equal(noise, noise.astype(jnp.bfloat16).astype(jnp.float32))
    assert Sampler().timestep(0.1234) == 0.1234


def test_noised_samples_are_on_the_path_and_addressed_by_their_ids():
    sampler, x0 = Sampler(), jax.random.normal(KEY, (3, 2, 5))
    sigma, ids = jnp.array([0.0, 0.4, 1.0]), jnp.array([7, 2, 5])
    x, eps = sampler.noised(KEY, ids, x0, sigma)
    np.testing.assert_array_equal(x[0], x0[0])
    np.testing.assert_allclose(x[1], 0.6 * x0[1] + 0.4 * eps[1], rtol=1e-6)
    np.testing.assert_array_equal(x[2], eps[2])
    np.testing.assert_array_equal(sampler.noised(KEY, ids[::-1], x0, sigma)[1], eps[::-1])


def test_integrate_by_hand(toy):
    velocity, params, x, cond = toy
    sigmas = schedules.shifted_sigmas(5, 3.0)
    result = integrate(partial(velocity, params), sigmas, x, cond, orders=np.full(5, 2), solver="dpm_heun")
    history = solvers.empty_history(x)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        v = velocity(params, x, jnp.full(2, sigma), cond)
        history, x = solvers.dpm_solver(history, x, v, sigma, sigma_next, 2, variant="heun")
    np.testing.assert_allclose(result, x, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("kernel", "flux"), ("solver", "rk4"), ("log_prob", "mean"), ("eta", 0.0)]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"sampler.{field}={value!r}"):
        Sampler(**{field: value})
