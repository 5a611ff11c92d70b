"""Draw pictures for prompts.

    python -m mixgrpo_jax.sample --workdir=runs/quickstart \\
        --prompt="a blue sign that says 4270 in white" --prompt="a pink sign that says 8 in black"

    python -m mixgrpo_jax.sample --workdir=runs/quickstart --iteration=26 --id=13

Uses the newest checkpoint in workdir (with --base the model's folder), the config of its run (or --config), and the
sampler of its `evaluation` section, whose fields are flags. Writes workdir/samples/NNN.png, and page.png with all of
them in the prompts' order.

With --iteration and --id it draws a sample of training again, as workdir/samples/ITERATION_ID.png, where a checkpoint
of the parameters that drew it is kept. Its scores are in workdir/drawn/ITERATION.csv.
"""

from mixgrpo_jax.runtime import progress

if __name__ == "__main__":
    progress.begin()  # the imports below take seconds

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from mixgrpo_jax import config as configs
from mixgrpo_jax.config import Settings
from mixgrpo_jax.engine.drawn import redraw
from mixgrpo_jax.engine.fields import listed
from mixgrpo_jax.engine.held_out import make_draw
from mixgrpo_jax.engine.loading import load_policy, mesh_of, restore_trained
from mixgrpo_jax.engine.workdir import with_own_config
from mixgrpo_jax.flow.rollout import initial_noise
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.runtime import app, distributed, report
from mixgrpo_jax.runtime.files import Path, place


def sample(
    config: Any,
    workdir: str | os.PathLike,
    prompts: Sequence[str],
    noise: np.ndarray | None = None,
    *,
    base: bool = False,
) -> np.ndarray:
    """Draw one picture for each prompt, write them, and return them [N, H, W, 3] uint8.

    Picture n has the noise of (config.seed, n), whatever the other prompts are, unless `noise` [N, S, C] is given. With
    `base` the policy is not what the run in `workdir` has trained, but what it began with.
    """
    settings = configs.resolve(config)
    if not prompts:
        raise configs.ConfigError("prompt: none was given; repeat --prompt='...' for each picture")
    mesh = mesh_of(settings)
    with jax.set_mesh(mesh):
        images = _draw(settings, mesh, workdir, prompts, noise, base)
    if distributed.is_first():
        write(place(workdir) / "samples", images)
    return images


def _draw(
    settings: Settings,
    mesh: Any,
    workdir: str | os.PathLike,
    prompts: Sequence[str],
    noise: np.ndarray | None,
    base: bool,
) -> np.ndarray:
    parts, policy, trainable, frozen = load_policy(settings, mesh)
    trained, source = restore_trained(settings, parts, workdir, trainable.params, base)
    options = settings.evaluation
    draw, features = make_draw(policy, options, trainable.attach), jax.jit(policy.features)
    if distributed.is_first():
        progress.say(f"{source}, {options.num_steps} steps of {options.solver}")

    if noise is None:
        key, ids = jax.random.key(settings.config.seed), jnp.arange(len(prompts))
        noise = np.asarray(initial_noise(Sampler(), key, ids, policy.latent_shape))
    size, drawn = min(options.batch, len(prompts)), []
    for start in progress.over(range(0, len(prompts), size), "drawing, batch", -(-len(prompts) // size)):
        index = np.arange(start, start + size) % len(prompts)  # a short last batch is filled up: one program
        cond = features(frozen, policy.tokenize([prompts[i] for i in index.tolist()]))
        drawn.append(distributed.gather(draw(trained, frozen, cond, noise[index])[0]))
    return np.concatenate(drawn)[: len(prompts)]


def again(config: Any, workdir: str | os.PathLike, iteration: int, number: int) -> np.ndarray:
    """Draw a sample of training again, write it, and return it [H, W, 3] uint8; see `redraw`."""
    image, prompt = redraw(configs.resolve(config), workdir, iteration, number)
    if distributed.is_first():
        file = place(workdir) / "samples" / f"{iteration}_{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        report.save_png(file, image)
        print(f"{file}: {prompt}")
    return image


def write(folder: Path, images: np.ndarray) -> None:
    """The pictures [N, H, W, 3] one by one, and on one page."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        report.save_png(folder / f"{number:03}.png", image)
    report.save_png(folder / "page.png", report.tile(images, columns=4, scale=4))
    progress.say(f"pictures: {folder / 'page.png'}, and one by one beside it")


@distributed.joined()
def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)
    if _ITERATION.value is None and _ID.value is None:
        sample(_CONFIG.value, _WORKDIR.value, _PROMPT.value, base=_BASE.value)
    elif _ITERATION.value is None or _ID.value is None or _PROMPT.value or _BASE.value:
        raise configs.ConfigError("iteration and id: give both, and neither prompt nor base, to draw a sample again")
    else:
        again(_CONFIG.value, _WORKDIR.value, _ITERATION.value, _ID.value)


if __name__ == "__main__":
    _CONFIG = app.config_flag(listed)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    _PROMPT = flags.DEFINE_multi_string("prompt", None, "What to draw; may be repeated.")
    _ITERATION = flags.DEFINE_integer("iteration", None, "Draw a sample of this iteration of training again.")
    _ID = flags.DEFINE_integer("id", None, "Which of the iteration's samples.")
    _BASE = flags.DEFINE_bool("base", False, "Take the model's folder, as it was before training.")
    app.run(main, with_own_config(sys.argv))
