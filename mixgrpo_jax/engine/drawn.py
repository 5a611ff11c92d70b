"""The samples of an iteration: kept as a table, and drawn again."""

import csv
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.config import ConfigError, Settings
from mixgrpo_jax.engine.loading import average_path, converted, load_policy, mesh_of, version_of
from mixgrpo_jax.engine.programs import make_rollout
from mixgrpo_jax.engine.workdir import check
from mixgrpo_jax.rewards.contract import Score
from mixgrpo_jax.runtime import distributed
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.checkpoint import Checkpoints
from mixgrpo_jax.runtime.files import Path, place, replaced
from mixgrpo_jax.tasks import load_task


def write(workdir: Path, iteration: int, asked: list[str], scores: Mapping[str, Score], advantage: np.ndarray) -> None:
    """The samples of an iteration as `workdir`/drawn/ITERATION.csv: id, prompt, scores, advantage; empty is none."""
    if not distributed.is_first():
        return
    (workdir / "drawn").mkdir(parents=True, exist_ok=True)
    columns = [*(score.value for score in scores.values()), advantage]
    with replaced(workdir / "drawn" / f"{iteration}.csv") as path, path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "prompt", *scores, "advantage"])
        for sample, (prompt, *values) in enumerate(zip(asked, *columns)):
            table.writerow([sample, prompt, *("" if np.isnan(value) else value for value in values)])


def redraw(settings: Settings, workdir: str | os.PathLike, iteration: int, sample: int) -> tuple[np.ndarray, str]:
    """The picture [H, W, 3] uint8 of a sample of an iteration (from 1) of the run in `workdir`, and its prompt.

    It is drawn alone, from the parameters that drew it: those of one iteration before, of two with
    `one_step_off_policy`, or those that the run began with.

    Raises ConfigError for a sample that there is not, and ValueError where no checkpoint of these parameters is kept.
    """
    config, batch, planner = settings.config, settings.batch, settings.planner
    if iteration < 1:
        raise ConfigError(f"iteration={iteration}: a run's first is 1")
    if not 0 <= sample < settings.samples:
        raise ConfigError(f"id={sample}: an iteration has samples 0 to {settings.samples - 1}")
    check(config, workdir, reads=True)
    lag = 2 if config.one_step_off_policy else 1
    after, prompt = max(iteration - lag, 0), sample // batch.group
    checkpoints = _checkpoint(workdir, after, lag, iteration) if after else None

    mesh, features = mesh_of(settings), config.data.name == "features"
    parts, policy, trainable, frozen = load_policy(settings, mesh, master=True, text=not features)
    params, planned = trainable.params, planner.initial()
    if checkpoints:
        host = checkpoints.restore_host()
        version, draws = version_of(host, checkpoints), settings.objective.draws
        path = average_path("" if draws == "train" else draws, version)
        params = converted(checkpoints.restore_part(path, params), version, parts.table)
        planned = type(planned)(**host["planned" if version > 1 else "window"])
    while planned.iteration < iteration - 1:
        planned = planner.advance(planned)

    task = load_task(config.data.name)
    prompts = task.batches(task.load("train", config.data.folder), config.seed, batch.prompts)[iteration - 1]
    chosen = slice(prompt, prompt + 1)
    if features:
        cond = jax.tree.map(lambda leaf: leaf[chosen], prompts["features"])
    else:
        cond = jax.jit(policy.features)(frozen, policy.tokenize(prompts["prompt"][chosen]))
    plan = jax.tree.map(lambda leaf: leaf[..., chosen], planner.plan(planned, batch.prompts))
    noise = prompt if batch.shared_noise else sample
    with jax.set_mesh(mesh):
        draw = jax.jit(make_rollout(settings, parts, trainable.attach, mesh))
        key = jax.random.fold_in(jax.random.key(config.seed), planned.iteration)
        addresses = jnp.array([noise]), jnp.array([sample])
        drawn = draw(params, frozen, meshes.everywhere(plan, mesh), meshes.spread(cond, mesh), key, addresses)
        image = jax.jit(policy.decode)(frozen, drawn.x0)
    return distributed.gather(image)[0], prompts["prompt"][prompt]


def _checkpoint(workdir: str | os.PathLike, after: int, lag: int, iteration: int) -> Checkpoints:
    kept = Checkpoints(workdir).steps
    if after not in kept:
        drew = ", ".join(map(str, [*range(1, lag + 1), *(step + lag for step in kept)]))
        raise ValueError(
            f"iteration={iteration}: its samples were drawn after iteration {after}, of which {workdir} keeps no "
            f"checkpoint. Of iterations {drew} there are; checkpoint.every, keep and keep_every decide what stays"
        )
    return Checkpoints(place(workdir), step=after)
