"""Gradients of rewards through a trajectory: finite differences, the sampler's own gradient, closed forms."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.plans.tail import Tail
from mixgrpo_jax.flow.rollout import Rows, rollout
from mixgrpo_jax.rl.objectives.adjoint import AdjointMatching
from mixgrpo_jax.rl.objectives.reward_gradient import DRaFT, LeapAlign, gradients
from mixgrpo_jax.rl.samples import Samples
from mixgrpo_jax.rl.update import count_evaluations
from tests.conftest import toy_velocity
from tests.rl.toys import KEY, SAMPLER, TOOLS, case, every_place, learn, moved

ALL = Tail(num_steps=3, last=0, group=3)


def reward(x0):
    """Of each sample, [B]: not linear, and another one at every position."""
    weight = jnp.arange(1.0, 13).reshape(3, 4) / 12
    return (weight * jnp.sin(2 * x0) + 0.1 * x0**2).sum((1, 2))


def drawn(toy, planner=ALL):
    """Two groups of a plan, with their rewards and these rewards' gradients."""
    made = case(toy, planner, planner.initial())
    value, gradient = reward(made.batch.x0), jax.grad(lambda x: reward(x).sum())(made.batch.x0)
    extra = {"reward_grad": gradient[None], "reward": value[None]}
    return made._replace(batch=made.batch._replace(extra=extra))


def of_sampler(toy, planner, made):
    """The gradient of -mean R through the sampler, whose parameters are followed in the recorded segment."""

    def loss(params):
        x, segments = jax.random.normal(KEY, (len(made.ids), 3, 4)), made.plan.segments
        for number, own in enumerate((jax.lax.stop_gradient(made.params), params)):
            plan, layout = made.plan._replace(segments=segments[number:][:1]), planner.layout[number:][:1]
            velocity = partial(toy_velocity, own)
            x = rollout(velocity, plan, x, toy[3], KEY, made.ids, layout=layout, sampler=SAMPLER).x0
        return -reward(x).mean()

    return jax.jit(jax.grad(loss))(made.params)


def assert_close(found, expected, rtol=2e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def gradient_of(objective, made, **others):
    return learn(objective, made, base=made.params, **others)[0].opt_state


@pytest.mark.parametrize("planner", [ALL, replace(ALL, jump=True)])
def test_draft_is_the_gradient_of_the_sampler_through_what_is_recorded(toy, planner):
    made, places = drawn(toy, planner), planner.num_trained
    state, metrics = learn(DRaFT(), made)
    assert_close(state.opt_state, of_sampler(toy, planner, made))
    assert np.abs(metrics["loss/policy"]).max() < 1e-4  # nothing has moved yet
    assert np.asarray(metrics["velocity/rollout_deviation"]).max() < 1e-5
    counts = 1 + 2 * (places - 1) + places, places  # checked, taken back through, trained
    assert count_evaluations(DRaFT(), [], TOOLS, (3, 4), places) == counts
    assert (metrics["nfe/update"], metrics["nfe/gradient"]) == tuple(6 * n for n in counts)


# In float64: a trajectory of T steps for two samples, as an objective sees it, all by hand.
SIGMA = np.array([1.0, 0.8, 0.45, 0.2, 0.0])


def exact(toy, at):
    """(params, cond, x [T + 1, B, S, C], samples) of places [n] among the steps."""
    _, params, noise, cond = jax.tree.map(lambda a: np.asarray(a, np.float64) if hasattr(a, "ndim") else a, toy)
    x = [jnp.asarray(noise)]
    for here, there in itertools.pairwise(SIGMA):
        x.append(x[-1] + (there - here) * toy_velocity(params, x[-1], jnp.full(2, here), cond))
    x, at = jnp.stack(x), np.array(at)
    n, ones = len(at), jnp.ones((len(at), 2))
    rows = Rows(x[at], x[at + 1], jnp.zeros((n, 2, 3)), SIGMA[at, None] * ones, SIGMA[at + 1, None] * ones, ones)
    extra = {"reward_grad": jnp.stack([jax.grad(lambda x: reward(x).sum())(x[-1])] * n)}
    extra["reward"] = jnp.stack([reward(x[-1])] * n)
    none = jnp.zeros((n, 2, 1))
    samples = Samples(x[-1], rows, rows.sigma, none, ones[0], ones, ones, jnp.arange(2), jnp.arange(2), cond, extra)
    return params, cond, x, samples


def loss_of(objective, params, samples, base):
    """The mean over places and samples, of parameters, where `prepare` has seen the base's."""
    before = {"train": every_place(partial(toy_velocity, base)), "base": every_place(partial(toy_velocity, base))}
    found = objective.prepare(before, samples, KEY, TOOLS)
    own, n = {"train": partial(toy_velocity, params), "base": partial(toy_velocity, base)}, len(samples.sigma)
    losses = []
    for i in range(n):
        rows, extra = Rows(*(a[i] for a in samples.rows)), {name: a[min(i, len(a) - 1)] for name, a in found.items()}
        here = samples._replace(rows=rows, sigma=samples.sigma[i], extra=extra)
        losses.append(objective(own, here, KEY, TOOLS)[0])
    return jnp.stack(losses).mean()


def check_differences(found, function, params, step=1e-6):
    """A gradient in the parameters is that of a function of them, at some entries by central differences."""
    function = jax.jit(function)
    for name, leaf in params.items():
        for place in list(np.ndindex(leaf.shape))[::5]:
            by = np.zeros(leaf.shape)
            by[place] = step
            high, low = (function(params | {name: leaf + sign * by}) for sign in (1, -1))
            assert float(found[name][place]) == pytest.approx(float(high - low) / (2 * step), rel=1e-6, abs=1e-8)


def through(params, x, cond, sigmas):
    for here, there in itertools.pairwise(sigmas):
        x = x + (there - here) * toy_velocity(params, x, jnp.full(2, here), cond)
    return x


@pytest.mark.parametrize("at", [(0, 1, 2, 3), (2, 3), (3,)])
def test_draft_in_float64_is_what_finite_differences_of_the_whole_chain_say(toy, at):
    with jax.enable_x64(True):
        params, cond, x, samples = exact(toy, at)
        found = jax.grad(lambda own: loss_of(DRaFT(), own, samples, params))(params)
        assert found["w"].dtype == jnp.float64
        check_differences(found, lambda own: -reward(through(own, x[at[0]], cond, SIGMA[at[0] :])).mean(), params)


def test_leap_align_in_float64_is_what_finite_differences_of_its_two_leaps_say(toy):
    alpha, tau, (k, j) = 0.3, 1e-3, (0, 2)
    with jax.enable_x64(True):
        params, cond, x, samples = exact(toy, (k, j))
        at, to, x_k, x_j, x0 = SIGMA[k], SIGMA[j], x[k], x[j], x[-1]

        def leap(own, x, here, there, seen=None):
            return x + (there - here) * toy_velocity(own, x if seen is None else seen, jnp.full(2, here), cond)

        error = sum(
            jnp.maximum(jnp.abs(landed - true).mean((1, 2)), tau)
            for landed, true in ((leap(params, x_k, at, to), x_j), (leap(params, x_j, to, 0), x0))
        )
        assert (error > 4 * tau).all()

        def loss(own):  # values stay on the trajectory, and move as the leaps do
            moved = x_j + leap(own, x_k, at, to) - leap(params, x_k, at, to)
            seen = alpha * moved + (1 - alpha) * x_j
            end = x0 + leap(own, moved, to, 0, seen) - leap(params, x_j, to, 0)
            return (-reward(end) / error).mean()

        objective = LeapAlign(nested=alpha, tau=tau)
        found = jax.grad(lambda own: loss_of(objective, own, samples, params))(params)
        check_differences(found, loss, params)


def test_adjoints_in_float64_are_the_rewards_gradients_in_the_states(toy):
    with jax.enable_x64(True):
        params, cond, x, samples = exact(toy, (1, 2, 3))
        found = gradients(every_place(partial(toy_velocity, params)), samples, TOOLS)
        for i, g in enumerate(found, 2):
            states = {"x": np.asarray(x[i])}
            check_differences({"x": g}, lambda at: reward(through(params, at["x"], cond, SIGMA[i:])).sum(), states)  # noqa: B023
        # The loss is the regression onto it: its gradient, at parameters elsewhere, by differences of the loss by hand.
        other, objective = moved(params, 0.1), AdjointMatching(strength=0.7, schedule="linear")

        def loss(own):
            total = 0.0
            for at, sigma, g in zip(x[1:4], SIGMA[1:4], found):
                v, base = (toy_velocity(p, at, jnp.full(2, sigma), cond) for p in (own, params))
                total += jnp.square(v - base + 0.7 * (1 - sigma) * 12 * g).mean() / 3
            return total

        other = {name: np.asarray(leaf) for name, leaf in other.items()}
        check_differences(jax.grad(lambda own: loss_of(objective, own, samples, params))(other), loss, other)


def test_the_adjoint_of_a_linear_field_is_the_matrix_exponential():
    """v = x A: dg/dsigma = -g A^T from the clean sample on, so g(sigma) = dR/dx0 exp(-sigma A^T), to first order."""
    errors = []
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        a, clean = 0.5 * rng.normal(size=(4, 4)), rng.normal(size=(1, 3, 4))
        for n in (8, 16):
            sigma = np.linspace(1, 0, n + 1)
            rows = Rows(np.zeros((n, 1, 3, 4)), *[None] * 5)
            none, extra = [None] * 6, {"reward_grad": jnp.asarray(clean)[None]}
            samples = Samples(None, rows, sigma[:n, None], *none, np.zeros((1, 4)), extra)
            found, step = gradients(lambda x, sigma, cond: x @ a, samples, TOOLS), np.eye(4) - a.T / n
            for steps, g in enumerate(found[::-1]):
                np.testing.assert_allclose(g, clean @ np.linalg.matrix_power(step, steps), rtol=1e-11)
            expected = clean @ np.asarray(jax.scipy.linalg.expm(-sigma[1] * a.T))
            errors.append(np.abs(found[0] - expected).max())
    assert 1.7 < errors[0] / errors[1] < 2.3


def test_one_step_of_the_adjoint_is_draft_1_and_without_a_jacobian_all_have_the_rewards_gradient(toy):
    one = drawn(toy, replace(ALL, last=1))
    sigma = float(one.plan.sigma[0, 0])
    draft = gradient_of(DRaFT(), one)
    for objective in (AdjointMatching(strength=0.3), AdjointMatching(strength=0.3, nested=0.0)):
        assert_close(gradient_of(objective, one), jax.tree.map(lambda g: 2 * 0.3 / sigma * g, draft))
    samples = exact(toy, (0, 1, 2, 3))[-1]
    flat = gradients(None, samples, TOOLS, nested=0.0)
    np.testing.assert_array_equal(flat, samples.extra["reward_grad"])


def test_what_is_taken_back_through_a_step_counts_twice():
    adjoint, flat = AdjointMatching(), AdjointMatching(nested=0.0)
    assert count_evaluations(flat, ["base"], TOOLS, (3, 4), 5) == (1 + 2 * 5, 5)
    assert count_evaluations(adjoint, ["base"], TOOLS, (3, 4), 5) == (1 + 2 * 4 + 2 * 5, 5)
    assert count_evaluations(LeapAlign(), [], TOOLS, (3, 4), 2) == (1 + 2 + 2, 2)


def test_a_matched_velocity_stays_and_another_is_drawn_to_it(toy):
    """Its only fixed point is the target: base - strength N g, here of a field that is what it is told."""
    made = drawn(toy, replace(ALL, last=1))
    objective, x = AdjointMatching(strength=0.3), made.batch.rows[0].x[0]
    base = toy_velocity(made.params, x, jnp.full(6, made.plan.sigma[0, 0]), jnp.repeat(toy[3], 3, axis=0))
    target = base - 0.3 * 12 * made.batch.extra["reward_grad"][0]

    def velocity(own, x, sigma, cond):
        return own if own.shape == x.shape else toy_velocity(made.params, x, sigma, cond)

    def roles(params, averages, frozen):
        return {"train": partial(velocity, params["v"]), "base": partial(velocity, jnp.zeros(()))}

    for v, still in ((target, True), (base, False)):
        state, _ = learn(objective, made, {"v": v}, make=roles, micro_batch=6)
        assert (np.abs(state.opt_state["v"]).max() < 1e-6) == still


def test_leaps_with_equal_ends_are_one_leap(toy):
    """The first has no length and no gradient: what is left is the straight estimate from where both begin."""
    made = drawn(toy, replace(ALL, last=1))
    objective = LeapAlign(tau=1e3)  # every leap counts tau, so that two weigh half
    plan = made.plan
    twice = plan._replace(**{f: np.repeat(getattr(plan, f), 2, axis=0) for f in plan._fields if f != "segments"})
    one, two = gradient_of(objective, made), gradient_of(objective, made._replace(plan=twice))
    assert_close(jax.tree.map(lambda g: 2e3 * g, two), jax.tree.map(lambda g: 1e3 * g, one))
    assert_close(jax.tree.map(lambda g: 1e3 * g, one), gradient_of(DRaFT(), made))


def test_leap_align_on_consecutive_steps_without_a_discount_is_draft(toy):
    made = drawn(toy, replace(ALL, last=2))
    found = gradient_of(LeapAlign(nested=1.0, tau=0.1), made)
    assert_close(jax.tree.map(lambda g: 0.2 * g, found), gradient_of(DRaFT(), made))


def test_samples_beyond_the_margin_teach_nothing(toy):
    made = drawn(toy, replace(ALL, last=1))
    value = np.asarray(made.batch.extra["reward"][0])
    margin = float(np.median(value))
    state, _ = learn(DRaFT(margin=margin), made)
    kept = made._replace(batch=made.batch._replace(weight=jnp.asarray(value < margin, jnp.float32)))
    assert 0 < kept.batch.weight.sum() < 6
    expected = jax.tree.map(lambda g: g * kept.batch.weight.mean(), gradient_of(DRaFT(), kept))
    assert_close(state.opt_state, expected)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (DRaFT, "nested", 1.5),
        (LeapAlign, "nested", -0.1),
        (LeapAlign, "tau", 0.0),
        (AdjointMatching, "strength", 0.0),
        (AdjointMatching, "nested", 2.0),
        (AdjointMatching, "schedule", "cosine"),
    ],
)
def test_bad_fields_are_named(kind, field, value):
    with pytest.raises(ValueError, match=rf"objective.{field}={value!r}"):
        kind(**{field: value})
