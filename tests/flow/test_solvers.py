from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.schedules import shifted_sigmas
from mixgrpo_jax.flow.solvers import SOLVERS, dpm_solver, empty_history, euler, push

DPM = ("dpm_midpoint", "dpm_heun")
VARIANCE = 0.3


def scale(sigma):
    """The exact solution for Gaussian data of this variance, up to a factor."""
    return ((1 - sigma) ** 2 * VARIANCE + sigma**2) ** 0.5


def velocity(x, sigma):
    return x * (sigma - (1 - sigma) * VARIANCE) / scale(sigma) ** 2


@partial(jax.jit, static_argnums=0)
def solve(solver, order, sigmas, x, history):
    def step(carry, sigma_pair):
        history, x = carry
        return SOLVERS[solver](history, x, velocity(x, sigma_pair[0]), *sigma_pair, order), None

    return jax.lax.scan(step, (history, x), (sigmas[:-1], sigmas[1:]))[0][1]


def observed_order(solver, order):
    """Order of convergence from sigma 0.9 to 0.1, started with an exact history."""
    errors = []
    for num_steps in (64, 128):
        sigmas = np.linspace(0.9, 0.1, num_steps + 1)
        x = jnp.full((1,), scale(0.9), jnp.float64)
        history = empty_history(x)
        for sigma in (0.9 + 0.8 / num_steps, 0.9 + 0.4 / num_steps):
            before = jnp.full((1,), scale(sigma), jnp.float64)
            history = push(history, before, velocity(before, sigma), sigma)
        x = solve(solver, order, sigmas, x, history)
        assert x.dtype == jnp.float64
        errors.append(abs(x[0] - scale(0.1)))
    return np.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    "solver, order, expected",
    [("euler", 1, 1), ("dpm_midpoint", 1, 1), ("dpm_midpoint", 2, 2), ("dpm_heun", 2, 2), ("dpm_midpoint", 3, 3)],
)
def test_order_of_convergence(solver, order, expected):
    with jax.enable_x64(True):
        assert observed_order(solver, order) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("solver", DPM)
@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.8, 0.5), (0.2, 0.0)])
def test_first_order_is_euler(solver, sigma, sigma_next):
    x, v = jnp.array([0.4, -1.2]), jnp.array([1.1, 0.3])
    _, expected = euler(empty_history(x), x, v, sigma, sigma_next, 1)
    _, actual = SOLVERS[solver](empty_history(x), x, v, sigma, sigma_next, 1)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("solver", DPM)
def test_second_order_formula(solver):
    x, v, sigma, sigma_next = jnp.array([0.4]), jnp.array([1.1]), 0.6, 0.4
    last = push(empty_history(x), x, 2 * v, 0.7)
    _, actual = SOLVERS[solver](last, x, v, sigma, sigma_next, 2)
    before, now, after = (np.log((1 - s) / s) for s in (0.7, sigma, sigma_next))
    h = after - now
    m0, m1 = x - sigma * v, x - 0.7 * 2 * v
    d1 = (m0 - m1) * h / (now - before)
    decay = (1 - sigma_next) * np.expm1(-h)
    first = sigma_next / sigma * x - decay * m0
    second = -0.5 * decay * d1 if solver == "dpm_midpoint" else (decay / h + 1 - sigma_next) * d1
    np.testing.assert_allclose(actual, first + second, rtol=1e-5)


def test_order_is_limited_by_the_history():
    x, v = jnp.array([0.4]), jnp.array([1.1])
    history = empty_history(x)
    for held, sigma in enumerate((0.9, 0.8, 0.7, 0.6)):
        steps = [dpm_solver(history, x, v * sigma, sigma, sigma - 0.1, order)[1].item() for order in (1, 2, 3)]
        assert len(set(steps)) == min(held + 1, 3)
        assert history.num_held == min(held, 2)
        history = push(history, x, v * sigma**2, sigma)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_last_step_is_the_clean_estimate(solver, order):
    x, v = jnp.array([0.4]), jnp.array([1.1])
    history = push(push(empty_history(x), x, 2 * v, 0.5), x, 3 * v, 0.4)
    _, actual = SOLVERS[solver](history, x, v, 0.3, 0.0, order)
    np.testing.assert_array_equal(actual, x - jnp.float32(0.3) * v)


@pytest.mark.parametrize("solver", DPM)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_values_and_gradients_are_finite_from_noise_to_data(solver, order):
    x, sigmas = jnp.array([0.5, -2.0]), shifted_sigmas(8, 3.0)

    def trajectory(x, sigmas):
        return solve(solver, order, sigmas, x, empty_history(x)).sum()

    value, gradients = jax.value_and_grad(trajectory, argnums=(0, 1))(x, sigmas)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("solver", DPM)
def test_estimate_at_pure_noise_has_no_slope(solver):
    # lambda is -inf at sigma = 1: the slope through that estimate vanishes, and order 2 is order 1.
    x, v = jnp.array([0.4]), jnp.array([1.1])
    history = push(empty_history(x), x, 2 * v, 1.0)
    steps = [SOLVERS[solver](history, x, v, 0.9, 0.8, order)[1] for order in (1, 2)]
    np.testing.assert_allclose(*steps, rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_traced_order_and_sigmas_match_constants(solver):
    sigmas, x = shifted_sigmas(5, 3.0), jnp.array([0.5, -2.0])
    traced = solve(solver, 3, sigmas, x, empty_history(x))
    history = empty_history(x)
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        history, x = SOLVERS[solver](history, x, velocity(x, sigma), sigma, sigma_next, 3)
    np.testing.assert_allclose(traced, x, rtol=1e-4)


def test_history_keeps_the_last_two_estimates():
    x = jnp.arange(2.0)
    history = empty_history(x.astype(jnp.bfloat16))
    assert history.x0[0].dtype == jnp.float32
    for sigma in (0.9, 0.8, 0.7):
        history = push(history, x, jnp.ones(2), sigma)
    np.testing.assert_allclose(history.sigma, ((0.7, 0.7), (0.8, 0.8)), rtol=1e-6)  # one of each sample
    np.testing.assert_allclose(history.x0, (x - 0.7, x - 0.8), rtol=1e-6)


def test_repeated_history_steps_as_its_source():
    x, v = jnp.array([[0.4], [0.9]]), jnp.array([[1.1], [-0.2]])
    history = push(push(empty_history(x), x, 2 * v, 0.9), x, 3 * v, 0.8)

    def rows(a):
        return jnp.repeat(a, 3, axis=0)

    _, expected = dpm_solver(history, x, v, 0.7, 0.5, 3)
    _, actual = dpm_solver(jax.tree.map(rows, history), rows(x), rows(v), 0.7, 0.5, 3)
    np.testing.assert_allclose(actual, rows(expected), rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sigma_an_order_and_a_history_for_each_sample(solver):
    x, v = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))  # [B = 3, S, C] each
    sigma, sigma_next, order = jnp.array([0.9, 0.5, 0.3]), jnp.array([0.7, 0.4, 0.0]), jnp.array([1, 3, 2])

    def held(number, sigma, x, v):
        history = empty_history(x)
        for last in range(number):
            history = push(history, x, v * (last + 2), sigma + 0.2 - 0.1 * last)
        return history

    histories = [held(b, sigma[b], x[b : b + 1], v[b : b + 1]) for b in range(3)]  # 0, 1 and 2 estimates
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *histories)
    later, x_next = SOLVERS[solver](together, x, v, sigma, sigma_next, order)
    np.testing.assert_array_equal(later.num_held.ravel(), [1, 2, 2])
    for b, history in enumerate(histories):
        alone, expected = SOLVERS[solver](history, x[b : b + 1], v[b : b + 1], sigma[b], sigma_next[b], order[b])
        np.testing.assert_allclose(x_next[b], expected[0], rtol=1e-5, atol=1e-6)
        jax.tree.map(lambda a, c: np.testing.assert_allclose(a[b], c[0], rtol=1e-6), later, alone)  # noqa: B023


def test_unknown_variant_is_refused():
    x = jnp.zeros(1)
    with pytest.raises(ValueError, match="variant='ralston'"):
        dpm_solver(empty_history(x), x, x, 0.9, 0.8, 2, variant="ralston")
