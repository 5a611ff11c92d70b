"""Prompts and images: TFDS builders and Grain loaders.

A task is a module with `load(split, folder)`, `batches(dataset, seed, size)`, `build_tokenizer()` and
`groups(metadata)`, the labels that an evaluation is reported by.
"""

from mixgrpo_jax.data import signs

TASKS = {"signs": signs}
