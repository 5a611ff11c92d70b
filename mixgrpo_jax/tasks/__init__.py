"""Prompts and images: TFDS builders and Grain loaders.

A task is a module with `load(split, folder)`, `batches(dataset, seed, size)`, `collate(elements)`, which makes such a
batch, and `groups(metadata)`, the labels that an evaluation is reported by. A batch has `prompt` and `metadata`, lists,
and may have `features`, what a policy's text encoders say of the prompts.
"""

from mixgrpo_jax.data import features
from mixgrpo_jax.tasks import scenes, signs

TASKS = {"signs": signs, "scenes": scenes, "features": features}
