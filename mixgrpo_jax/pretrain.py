"""Train a small policy from scratch by flow matching: what RL starts from.

    python -m mixgrpo_jax.pretrain --config=configs/signs.py --workdir=runs/signs

Text encoder and transformer, a small model of the family of model.folder, are trained together, for `pretrain.steps`
steps. The averaged parameters go to workdir/checkpoint, as diffusers lays them out, with card.json (command, seed,
steps, held-out scores) beside them.
"""

from mixgrpo_jax.runtime import progress

if __name__ == "__main__":
    progress.begin()  # the imports below take seconds

import json
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from jax import Array
from tqdm import trange

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.fields import listed
from mixgrpo_jax.engine.held_out import HeldOut, table
from mixgrpo_jax.engine.loading import load_rewards
from mixgrpo_jax.models import families
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rl.update import Average, TrainState, init_state
from mixgrpo_jax.runtime import app, distributed, report
from mixgrpo_jax.runtime.metrics import scored
from mixgrpo_jax.tasks import load_task


def flow_matching_loss(policy: Policy, shift: float, params: dict, images: Array, tokens: Any, key: Array) -> Array:
    """E |v(x_sigma, sigma, c) - (eps - x0)|^2 with x_sigma = (1 - sigma) x0 + sigma eps.

    sigma is logit-normal, then shifted as the sampler's grid is: what a picture says is decided at high noise.

    Args:
        images: [B, H, W, 3] uint8. tokens: as `policy.tokenize` gives them.
    """
    x0 = policy.codec.encode(None, images)
    keys = jax.random.split(key)
    sigma = jax.nn.sigmoid(math.log(shift) + jax.random.normal(keys[0], (x0.shape[0],)))
    noise = jax.random.normal(keys[1], x0.shape)
    level = sigma[:, None, None]
    cond = policy.features(params, tokens)
    v = policy.velocity(params["transformer"], (1 - level) * x0 + level * noise, sigma, cond)
    return jnp.square(v - (noise - x0)).mean()


def make_step(policy: Policy, options: Any):
    """The optimiser and `step(state, images, tokens, key) -> state, loss`, jitted."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, options.warmup, options.steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.adamw(schedule, b2=options.b2, weight_decay=options.weight_decay),
    )

    @jax.jit
    def step(state: TrainState, images, tokens, key):
        loss, gradients = jax.value_and_grad(flow_matching_loss, 2)(
            policy, options.shift, state.params, images, tokens, key
        )
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average must forget the initial parameters: its horizon grows with the steps made.
        decay = jnp.minimum(options.ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.averages["ema"], 1 - decay)
        return TrainState(params, opt_state, {"ema": ema}, state.step + 1), loss

    return optimiser, step


def pretrain(config: Any, workdir: str | pathlib.Path) -> dict[str, float]:
    """Train, save, and return the held-out scores."""
    settings = configs.resolve(config)
    workdir, options = pathlib.Path(workdir), settings.pretrain
    task = load_task(config.data.name)
    parts = families.small_parts(config.model.folder, task.build_tokenizer())
    policy = parts.family.make(parts, settings.model)
    key = jax.random.key(config.seed)
    optimiser, step = make_step(policy, options)
    params = families.init(parts, jax.random.fold_in(key, 0))
    for name in parts.family.encoders:
        if "relative_bias" in params.get(name, {}):
            params[name]["relative_bias"] *= options.bias_scale
    state = init_state(params, optimiser, {"ema": Average(options.ema_decay)})
    batches = task.batches(task.load("train", config.data.folder), config.seed, options.batch)
    held_out = HeldOut(settings, policy, load_rewards(settings))

    progress = trange(1, options.steps + 1, desc="pretrain", disable=not distributed.is_first())
    for index in progress:
        batch = batches[index - 1]
        tokens = policy.tokenize(batch["prompt"])
        images = batch["clean" if index <= options.clean_steps else "image"]
        state, loss = step(state, images, tokens, jax.random.fold_in(key, index))
        if index % 10 == 0:
            progress.set_postfix(loss=f"{loss:.4f}")
        if index % options.evaluate_every and index < options.steps:
            continue
        average = state.averages["ema"]
        images, scores = held_out.assess(average["transformer"], average | {"base": None})
        if distributed.is_first():
            progress.write(f"step {index}, loss {loss:.4f}\n" + table(scores))
    progress.close()

    means = {name: round(float(scored(values).mean()), 4) for name, values in scores.items()}
    if not distributed.is_first():
        return means
    families.save(workdir / "checkpoint", parts, average)
    card = {"command": " ".join(["python -m mixgrpo_jax.pretrain", *sys.argv[1:]]), "seed": config.seed, "steps": index}
    (workdir / "checkpoint" / "card.json").write_text(json.dumps(card | {"held_out": means}, indent=2) + "\n")
    print(table(scores, held_out.groups))
    report.save_png(workdir / "pretrained.png", report.tile(images[:96], columns=8))
    return means


@distributed.joined()
def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)
    pretrain(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = app.config_flag(listed)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(main)
