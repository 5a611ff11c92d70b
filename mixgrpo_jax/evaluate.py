"""Score a policy on held-out prompts.

    python -m mixgrpo_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart

Uses the newest checkpoint in workdir, or without one the model's folder. `--config.evaluation.ema=False` takes the raw
parameters, `--config.evaluation.solver=dpm_midpoint --config.evaluation.num_steps=10` another sampler.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from mixgrpo_jax import config as configs
from mixgrpo_jax.config import Settings
from mixgrpo_jax.flow import rollout, schedules
from mixgrpo_jax.flow.plans import solver_orders
from mixgrpo_jax.models import families
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.models.trainable import Trainable, make_trainable
from mixgrpo_jax.rewards.scoring import build, score_chunks
from mixgrpo_jax.runtime import checkpoint, distributed, report
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.tasks import load_task


def load_policy(
    settings: Settings, mesh: Any, *, master: bool = False, text: bool = True
) -> tuple[Parts, Policy, Trainable, dict[str, Any]]:
    """A config's model on a mesh: its parts, the policy, what is trained of it, and its other parameters by part.

    The other parameters hold the trainable's base as "base". `master` takes fully trained parameters in the optimiser's
    dtype; otherwise they keep the file's, as adapters' base and encoders do anyway. Without `text` the text encoders
    stay away: the data have their features.
    """
    config, options = settings.config, settings.config.model
    parts, params = families.load(
        options.folder,
        transformer=options.transformer,
        text=text,
        dtype=jnp.dtype(config.optimizer.dtype) if master and not settings.lora.rank else None,
        place=lambda tree, rules: meshes.shardings(tree, rules, mesh),
    )
    key = jax.random.key(config.seed)
    trainable = make_trainable(parts, params.pop("transformer"), settings.lora, key, settings.keep_base)
    return parts, parts.family.make(parts, options), trainable, params | {"base": trainable.base}


def make_draw(policy: Policy, options: Any, attach: Callable[[Any, Any], Any]) -> Callable[..., jax.Array]:
    """`draw(trained, frozen, cond, noise) -> images`: deterministic sampling by a config's `evaluation`, jitted.

    With `trained_steps` K, the trained policy takes the first K steps and the base the others (hybrid inference): what
    a picture says is decided early, what it looks like late.
    """
    shift = options.shift or schedules.resolution_shift(policy.latent_shape[0])
    sigmas = schedules.shifted_sigmas(options.num_steps, shift)
    orders = solver_orders(options.solver_order, options.num_steps, options.num_steps)
    switch = options.num_steps if options.trained_steps is None else options.trained_steps

    @jax.jit
    def draw(trained, frozen, cond, noise):
        x, base = noise, frozen["base"]
        for params, steps in ((attach(trained, base), slice(0, switch)), (base, slice(switch, options.num_steps))):
            if steps.start < steps.stop:
                grid = sigmas[steps.start : steps.stop + 1]
                x = rollout.integrate(policy.velocity, params, grid, orders[steps], x, cond, solver=options.solver)
        return policy.decode(frozen, x)

    return draw


class Assessment(NamedTuple):
    """Held-out pictures [N, H, W, 3] uint8 and their scores {name: [N]}."""

    images: np.ndarray
    scores: dict[str, np.ndarray]

    def save(self, path: pathlib.Path) -> None:
        """Write both to a .npz file."""
        arrays: dict[str, Any] = {"images": self.images, **self.scores}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Assessment":
        """Read what `save` wrote."""
        with np.load(path) as file:
            scores = {name: file[name] for name in file.files}
        return cls(scores.pop("images"), scores)


class HeldOut:
    """The held-out prompts of a task, and how a policy is scored on them."""

    def __init__(self, config: Any, policy: Policy, attach: Callable[[Any, Any], Any] = lambda trained, base: trained):
        self.options, self.policy = config.evaluation, policy
        self.task = load_task(config.data.name)
        dataset = self.task.load("test", config.data.folder)
        if self.options.prompts > len(dataset):
            raise configs.ConfigError(
                f"evaluation.prompts={self.options.prompts}: {config.data.name} holds {len(dataset)} out; ask for fewer"
            )
        self.elements = [dataset[i] for i in range(self.options.prompts)]
        self.prompts = [element["prompt"] for element in self.elements]
        self.metadata = [element["metadata"] for element in self.elements]
        self.groups = [self.task.groups(metadata) for metadata in self.metadata]
        self.rewards = build(dict.fromkeys([*config.rewards, *config.watched]), config.reward_options)
        self.key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)  # apart from every iteration's
        self._draw = make_draw(policy, self.options, attach)
        self._features = jax.jit(policy.features)

    def draw(self, trained: Any, frozen: Any) -> np.ndarray:
        """Pictures of the prompts, the same noise every time: a prompt's depends on its index, not on its batch."""
        count, size = len(self.prompts), self.options.batch
        images = []
        for start in tqdm(range(0, count, size), desc="draw held-out", leave=False, disable=not distributed.is_first()):
            index = np.arange(start, start + size)
            batch = self.task.collate([self.elements[i] for i in index])
            cond = batch.get("features") or self._features(frozen, self.policy.tokenize(batch["prompt"]))
            noise = rollout.initial_noise(rollout.Sampler(), self.key, jnp.asarray(index), self.policy.latent_shape)
            images.append(distributed.gather(self._draw(trained, frozen, cond, noise)))
        return np.concatenate(images)

    def assess(self, trained: Any, frozen: Any) -> Assessment:
        """Pictures of the prompts and their scores by every reward of the config."""
        images = self.draw(trained, frozen)
        score = functools.partial(score_chunks, self.rewards)
        everything = np.arange(len(images))
        scores = distributed.map_rows(score, [images], [everything], self.prompts, self.metadata)
        return Assessment(images, {name: score.value for name, score in scores.items()})


def table(scores: dict[str, np.ndarray], groups: Sequence[dict[str, str]] = ()) -> str:
    """Mean scores as text: over all samples, then by each label of their groups, {kind: label} for each sample."""
    rows = {"all": np.ones(len(next(iter(scores.values()))), bool)}
    for kind in dict.fromkeys(kind for group in groups for kind in group):
        labels = np.array([group.get(kind, "") for group in groups])
        rows |= {f"{kind} {label}": labels == label for label in np.unique(labels)}

    title = max(map(len, rows)) + 2
    columns = {name: max(len(name) + 2, 10) for name in scores}
    lines = [f"{'':<{title}}{'n':>6}" + "".join(f"{name:>{width}}" for name, width in columns.items())]
    for row, chosen in rows.items():
        means = "".join(f"{scores[name][chosen].mean():>{width}.3f}" for name, width in columns.items())
        lines.append(f"{row:<{title}}{chosen.sum():>6}{means}")
    return "\n".join(lines)


def restore(config: Any, workdir: str | pathlib.Path, trained: Any) -> tuple[Any, str]:
    """Trained parameters (EMA or raw) from the newest checkpoint of workdir, else `trained`; and where from."""
    checkpoints = checkpoint.Checkpoints(workdir)
    if checkpoints.latest is None:
        return trained, config.model.folder or "the shipped checkpoint"
    name = "ema" if config.evaluation.ema else "params"
    return checkpoints.restore_part(name, trained), f"iteration {checkpoints.latest} ({name})"


def evaluate(config: Any, workdir: str | pathlib.Path) -> dict[str, float]:
    """Score, print the table, write the pictures to `workdir`/held_out.png; returns the mean scores."""
    settings = configs.resolve(config)
    text = config.data.name != "features"
    _, policy, trainable, frozen = load_policy(settings, meshes.make_mesh(config.mesh), text=text)
    trained, source = restore(config, workdir, trainable.params)
    held_out = HeldOut(config, policy, trainable.attach)
    images, scores = held_out.assess(trained, frozen)
    if distributed.is_first():
        print(f"{source}, {config.evaluation.num_steps} steps of {config.evaluation.solver}")
        print(table(scores, held_out.groups))
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
        report.save_png(pathlib.Path(workdir) / "held_out.png", report.tile(images[:96], columns=8))
    return {name: float(values.mean()) for name, values in scores.items()}


def main(_):  # noqa: D103
    distributed.initialize()
    logging.set_verbosity(logging.WARNING)
    evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(main)
