"""A policy without its weights: the architectures of its parts, and the shapes of their parameters on a mesh."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from mixgrpo_jax.models import flux, lora, policy, t5, vae
from mixgrpo_jax.models.clip import text as clip
from mixgrpo_jax.models.policy import Parts, Trainable

ARCHITECTURES = {"flux1-dev": flux.flux1_dev, "flux1-schnell": flux.flux1_schnell}


def known_parts(architecture: str) -> Parts:
    """The parts of a released model by name, one of ARCHITECTURES: FLUX.1's transformer, T5 XXL, CLIP L and VAE."""
    return Parts(ARCHITECTURES[architecture](), t5.t5_xxl(), text_encoder=clip.clip_l(), vae=vae.flux_vae())


def read_parts(folder: str | pathlib.Path, transformer: str = "") -> Parts:
    """The parts that `policy.load` reads, from their configs and tokenizers alone. Raises ValueError as it does."""
    folder = policy.find(folder)
    readers: dict[str, Callable] = {
        "text_encoder": clip.read_config,
        "text_encoder_2": t5.read_config,
        "vae": vae.read_config,
        "tokenizer": transformers.AutoTokenizer.from_pretrained,
        "tokenizer_2": transformers.AutoTokenizer.from_pretrained,
    }
    found = {name: read(folder / name) for name, read in readers.items() if (folder / name).is_dir()}
    return Parts(flux.read_config(transformer or folder / "transformer"), **found)


def shapes(parts: Parts, *, text: bool, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Shapes of the parameters by part, in bf16 as released, the transformer's in `dtype`; `text` encoders or none."""
    inits: dict[str, Callable] = {"transformer": flux.init, "vae": vae.init}
    inits |= {"text_encoder": clip.init, "text_encoder_2": t5.init} if text else {}

    def part(name: str, init: Callable) -> Any:
        made = jax.eval_shape(functools.partial(init, getattr(parts, name)), jax.random.key(0))
        own = dtype if name == "transformer" else jnp.bfloat16
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, own), made)

    return {name: part(name, init) for name, init in inits.items() if getattr(parts, name)}


def trainable(transformer: Any, config: lora.LoraConfig, keep_base: bool) -> Trainable:
    """`policy.trainable` of a transformer's shapes."""

    def split(params: Any) -> tuple[Any, Any]:
        made = policy.trainable(params, config, jax.random.key(0), keep_base)
        return made.params, made.base

    params, base = jax.eval_shape(split, transformer)
    return Trainable(params, base, policy.attachment(config))


def inputs(parts: Parts, prompts: int, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the tokens that text encoders read, and of cached features in their place, of P prompts."""
    tokens = {"t5": jax.ShapeDtypeStruct((prompts, length), jnp.int32)}
    if parts.text_encoder:
        limit = parts.text_encoder.max_position_embeddings
        tokens["clip"] = jax.ShapeDtypeStruct((prompts, limit), jnp.int32)
    text = (prompts, length, parts.transformer.joint_attention_dim)
    sizes = {"text": text, "pooled": (prompts, parts.transformer.pooled_projection_dim)}
    return tokens, {name: jax.ShapeDtypeStruct(size, jnp.bfloat16) for name, size in sizes.items()}
