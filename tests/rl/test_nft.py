import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixgrpo_jax.flow.plans.ode import ODE, ODEState
from mixgrpo_jax.rl.objectives.nft import NFT
from mixgrpo_jax.rl.update import Average, count_evaluations
from tests.conftest import toy_velocity
from tests.rl.toys import KEY, SAMPLER, TOOLS, case, direct_gradient, learn, moved, place_keys, roles, seen

OLD = {"old": Average(0.5, by="iteration")}


@pytest.fixture(scope="module")
def setting(toy):
    """Two groups of four, drawn without noise, and trained at two noise levels."""
    made = case(toy, ODE(num_steps=5, train_fraction=0.4, group=4), ODEState(0))
    sigma = np.array([[0.9, 0.8], [0.4, 0.3]], np.float32)
    return made._replace(plan=made.plan._replace(sigma=sigma))


def fixed(v):
    return lambda x, sigma, cond: v


def samples_at(made, place, advantage=None):
    samples = seen(made.batch, made.plan, made.ids, place)
    samples.extra["deviation"] = jnp.zeros(len(made.ids))
    return samples if advantage is None else samples._replace(advantage=advantage)


@pytest.mark.parametrize("beta, adv_max, positions", [(1.0, 5.0, 1), (0.1, 5.0, 1), (1.0, 1.0, 3)])
def test_the_gradient_in_the_velocity_at_the_old_one(setting, beta, adv_max, positions):
    objective = NFT(beta=beta, adv_max=adv_max)
    samples = samples_at(setting, 1, 2 * jax.random.normal(KEY, (8, positions)))
    x, t = SAMPLER.noised(KEY, samples.id, samples.x0, samples.sigma)[0], samples.sigma[:, None, None]
    v_old = toy_velocity(moved(setting.params, 0.1), x, samples.sigma, samples.cond)

    def loss(v):
        return objective({"train": fixed(v), "old": fixed(v_old)}, samples, KEY, TOOLS)[0].sum()

    gradient = jax.grad(loss)(v_old)
    x0_hat = x - t * v_old
    w = jnp.abs(x0_hat - samples.x0).mean((1, 2), keepdims=True)
    r = jnp.clip(samples.advantage[..., None] / adv_max, -1, 1) / 2 + 0.5
    expected = -2 * t * (2 * r - 1) * (x0_hat - samples.x0) / w * adv_max / 12  # of 12 elements
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_without_an_advantage_nothing_moves_at_the_old_velocity(setting):
    batch = setting.batch._replace(advantage=jnp.zeros((1, 8, 1)))
    state, metrics = learn(NFT(), setting._replace(batch=batch), averages=OLD)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(state.opt_state)) < 1e-6
    assert (metrics["velocity/moved"] == 0).all() and metrics["loss/policy"][0] > 0


def test_the_loss_by_hand(setting):
    samples = samples_at(setting, 0)
    x, t = (np.asarray(a) for a in (SAMPLER.noised(KEY, samples.id, samples.x0, samples.sigma)[0], samples.sigma))
    v, v_old = (
        np.asarray(toy_velocity(moved(setting.params, scale), x, samples.sigma, samples.cond)) for scale in (0.3, 0.0)
    )
    x0, t = np.asarray(samples.x0), t[:, None, None]
    values = {}
    for beta in (1.0, 0.1):
        objective = NFT(beta=beta, adv_max=2.0)
        loss, metrics = objective({"train": fixed(v), "old": fixed(v_old)}, samples, KEY, TOOLS)
        r = np.clip(np.asarray(samples.advantage)[..., None] / 2, -1, 1) / 2 + 0.5
        terms = []
        for share, mixed in ((r, (1 - beta) * v_old + beta * v), (1 - r, (1 + beta) * v_old - beta * v)):
            error = x - t * mixed - x0
            terms.append(share * error**2 / np.abs(error).mean((1, 2), keepdims=True))
        expected = 2.0 / beta * sum(terms).mean((1, 2))
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["velocity/moved"], ((v - v_old) ** 2).mean((1, 2)), rtol=1e-4)
        values[beta] = loss
    assert jnp.abs(values[1.0] - values[0.1]).min() > 1e-3


def test_accumulated_gradients_equal_the_direct_one(setting):
    params = moved(setting.params, 0.05)
    made = setting._replace(batch=setting.batch._replace(weight=jnp.array([1.0, 0, 2, 0.5, 1, 1, 3, 1])))
    state, metrics = learn(NFT(), made, params, averages=OLD, make=drawn_by(setting.params), micro_batch=4)
    # `prepare` finds nothing that has a gradient.
    own = made._replace(batch=made.batch._replace(extra={"deviation": jnp.zeros((1, 8))}))
    expected = direct_gradient(NFT(), params, own, averages={"old": setting.params})
    for name in params:
        np.testing.assert_allclose(state.opt_state[name], expected[name], rtol=1e-3, atol=1e-5)
    each = count_evaluations(NFT(), ("old",), TOOLS, (3, 4), 2)
    assert each == (2 + 2 + 1, 2)  # both at each of two places, and v_old at the recorded step
    assert int(metrics["nfe/update"]) == 8 * each[0] and int(metrics["nfe/gradient"]) == 8 * each[1]


def drawn_by(params):
    """Roles of which "old" is the velocity of these parameters."""
    return lambda trained, averages, frozen: roles(trained, {"old": params}, None)


def test_the_recorded_step_tells_who_drew_the_samples(setting):
    assert NFT().draws == "old" and NFT().on_policy == {"velocity/rollout_deviation": "rollout_tolerance"}
    params = moved(setting.params, 0.1)  # training has moved on
    _, metrics = learn(NFT(), setting, params, averages=OLD, make=drawn_by(setting.params))
    assert metrics["velocity/rollout_deviation"].shape == (1, 2)  # by update and place
    assert metrics["velocity/rollout_deviation"].max() < 1e-5
    _, metrics = learn(NFT(), setting, params, averages=OLD)  # here, "old" begins as the trained parameters
    assert metrics["velocity/rollout_deviation"].min() > 1e-2


def test_the_old_average_is_moved_by_iteration(setting):
    state, _ = learn(NFT(), setting, averages=OLD, optimiser=optax.sgd(0.1), num_updates=2)
    for name, start in setting.params.items():
        np.testing.assert_allclose(state.averages["old"][name], 0.5 * start + 0.5 * state.params[name], rtol=1e-5)
        assert jnp.abs(state.params[name] - start).max() > 1e-4


class ByPlace(NFT):
    """Whose loss is logged by place."""

    def __call__(self, *given):
        loss, metrics = super().__call__(*given)
        return loss, metrics | {"ratio/loss": loss}


def test_draws_are_addressed_by_iteration_place_and_sample(setting):
    plan = setting.plan._replace(sigma=np.full((2, 2), 0.6, np.float32))  # places differ in nothing but their noise
    made = setting._replace(plan=plan)
    still = optax.GradientTransformation(lambda p: p, lambda g, s, p: (jax.tree.map(jnp.zeros_like, g), s))
    (_, first), (_, again) = (learn(ByPlace(), made, averages=OLD, optimiser=still, num_updates=2) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    by_place = first["ratio/loss"]  # [U, n]
    assert jnp.abs(by_place[:, 0] - by_place[:, 1]).min() > 1e-4
    # Whatever update takes a sample, its noise is that of its own address.
    own = roles(setting.params, {"old": setting.params}, None)
    for update, index in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
        for place, key in enumerate(place_keys(0, 2)):
            samples = seen(made.batch, plan, jnp.array(index), place)
            samples.extra["deviation"] = jnp.zeros(4)
            np.testing.assert_allclose(by_place[update, place], NFT()(own, samples, key, TOOLS)[0].mean(), rtol=1e-5)
    # The next iteration draws anew.
    later = jnp.stack([NFT()(own, samples, key, TOOLS)[0].mean() for key in place_keys(1, 2)])
    assert jnp.abs(later - by_place[1]).min() > 1e-4


@pytest.mark.parametrize("field", ["beta", "adv_max"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"objective.{field}={value!r}"):
        NFT(**{field: value})
