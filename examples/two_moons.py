"""MixGRPO on points in the plane, with a network of one's own: `mixgrpo_jax` draws the samples and makes the update.

    python examples/two_moons.py

A flow is fitted to two moons, then rewarded for the upper one. It takes half a minute on two CPU cores, and leaves
two_moons.png beside this file. What `mixgrpo_jax` does is in `post_train` and `sample`.
"""

import argparse
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mixgrpo_jax as mj

PROMPTS, GROUP = 32, 12  # a prompt is nothing but the noise that its group begins with
PICTURE = pathlib.Path(__file__).with_suffix(".png")


def moons(key, count):
    """Points on both moons, [count, 2]."""
    angle, blur = jax.random.uniform(key, (count,), maxval=jnp.pi), 0.07 * jax.random.normal(key, (count, 2))
    upper, lower = jnp.stack([jnp.cos(angle), jnp.sin(angle)]), jnp.stack([1 - jnp.cos(angle), 0.5 - jnp.sin(angle)])
    return jnp.where(jnp.arange(count) % 2, upper, lower).T + blur


def reward(x):
    """Near 1 on the upper moon, and less away from it: [B, 2] -> [B]."""
    from_arc = jnp.where(x[:, 1] > 0, jnp.abs(jnp.hypot(*x.T) - 1), jnp.hypot(jnp.abs(x[:, 0]) - 1, x[:, 1]))
    return jnp.exp(-from_arc / 0.3)


def make_network(key, width=128):
    """Parameters of a perceptron with two hidden layers."""
    sizes = (2 + 1, width, width, 2)
    return [
        {"kernel": jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m), "bias": jnp.zeros(n)}
        for k, m, n in zip(jax.random.split(key, 3), sizes, sizes[1:])
    ]


def velocity(params, x, sigma, cond):
    """x [B, 2], sigma [B] -> v [B, 2]; there is nothing to be told, so `cond` is None."""
    x = jnp.concatenate([x, jnp.broadcast_to(sigma, len(x))[:, None]], axis=1)
    for layer in params[:-1]:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def pretrain(params, steps):
    """Flow matching: v is fitted to eps - x0 at x = (1 - sigma) x0 + sigma eps."""
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, key):
        keys = jax.random.split(key, 3)
        x0, eps, sigma = moons(keys[0], 512), jax.random.normal(keys[1], (512, 2)), jax.random.uniform(keys[2], (512,))
        x = (1 - sigma[:, None]) * x0 + sigma[:, None] * eps
        return jnp.square(velocity(params, x, sigma, None) - (eps - x0)).mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    begin, keys = (params, optimiser.init(params)), jax.random.split(jax.random.key(1), steps)
    return jax.jit(jax.lax.scan, static_argnums=0)(step, begin, keys)[0][0]


def post_train(base, iterations):
    """MixGRPO; returns the parameters, and the mean reward of every iteration."""
    planner = mj.Window(num_steps=12, shift=1.0, length=3, iterations_per_window=3, at_end="roll_back", group=GROUP)
    sampler, credit, optimiser = mj.Sampler(eta=0.7), mj.Credit(), optax.adam(3e-4)
    tools = mj.Tools(sampler, mj.make_terms({"kl_base": 0.6}, sampler), tokens={"point": slice(None)})
    group, samples = np.repeat(np.arange(PROMPTS), GROUP), PROMPTS * GROUP

    def roles(params, averages, base):
        return {"train": partial(velocity, params), "base": partial(velocity, base)}

    @jax.jit
    def draw(params, plan, key):
        noise = mj.initial_noise(sampler, jax.random.fold_in(key, 0), jnp.arange(PROMPTS), (2,))
        bound, key, ids = partial(velocity, params), jax.random.fold_in(key, 1), jnp.arange(samples)
        return mj.rollout(bound, plan, noise, None, key, ids, layout=planner.layout, sampler=sampler)

    objective = mj.GRPO(clip_low=0.2, clip_high=0.2)
    update = jax.jit(mj.make_update(objective, roles, optimiser, tools, num_updates=4, micro_batch=96))
    state, window, means = mj.init_state(base, optimiser), planner.initial(), []
    for iteration in range(iterations):
        plan = planner.plan(window, PROMPTS)
        drawn = draw(state.params, plan, jax.random.key(iteration))
        scores = {"moon": np.asarray(reward(drawn.x0))}
        advantage = credit.of_samples(scores, group, {"moon": 1.0})
        batch = mj.Batch(None, drawn.rows, advantage[None, :, None], jnp.ones(samples), None, {})
        state, _ = update(state, base, batch, plan)
        window, means = planner.advance(window), [*means, scores["moon"].mean()]
    return state.params, means


def sample(params, count=2000):
    """Points of the flow's ODE, [count, 2]."""
    noise = jax.random.normal(jax.random.key(2), (count, 2))
    return mj.integrate(partial(velocity, params), mj.shifted_sigmas(24, shift=1.0), noise, None)


def draw_picture(path, before, after, means):
    """Both sets of points over the reward, and the reward's curve."""
    x, y = np.meshgrid(np.linspace(-1.7, 2.7, 220), np.linspace(-1.2, 1.7, 145))
    shade = np.asarray(reward(jnp.stack([x.ravel(), y.ravel()], 1))).reshape(x.shape)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), width_ratios=(3, 3, 2.2), layout="constrained")
    for axis, points, title in zip(axes, (before, after), ("before", "after")):
        axis.imshow(shade, cmap="Greens", vmin=0, vmax=1.4, origin="lower", extent=(-1.7, 2.7, -1.2, 1.7))
        axis.scatter(*np.asarray(points).T, s=4, color="#1d3557", alpha=0.5, linewidths=0)
        axis.set(title=f"{title}: mean reward {reward(points).mean():.2f}", xticks=[], yticks=[])
        axis.set(xlim=(-1.7, 2.7), ylim=(-1.2, 1.7))
    axes[2].plot(means, color="#1d3557")
    axes[2].set(title="mean reward of the samples", xlabel="iteration", ylim=(0, 1))
    axes[2].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(picture=PICTURE, pretraining=6000, iterations=80):
    """Returns the mean reward before and after; draws no picture where its path is empty."""
    base = pretrain(make_network(jax.random.key(0)), pretraining)
    params, means = post_train(base, iterations)
    before, after = sample(base), sample(params)
    if picture:
        draw_picture(picture, before, after, means)
    return float(reward(before).mean()), float(reward(after).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default=PICTURE, help="where to save it")
    parser.add_argument("--pretraining", type=int, default=6000, help="steps of flow matching")
    parser.add_argument("--iterations", type=int, default=80, help="of MixGRPO")
    print("mean reward: {:.3f} before, {:.3f} after".format(*main(**vars(parser.parse_args()))))
