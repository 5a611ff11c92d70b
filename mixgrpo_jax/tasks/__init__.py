"""Prompts and images: TFDS builders and Grain loaders. TASKS says where each task is; it is loaded when it is named.

A task is a module with `load(split, folder)`, `batches(dataset, seed, size)`, `collate(elements)`, which makes such a
batch, and `groups(metadata)`, the labels that an evaluation is reported by. A batch has `prompt` and `metadata`, lists,
and may have `features`, what a policy's text encoders say of the prompts.
"""

import importlib
from typing import Any

TASKS: dict[str, str] = {
    "signs": "mixgrpo_jax.tasks.signs.data",
    "scenes": "mixgrpo_jax.tasks.scenes.data",
    "features": "mixgrpo_jax.data.features",
}


def load_task(name: str) -> Any:
    """The module of a task in TASKS, imported now."""
    return importlib.import_module(TASKS[name])
