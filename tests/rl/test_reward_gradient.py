"""Gradients of rewards through a trajectory: against finite differences, the sampler's own gradient and closed forms."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.flow.plans.tail import Tail
from mixgrpo_jax.flow.rollout import Rows, rollout
from mixgrpo_jax.rl.objectives.adjoint import AdjointMatching
from mixgrpo_jax.rl.objectives.reward_gradient import DRaFT, LeapAlign, gradients, leaps
from mixgrpo_jax.rl.samples import Samples
from mixgrpo_jax.rl.update import count_evaluations
from tests.conftest import toy_velocity
from tests.rl.toys import KEY, SAMPLER, TOOLS, case, every_place, learn, moved

STEPS = 5
ALL = Tail(num_steps=STEPS, last=0, group=3)


def reward(x0):
    """Of each sample, [B]: neither linear nor the same at two places."""
    weight = jnp.arange(1.0, 13).reshape(3, 4) / 12
    return (weight * jnp.sin(2 * x0) + 0.1 * x0**2).sum((1, 2))


def drawn(toy, planner=ALL, state=None):
    """Two groups of a plan, with their rewards and the rewards' gradients."""
    made = case(toy, planner, planner.initial() if state is None else state)
    value, gradient = reward(made.batch.x0), jax.grad(lambda x: reward(x).sum())(made.batch.x0)
    return made._replace(batch=made.batch._replace(extra={"reward_grad": gradient[None], "reward": value[None]}))


def of_sampler(toy, planner, params, made):
    """The gradient of -mean R through the sampler, of which the parameters are followed in the recorded steps alone."""
    layout, plan = planner.layout, made.plan
    noise = jax.random.normal(KEY, (len(made.ids), 3, 4))

    def loss(params):
        before = plan.segments[0]._replace(sigma=plan.segments[0].sigma)
        held = partial(toy_velocity, jax.lax.stop_gradient(made.params))
        first = rollout(held, plan._replace(segments=(before,)), noise, toy[3], KEY, made.ids, layout=layout[:1],
                        sampler=SAMPLER).x0  # fmt: skip
        rest = plan._replace(segments=plan.segments[1:])
        bound = partial(toy_velocity, params)
        x0 = rollout(bound, rest, first, toy[3], KEY, made.ids, layout=layout[1:], sampler=SAMPLER).x0
        return -reward(x0).mean()

    return jax.grad(loss)(params)


def assert_close(found, expected, rtol=2e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


@pytest.mark.parametrize("planner", [ALL, replace(ALL, last=2), replace(ALL, last=1), replace(ALL, last=3, jump=True)])
def test_draft_is_the_gradient_of_the_sampler_through_what_is_recorded(toy, planner):
    made = drawn(toy, planner)
    state, metrics = learn(DRaFT(), made)
    assert_close(state.opt_state, of_sampler(toy, planner, made.params, made))
    assert np.abs(metrics["loss/policy"]).max() < 1e-4  # where nothing has moved yet
    assert np.asarray(metrics["velocity/rollout_deviation"]).max() < 1e-5
    assert metrics["nfe/update"] == 6 * (1 + 2 * (planner.num_trained - 1) + planner.num_trained)
    assert metrics["nfe/gradient"] == 6 * planner.num_trained
