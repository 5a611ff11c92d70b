"""Where a run's numbers and pictures go beside metrics.jsonl: TensorBoard, and Weights & Biases."""

import importlib.util
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mixgrpo_jax.runtime.files import place

# Of an iteration: its scalars, and images [H, W, 3] uint8 by name.
Board = Callable[[int, Mapping[str, float], Mapping[str, np.ndarray]], None]


def found(workdir: str | os.PathLike, project: str, config: Mapping[str, Any] | None, fresh: bool) -> list[Board]:
    """TensorBoard, where its extra is installed, and a run of the project, if there is one."""
    boards = [_tensorboard(workdir)] if importlib.util.find_spec("tensorflow") else []
    return boards + ([_wandb(workdir, project, config, fresh)] if project else [])


def _tensorboard(workdir: str | os.PathLike) -> Board:
    """clu's writer, whose import needs TensorFlow."""
    from clu import metric_writers

    writer = metric_writers.SummaryWriter(str(workdir))

    def write(iteration: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        writer.write_scalars(iteration, scalars)
        if images:
            writer.write_images(iteration, images)
        writer.flush()

    return write


def check(project: str) -> None:
    """Refuse a project of Weights & Biases where the extra `wandb` is not installed."""
    if project and not importlib.util.find_spec("wandb"):
        raise ValueError(f"wandb={project!r}: it is not installed; pip install -e '.[wandb]', or set wandb=''")


def _wandb(workdir: str | os.PathLike, project: str, config: Mapping[str, Any] | None, fresh: bool) -> Board:
    """A run of Weights & Biases, whose id is in the workdir: a run that was stopped goes on there."""
    import wandb

    file = place(workdir) / "wandb_id"
    if fresh or not file.is_file():
        file.write_text(secrets.token_hex(4))
    name = pathlib.PurePath(str(workdir)).name
    run = wandb.init(
        project=project,
        id=file.read_text(),
        name=name,
        resume="allow",
        config=dict(config or {}),
        reinit="finish_previous",
    )

    def write(iteration: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        run.log({**scalars, **{name: wandb.Image(image) for name, image in images.items()}}, step=iteration)

    return write
