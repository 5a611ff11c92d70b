import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.plans.ode import ODE, ODEState
from mixgrpo_jax.rl.objectives.elbo import AWM, VGRPO, WEIGHTINGS
from mixgrpo_jax.rl.objectives.forward import noised
from mixgrpo_jax.rl.update import count_evaluations
from tests.rl.test_nft import fixed, samples_at
from tests.rl.toys import KEY, TOOLS, case, direct_gradient, learn, moved, place_keys, seen

KEYS = place_keys(0, 2)


@pytest.fixture(scope="module")
def setting(toy):
    """Two groups of four, drawn without noise, and trained at two noise levels, each prompt at its own."""
    made = case(toy, ODE(num_steps=5, train_fraction=0.4, group=4), ODEState(0))
    sigma = np.array([[0.9, 0.8], [0.4, 0.3]], np.float32)
    return made._replace(plan=made.plan._replace(sigma=sigma))


def everywhere(made):
    samples = seen(made.batch, made.plan, made.ids)
    samples.extra["deviation"] = jnp.zeros((2, len(made.ids)))
    samples.extra["reward_grad"], samples.extra["reward"] = samples.rows.x, samples.sigma
    return samples


def minus_log_prob(weighting, v, eps, x0, t):
    """The bound of one sample by its definition, in float64."""
    v, eps, x0, t = (np.asarray(a, np.float64) for a in (v, eps, x0, t))
    y = np.mean((v - (eps - x0)) ** 2)
    if weighting == "x0":
        x_t = (1 - t) * x0 + t * eps
        error = x_t - t * v - x0
        return np.mean(error**2), np.mean(np.abs(error))  # and its divisor, which has no gradient
    power = {"huber": (y + 1e-10) ** 0.5 - 1e-5, "ghuber": ((y + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25}
    return {"none": y, "t": t * y, "t2": t**2 * y}.get(weighting, t * power.get(weighting, 0.0)), 1.0


def finite_differences(weighting, v, eps, x0, t, step=1e-6):
    v, gradient = np.asarray(v, np.float64), np.zeros(v.shape)
    _, divisor = minus_log_prob(weighting, v, eps, x0, t)
    for i in np.ndindex(v.shape):
        by = np.zeros(v.shape)
        by[i] = step
        high, low = (minus_log_prob(weighting, v + sign * by, eps, x0, t)[0] for sign in (1, -1))
        gradient[i] = (high - low) / (2 * step) / divisor
    return gradient


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_gradient_at_the_old_velocity_is_the_advantages_times_that_of_the_loss(setting, weighting):
    objective, samples = AWM(weighting=weighting, old="current"), samples_at(setting, 1)
    x, eps = noised(samples, KEY, TOOLS)
    np.testing.assert_allclose(x, samples.x0 + samples.sigma[:, None, None] * (eps - samples.x0), atol=1e-6)
    v = jax.random.normal(jax.random.key(1), x.shape)
    gradient = jax.grad(lambda v: objective({"train": fixed(v)}, samples, KEY, TOOLS)[0].sum())(v)
    for i in (0, 5):
        one = finite_differences(weighting, v[i], eps[i], samples.x0[i], samples.sigma[i])
        np.testing.assert_allclose(gradient[i], samples.advantage[i] * one, rtol=2e-4, atol=1e-6)


def test_v_grpo_has_one_ratio_of_all_places_and_shares_its_pairs_within_a_group(setting):
    objective, samples = VGRPO(old="current"), everywhere(setting)
    x, eps = noised(samples, KEYS, TOOLS, shared=True)
    for place in range(2):
        for group in (eps[place, :4], eps[place, 4:]):
            assert (group == group[:1]).all()
        assert (eps[place, 0] != eps[place, 4]).all()
    assert (eps[0] != eps[1]).all()
    v = jax.random.normal(jax.random.key(1), x.shape)
    gradient = jax.grad(lambda v: objective({"train": fixed(v)}, samples, KEYS, TOOLS)[0].sum())(v)
    for i in (0, 6):
        for place in range(2):
            one = finite_differences("x0", v[place, i], eps[place, i], samples.x0[i], samples.sigma[place, i])
            np.testing.assert_allclose(gradient[place, i], samples.advantage[0, i] * one / 2, rtol=2e-4, atol=1e-6)


def test_ratios_are_clipped_on_the_side_where_they_would_gain(setting):
    objective, samples = VGRPO(clip_low=0.1, clip_high=0.2), everywhere(setting)
    x, eps = noised(samples, KEYS, TOOLS, shared=True)
    v = jax.random.normal(jax.random.key(1), x.shape)
    change = np.linspace(-0.5, 0.5, 8, dtype=np.float32)
    old = objective.log_prob(v, eps, samples) - change[:, None] + np.array([0.3, -0.3])[:, None, None]
    samples = samples._replace(extra=samples.extra | {"log_prob": old})
    loss, metrics = objective({"train": fixed(v)}, samples, KEYS, TOOLS)
    ratio, advantage = np.exp(change), np.asarray(samples.advantage[0, :, 0])
    expected = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.9, 1.2))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio/max_deviation"], np.abs(ratio - 1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective, each", [(AWM, 1), (VGRPO, 2)])  # a span's rows are computed again
def test_accumulated_gradients_equal_the_direct_one(setting, objective, each):
    params = moved(setting.params, 0.05)
    made = setting._replace(batch=setting.batch._replace(weight=jnp.array([1.0, 0, 2, 0.5, 1, 1, 3, 1])))
    extra = {"deviation": jnp.zeros((1, 8))}
    expected = direct_gradient(objective(old="current"), params, made._replace(batch=made.batch._replace(extra=extra)))
    state, metrics = learn(objective(), made, params, micro_batch=4)
    for name in params:
        np.testing.assert_allclose(state.opt_state[name], expected[name], rtol=1e-3, atol=1e-5)
    assert metrics["ratio/max_deviation"].max() < 1e-5
    assert metrics["velocity/rollout_deviation"].min() > 1e-3  # others drew them
    assert count_evaluations(objective(), (), TOOLS, (3, 4), 2) == (2 + 1 + 2 * each, 2)
    assert (int(metrics["nfe/update"]), int(metrics["nfe/gradient"])) == (8 * (3 + 2 * each), 8 * 2)
    assert count_evaluations(objective(old="current"), (), TOOLS, (3, 4), 2) == (1 + 2 * each, 2)


@pytest.mark.parametrize("weighting", ["none", "t", "t2", "x0"])
def test_a_map_of_ones_has_the_samples_gradient(setting, weighting):
    objective, samples = AWM(weighting=weighting, old="current"), samples_at(setting, 0)
    v = jax.random.normal(jax.random.key(1), samples.x0.shape)

    def gradient(advantage):
        own = samples._replace(advantage=advantage)
        return jax.grad(lambda v: objective({"train": fixed(v)}, own, KEY, TOOLS)[0].sum())(v)

    np.testing.assert_allclose(
        gradient(jnp.tile(samples.advantage, (1, 3))), gradient(samples.advantage), rtol=1e-4, atol=1e-6
    )
    first = gradient(samples.advantage * jnp.array([3.0, 0, 0]))  # one region earns everything
    np.testing.assert_allclose(first[:, 0], 3 * gradient(samples.advantage)[:, 0], rtol=1e-4, atol=1e-6)
    assert (first[:, 1:] == 0).all()


@pytest.mark.parametrize("field, value", [("weighting", "l1"), ("old", "rollout"), ("clip_low", 0.0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"objective\.{field}={value!r}"):
        VGRPO(**{field: value})
