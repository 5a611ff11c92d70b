"""Score a policy on held-out prompts.

    python -m mixgrpo_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart

Uses the newest checkpoint in workdir, or without one the model's folder. `--config.evaluation.ema=False` takes the raw
parameters, `--config.evaluation.solver=dpm_midpoint --config.evaluation.num_steps=10` another sampler.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from mixgrpo_jax import config as configs
from mixgrpo_jax.data import TASKS
from mixgrpo_jax.flow import rollout, schedules
from mixgrpo_jax.flow.plans import solver_orders
from mixgrpo_jax.models import policy as policies
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rewards import REWARDS, score_all
from mixgrpo_jax.runtime import checkpoint, report


def make_draw(policy: Policy, options: Any) -> Callable[[Any, Any, jax.Array, Any], jax.Array]:
    """`draw(params, cond, key, ids) -> images`: deterministic sampling by a config's `evaluation` section, jitted.

    The picture of sample id [B] depends on the key and on that id alone, not on its batch.
    """
    sigmas = schedules.shifted_sigmas(options.num_steps, options.shift)
    orders = solver_orders(options.solver_order, options.num_steps, options.num_steps)

    @jax.jit
    def draw(params, cond, key, ids):
        noise = rollout.initial_noise(rollout.Sampler(), key, ids, policy.latent_shape)
        return policy.codec.decode(
            rollout.integrate(policy.velocity, params, sigmas, orders, noise, cond, solver=options.solver)
        )

    return draw


class HeldOut:
    """The held-out prompts of a task, and how a policy is scored on them."""

    def __init__(self, config: Any, policy: Policy):
        self.options, self.policy = config.evaluation, policy
        dataset = TASKS[config.data.name].load("test", config.data.folder)
        if self.options.prompts > len(dataset):
            raise configs.ConfigError(
                f"evaluation.prompts={self.options.prompts}: {config.data.name} holds {len(dataset)} out; ask for fewer"
            )
        elements = [dataset[i] for i in range(self.options.prompts)]
        self.prompts = [element["prompt"] for element in elements]
        self.metadata = [element["metadata"] for element in elements]
        self.groups = [TASKS[config.data.name].groups(metadata) for metadata in self.metadata]
        self.rewards = [REWARDS[name]() for name in dict.fromkeys([*config.rewards, *config.watched])]
        self.key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)  # apart from every iteration's
        self._draw = make_draw(policy, self.options)
        self._features = jax.jit(policy.features)

    def draw(self, params: Any, text_params: Any, count: int | None = None) -> np.ndarray:
        """Pictures of the first `count` prompts (all by default), the same noise every time."""
        prompts, size = self.prompts[:count], self.options.batch
        images = []
        for start in tqdm(range(0, len(prompts), size), desc="draw held-out", leave=False):
            # A last, shorter batch is filled up, so that one program serves all.
            index = np.arange(start, start + size) % len(self.prompts)
            cond = self._features(text_params, self.policy.tokenize([self.prompts[i] for i in index]))
            images.append(np.asarray(self._draw(params, cond, self.key, index)))
        return np.concatenate(images)[: len(prompts)]

    def score(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Scores {name: [N]} of pictures of the first N prompts, by every reward of the config."""
        count = len(images)
        return score_all(self.rewards, images, self.prompts[:count], self.metadata[:count])


def table(scores: dict[str, np.ndarray], groups: Sequence[dict[str, str]] = ()) -> str:
    """Mean scores as text: over all samples, then by each label of their groups, {kind: label} for each sample."""
    lines = [f"{'':<16}{'n':>6}" + "".join(f"{name:>10}" for name in scores)]

    def add(title, chosen):
        means = "".join(f"{values[chosen].mean():>10.3f}" for values in scores.values())
        lines.append(f"{title:<16}{chosen.sum():>6}{means}")

    add("all", np.ones(len(next(iter(scores.values()))), bool))
    for kind in groups[0] if groups else ():
        labels = np.array([group[kind] for group in groups])
        for label in np.unique(labels):
            add(f"{kind} {label}", labels == label)
    return "\n".join(lines)


def restore(config: Any, workdir: str | pathlib.Path, params: Any) -> tuple[Any, str]:
    """Trained parameters (EMA or raw) from the newest checkpoint of workdir, else `params`; and where from."""
    checkpoints = checkpoint.Checkpoints(workdir)
    if checkpoints.latest is None:
        return params, config.model.folder or "the shipped checkpoint"
    name = "ema" if config.evaluation.ema else "params"
    return checkpoints.restore_part(name, params), f"iteration {checkpoints.latest} ({name})"


def evaluate(config: Any, workdir: str | pathlib.Path) -> dict[str, float]:
    """Score, print the table, write the pictures to `workdir`/held_out.png; returns the mean scores."""
    configs.resolve(config)
    parts, params = policies.load(config.model.folder)
    policy = policies.make(parts, config.model, remat="none")
    trained, source = restore(config, workdir, params["transformer"])
    held_out = HeldOut(config, policy)
    images = held_out.draw(trained, params["text_encoder"])
    scores = held_out.score(images)
    print(f"{source}, {config.evaluation.num_steps} steps of {config.evaluation.solver}")
    print(table(scores, held_out.groups))
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    report.save_png(pathlib.Path(workdir) / "held_out.png", report.tile(images[:96], columns=8))
    return {name: float(values.mean()) for name, values in scores.items()}


def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)
    evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(main)
