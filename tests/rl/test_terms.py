from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.plans.ode import ODE, ODEState
from mixgrpo_jax.flow.plans.window import Window, WindowState
from mixgrpo_jax.rl.objectives.grpo import GRPO
from mixgrpo_jax.rl.objectives.nft import NFT
from mixgrpo_jax.rl.samples import Point
from mixgrpo_jax.rl.terms import make_terms, roles_of
from tests.conftest import toy_velocity
from tests.rl.toys import KEY, SAMPLER, case, moved, roles, seen, tools


@pytest.fixture(scope="module")
def window(toy):
    return case(toy, Window(num_steps=8, length=3, group=2), WindowState(1, 0, 0))


@pytest.fixture(scope="module")
def ode(toy):
    return case(toy, ODE(num_steps=5, group=2), ODEState(0))


def evaluate(objective, made, weights, base, place=1):
    """(losses, metrics) at a place, and without terms."""
    samples = seen(made.batch, made.plan, made.ids, place)
    samples.extra["deviation"] = jnp.zeros(4)
    own = roles(made.params, {"old": moved(made.params, 0.05)}, base)
    return [objective(own, samples, KEY, tools(**given)) for given in (weights, {})], samples


def test_kl_to_the_base_is_the_closed_form(window):
    base = moved(window.params, 0.1)
    ((loss, metrics), (bare, _)), samples = evaluate(GRPO(), window, {"kl_base": 0.7}, base)
    row = samples.rows
    (one, v), (_, v_base) = (
        SAMPLER.transition(partial(toy_velocity, p), row.x, row.sigma, row.sigma_next, samples.cond, row.eta)
        for p in (window.params, base)
    )
    expected = ((one.dmean_dv * (v - v_base)) ** 2 / (2 * one.std**2)).mean((1, 2))
    np.testing.assert_allclose(metrics["kl/base"], expected, rtol=1e-4)
    np.testing.assert_allclose(loss - bare, 0.7 * expected, rtol=1e-3, atol=1e-6)
    ((_, metrics), _), _ = evaluate(GRPO(), window, {"kl_base": 0.7}, window.params)
    assert (metrics["kl/base"] == 0).all()


def test_distance_of_velocities_in_any_objective(window, ode):
    base = moved(window.params, 0.1)
    ((loss, metrics), (bare, _)), samples = evaluate(GRPO(), window, {"mse_base": 0.5, "mse_old": 2.0}, base)
    row, expected = samples.rows, {}
    v = toy_velocity(window.params, row.x, row.sigma, samples.cond)
    for name, params in (("base", base), ("old", moved(window.params, 0.05))):
        other = toy_velocity(params, row.x, row.sigma, samples.cond)
        expected[name] = ((v - other) ** 2).mean((1, 2))
        np.testing.assert_allclose(metrics[f"mse/{name}"], expected[name], rtol=1e-4)
    np.testing.assert_allclose(loss - bare, 0.5 * expected["base"] + 2 * expected["old"], rtol=1e-3, atol=1e-6)

    # Of NFT, at the sample that was noised again.
    ((loss, metrics), (bare, _)), samples = evaluate(NFT(), ode, {"mse_base": 0.5}, base)
    x, _ = SAMPLER.noised(KEY, samples.id, samples.x0, samples.sigma)
    own, other = (toy_velocity(params, x, samples.sigma, samples.cond) for params in (ode.params, base))
    expected = ((own - other) ** 2).mean((1, 2))
    np.testing.assert_allclose(metrics["mse/base"], expected, rtol=1e-4)
    np.testing.assert_allclose(loss - bare, 0.5 * expected, rtol=1e-3, atol=1e-5)


def test_kl_to_the_rollout_is_half_the_squared_log_ratio(window):
    samples = seen(window.batch, window.plan, window.ids, 1)
    change = jnp.array([0.3, -0.2, 0.0, 0.1])
    row = samples.rows
    samples = samples._replace(rows=row._replace(log_prob=row.log_prob - change[:, None]))
    own = roles(window.params, {}, None)
    for objective, scale in ((GRPO(), 1), (GRPO(reduce="sum"), 12)):
        _, metrics = objective(own, samples, KEY, tools(kl_rollout=2.0))
        np.testing.assert_allclose(metrics["kl/rollout"], (scale * change) ** 2 / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["kl_base", "kl_rollout"])
def test_a_kl_needs_stochastic_steps(ode, name):
    with pytest.raises(ValueError, match=f"terms.{name}: the objective has no"):
        evaluate(NFT(), ode, {name: 1.0}, ode.params)


@pytest.mark.parametrize(
    "name, message", [("l1_base", "is unknown"), ("kl", "is unknown"), ("mse_rollout", "log-probs alone are kept")]
)
def test_unknown_terms_are_named(name, message):
    for use in (roles_of, partial(make_terms, sampler=SAMPLER)):
        with pytest.raises(ValueError, match=f"terms.{name}.*{message}"):
            use({name: 1.0})


def test_negative_weights_are_refused():
    for use in (roles_of, partial(make_terms, sampler=SAMPLER)):
        with pytest.raises(ValueError, match=r"terms\.kl_rollout=-1\.0 must not be negative"):
            use({"kl_rollout": -1.0})


def test_roles_are_those_of_terms_with_a_weight():
    weights = {"kl_base": 0.0, "mse_old": 0.1, "kl_rollout": 1.0, "mse_teacher/ocr": 2.0}
    assert roles_of(weights) == {"old", "teacher/ocr"}
    assert roles_of({"kl_base": 1.0}) == {"base"} and roles_of({}) == set()


def test_terms_without_a_weight_cost_nothing():
    point = Point(jnp.zeros((4, 3, 2)), jnp.zeros(4), jnp.zeros((4, 3, 2)), None)
    loss, metrics = make_terms({"kl_base": 0.0}, SAMPLER)({}, point)
    assert loss.shape == (4,) and not loss.any() and metrics == {}


def test_of_several_places_at_once_a_term_is_their_mean(window):
    weights = {"kl_base": 0.7, "mse_old": 2.0, "kl_rollout": 0.3}
    penalise = make_terms(weights, SAMPLER)
    own = roles(window.params, {"old": moved(window.params, 0.05)}, moved(window.params, 0.1))

    def point(place):
        samples = seen(window.batch, window.plan, window.ids, place)
        row = samples.rows
        transition, v = tools().transition(own["train"], samples)
        change = jnp.arange(4.0) + place
        return Point(row.x, row.sigma, v, samples.cond, row.sigma_next, row.eta, transition, change)

    def at_every_place(x, sigma, cond, role):
        return jnp.stack([role(*each, cond) for each in zip(x, sigma)])

    points = [point(place) for place in range(3)]
    penalties, metrics = zip(*(penalise(own, each) for each in points))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *points)._replace(cond=points[0].cond)
    penalty, named = penalise({name: partial(at_every_place, role=role) for name, role in own.items()}, stacked)
    np.testing.assert_allclose(penalty, sum(penalties) / 3, rtol=1e-5)
    assert named.keys() == metrics[0].keys() == {"kl/base", "mse/old", "kl/rollout"}
    for name, value in named.items():
        np.testing.assert_allclose(value, sum(each[name] for each in metrics) / 3, rtol=1e-5)
