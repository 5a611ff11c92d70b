"""What is trained of a transformer, and what stays as it was."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.models import lora, lora_files
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.lora_config import LoraConfig


class Trainable(NamedTuple):
    """What is trained of a transformer, what stays, and how the two make the parameters of a velocity."""

    params: Any
    base: Any
    attach: Callable[[Any, Any], Any]


def make_trainable(parts: Parts, params: Any, config: LoraConfig, key: Array, keep_base: bool) -> Trainable:
    """All parameters, or with a LoRA rank its adapters over the frozen base, fresh or from a file.

    `keep_base` asks for the parameters before training, as a KL to the reference and hybrid sampling do: a second copy
    of a fully trained model; with LoRA they are there at no cost.
    """
    if config.rank:
        config = config.on(parts.family.targets)
        adapters = lora.init(config, params, key)
        if config.init_from:
            rules = parts.family.transformer.rules(parts.configs["transformer"])
            adapters = lora_files.start(config, rules, params, adapters)
        return Trainable(adapters, lora.freeze(params, config.base), attachment(config))
    copy = jax.tree.map(jnp.copy, params) if keep_base else None  # training takes the buffers of its own over
    return Trainable(params, copy, attachment(config))


def trainable_shapes(parts: Parts, params: Any, config: LoraConfig, keep_base: bool) -> Trainable:
    """`make_trainable` of the shapes of a transformer's parameters."""

    fresh = dataclasses.replace(config, init_from="")  # no file is read for shapes

    def split(params: Any) -> tuple[Any, Any]:
        made = make_trainable(parts, params, fresh, jax.random.key(0), keep_base)
        return made.params, made.base

    trained, base = jax.eval_shape(split, params)
    return Trainable(trained, base, attachment(config))


def attachment(config: LoraConfig) -> Callable[[Any, Any], Any]:
    """`attach` of a `Trainable`."""
    if config.rank:
        return lambda trained, base: lora.attach(base, trained, config.scale)
    return lambda trained, base: trained
