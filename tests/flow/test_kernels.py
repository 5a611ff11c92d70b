import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mixgrpo_jax.flow.kernels import KERNELS, Transition, cps, flow_sde, kappa, kl, log_prob, precise, sample
from mixgrpo_jax.flow.schedules import shifted_sigmas

SIGMAS = shifted_sigmas(25, 3.0)
EULER, CONSERVING = ("flow", "dance", "linear"), ("cps", "precise", "dance_precise")
ETA = 0.7
# (sigma, sigma_next): both ends of a trajectory, and its inside.
STEPS = [(1.0, 0.9), (0.9, 0.75), (0.4, 0.1), (0.2, 0.0), (1.0, 0.0)]

# Reference values for T = 25, shift 3, eta 0.7: std, coefficient of x, coefficient of v.
GOLDEN = """
0.700000 0.755000 -0.013699   0.714502 0.741198 -0.018016   0.508725 0.866848 -0.019060   0.418194 0.908582 -0.020198
0.364564 0.929327 -0.021441   0.328166 0.941666 -0.022802   0.301408 0.949795 -0.024297   0.280664 0.955508 -0.025945
0.263940 0.959704 -0.027765   0.250040 0.962879 -0.029785   0.238185 0.965330 -0.032032   0.227843 0.967246 -0.034545
0.218619 0.968750 -0.037365   0.210214 0.969926 -0.040545   0.202379 0.970833 -0.044149   0.194896 0.971512 -0.048256
0.187553 0.971989 -0.052964   0.180130 0.972285 -0.058396   0.172373 0.972410 -0.064709   0.163966 0.972368 -0.072104
0.154479 0.972159 -0.080844   0.143275 0.971774 -0.091276   0.129318 0.971199 -0.103865   0.110652 0.970411 -0.119253
0.082496 0.969375 -0.138333
"""


def draw(seed: int, shape=(3, 4, 5)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def coefficients(kernel, sigma, sigma_next, eta=ETA):
    """(std, coefficient of x, coefficient of v)."""
    step = KERNELS[kernel]
    of_x = step(1.0, 0.0, sigma, sigma_next, eta)
    return of_x.std, of_x.mean, step(0.0, 1.0, sigma, sigma_next, eta).mean


def test_golden_flow_table():
    golden = np.array(GOLDEN.split(), float).reshape(25, 3)
    ours = np.stack(coefficients("flow", SIGMAS[:-1], SIGMAS[1:]), axis=-1)
    # The table was made in float32, where 1 - sigma next to sigma = 1 has lost digits.
    np.testing.assert_allclose(ours, golden, rtol=0, atol=2e-6)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.2])
def test_first_flow_step_has_std_eta(eta):
    assert flow_sde(1.0, 0.0, SIGMAS[0], SIGMAS[1], eta).std == pytest.approx(eta, rel=1e-5)


def test_sigma_max_stands_for_sigma_at_the_singularity_only():
    halfway = (1 + SIGMAS[1]) / 2

    def step(sigma, sigma_max):
        return flow_sde(draw(0), draw(1), sigma, halfway - 0.1, ETA, sigma_max).std

    assert step(1.0, SIGMAS[1]) == pytest.approx(ETA * np.sqrt((1.1 - halfway) / (1 - SIGMAS[1])), rel=1e-5)
    assert step(0.95, 0.99) == step(0.95, None)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma, sigma_next", STEPS)
def test_no_noise_is_the_euler_step(kernel, sigma, sigma_next):
    x, v = draw(0), draw(1)
    transition = KERNELS[kernel](x, v, sigma, sigma_next, 0.0)
    assert transition.std == 0
    np.testing.assert_allclose(transition.mean, x + (sigma_next - sigma) * v, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_euler_step_is_approached_as_noise_vanishes(kernel):
    x, v = draw(0), draw(1)
    gaps = []
    for eta in (1e-1, 1e-2, 1e-3):
        transition = KERNELS[kernel](x, v, 0.8, 0.7, eta)
        gaps.append(jnp.abs(transition.mean - (x - 0.1 * v)).max())
        assert 0 < transition.std < 1.2 * eta
    assert gaps[0] > 50 * gaps[1] and gaps[2] < 1e-5


def noise_variance(kernel, sigma, sigma_next):
    """Variance of x' about (1 - sigma') x0, for the exact velocity of a known x0."""

    def step(x0, eps):
        return KERNELS[kernel]((1 - sigma) * x0 + sigma * eps, eps - x0, sigma, sigma_next, ETA)

    np.testing.assert_allclose(step(1.0, 0.0).mean, 1 - sigma_next, atol=1e-6)
    transition = step(0.0, 1.0)
    return transition.mean**2 + transition.std**2


@pytest.mark.parametrize("kernel", EULER)
@pytest.mark.parametrize("sigma, sigma_next", STEPS[1:4])
def test_euler_kernels_leave_excess_noise(kernel, sigma, sigma_next):
    g2 = ETA**2 * dict(flow=sigma / (1 - sigma), dance=1.0, linear=sigma**2)[kernel]
    dt = sigma_next - sigma
    excess = g2 * dt**2 / sigma + (g2 * dt / (2 * sigma)) ** 2
    np.testing.assert_allclose(noise_variance(kernel, sigma, sigma_next) - sigma_next**2, excess, rtol=1e-4)


@pytest.mark.parametrize("kernel", CONSERVING)
@pytest.mark.parametrize("sigma, sigma_next", STEPS)
def test_conserving_kernels_leave_none(kernel, sigma, sigma_next):
    np.testing.assert_allclose(noise_variance(kernel, sigma, sigma_next), sigma_next**2, atol=5e-7)


def two_steps(kernel, x, x0, sigmas, eta):
    """Mean and variance after both steps, x0 being the clean estimate throughout."""

    def velocity(x, sigma):
        return (x - x0) / sigma

    start, middle, end = sigmas
    first = kernel(x, velocity(x, start), start, middle, eta)

    def second(x):
        return kernel(x, velocity(x, middle), middle, end, eta)

    slope = jax.grad(lambda x: second(x).mean)(first.mean)
    return second(first.mean).mean, slope**2 * first.std**2 + second(first.mean).std ** 2


@pytest.mark.parametrize("kernel, composes", [("precise", True), ("dance_precise", True), ("cps", False)])
def test_frozen_x0_steps_compose(kernel, composes):
    x, x0, sigmas = 0.8, -0.3, (0.9, 0.7, 0.4)
    whole = KERNELS[kernel](x, (x - x0) / 0.9, 0.9, 0.4, ETA)
    halves = two_steps(KERNELS[kernel], x, x0, sigmas, ETA)
    assert np.allclose(halves, (whole.mean, whole.std**2), rtol=1e-5) == composes


def test_precise_is_the_fine_limit_of_flow_sde():
    grid = np.linspace(0.6, 0.4, 2001)
    slope, variance = 1.0, 0.0
    for sigma, sigma_next in itertools.pairwise(grid):
        # Mean and variance of the flow SDE about x0 = 0, by the velocity x / sigma.
        g2, dt = ETA**2 * sigma / (1 - sigma), sigma_next - sigma
        factor = 1 + dt / sigma * (1 + g2 / (2 * sigma))
        slope, variance = slope * factor, variance * factor**2 - g2 * dt
    transition = precise(1.0, 1 / 0.6, 0.6, 0.4, ETA)
    np.testing.assert_allclose((transition.mean, transition.std**2), (slope, variance), rtol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma, sigma_next", STEPS)
def test_dmean_dv_is_the_derivative(kernel, sigma, sigma_next):
    def step(v):
        return KERNELS[kernel](0.4, v, sigma, sigma_next, ETA)

    np.testing.assert_allclose(step(1.7).dmean_dv, jax.grad(lambda v: step(v).mean)(1.7), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_log_prob_is_the_density_of_the_sampled_step(kernel):
    transition = KERNELS[kernel](draw(0), draw(1), 0.8, 0.7, ETA)
    noise = draw(2)
    x_next = sample(transition, noise)
    density = stats.norm.logpdf(x_next, transition.mean, transition.std)
    np.testing.assert_allclose(log_prob(transition, x_next), density, rtol=1e-4, atol=1e-5)
    of_noise = stats.norm.logpdf(noise) - np.log(transition.std)
    np.testing.assert_allclose(log_prob(transition, x_next), of_noise, rtol=1e-4, atol=1e-4)


def test_squared_error_has_no_scale():
    transition = cps(draw(0), draw(1), 0.8, 0.7, ETA)
    score = log_prob(transition, sample(transition, draw(2)), "squared_error")
    np.testing.assert_allclose(score, -((transition.std * draw(2)) ** 2), rtol=1e-4, atol=1e-6)


def test_unknown_log_prob_is_refused():
    with pytest.raises(ValueError, match="kind='sum'"):
        log_prob(cps(0.0, 0.0, 0.8, 0.7, ETA), 0.0, "sum")


@pytest.mark.parametrize("kernel", KERNELS)
def test_kl_and_gradient_scale_follow_kappa(kernel):
    x, v, dv, noise = draw(0), draw(1), 0.1 * draw(2), draw(3)

    def step(v):
        return KERNELS[kernel](x, v, 0.8, 0.7, ETA)

    scale = kappa(step(v))
    np.testing.assert_allclose(kl(step(v), step(v + dv)), scale**2 / 2 * dv**2, rtol=1e-3, atol=1e-6)
    x_next = sample(step(v), noise)
    gradient = jax.grad(lambda v: log_prob(step(v), x_next).sum())(v)
    np.testing.assert_allclose(jnp.abs(gradient), scale * jnp.abs(noise), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_finite_at_the_ends(kernel):
    x_next = draw(3)

    def total(x, v, sigma, sigma_next, eta):
        transition = KERNELS[kernel](x, v, sigma, sigma_next, eta)
        moved = transition._replace(mean=transition.mean + 1)
        values = (log_prob(transition, x_next), kl(transition, moved), kappa(transition), sample(transition, x_next))
        return sum(value.sum() for value in values)

    differentiate = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4)))
    for sigma, sigma_next in STEPS:
        value, gradients = differentiate(draw(0), draw(1), sigma, sigma_next, ETA)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_deterministic_step_has_no_log_prob():
    x, v = draw(0), draw(1)

    def total(v):
        return log_prob(cps(x, v, 0.3, 0.0, ETA), draw(2)).sum()

    value, gradient = jax.value_and_grad(total)(v)
    assert value == 0 and (gradient == 0).all()
    still = Transition(x, jnp.zeros(()), jnp.ones(()))
    assert (kl(still, cps(x, v, 0.3, 0.0, ETA)) == 0).all() and kappa(still) == 0
    np.testing.assert_array_equal(sample(still, v), x)


@pytest.mark.parametrize("kernel", KERNELS)
def test_low_precision_inputs_are_computed_in_float32(kernel):
    x, v = draw(0).astype(jnp.bfloat16), draw(1).astype(jnp.bfloat16)
    low = KERNELS[kernel](x, v, 0.8, 0.7, ETA)
    full = KERNELS[kernel](x.astype(jnp.float32), v.astype(jnp.float32), 0.8, 0.7, ETA)
    assert low.mean.dtype == jnp.float32
    np.testing.assert_array_equal(low.mean, full.mean)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_a_sigma_and_an_eta_for_each_sample(kernel, shape):
    x, v = draw(0), draw(1)
    given = np.array([[1.0, 0.8, 0.2], [0.9, 0.7, 0.0], [ETA, 0.3, 0.0]], np.float32)
    batch = jax.jit(KERNELS[kernel])(x, v, *(row.reshape(shape) for row in given))
    for i in range(3):
        alone = KERNELS[kernel](x[i], v[i], *given[:, i])
        np.testing.assert_allclose(batch.mean[i], alone.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.std[i, 0, 0], alone.std, rtol=1e-5)
        np.testing.assert_allclose(batch.dmean_dv[i, 0, 0], alone.dmean_dv, rtol=1e-5)


def test_kernels_keep_their_names_and_docstrings():
    assert KERNELS["flow"].__name__ == "flow_sde" and "Flow-GRPO" in KERNELS["flow"].__doc__
