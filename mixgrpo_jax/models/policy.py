"""The contract of a model: what a trainer sees of it, whatever its family is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mixgrpo_jax.models.codec import Codec


@dataclass(frozen=True)
class Policy:
    """A model behind a few functions; parameters are passed in, never held.

    `params` are the checkpoint folder's parts by name: "transformer", its text encoders, "vae". P prompts, B samples.

    velocity: (transformer parameters, x [B, S, C], sigma [B] or scalar, cond) -> v [B, S, C] fp32, guidance included.
    features: (params, tokens) -> cond, a dict of arrays with leading axis P.
    tokenize: prompts -> tokens, a dict of ids [P, L] int32. Raises ValueError for a prompt that does not fit.
    token_shapes, cond_shapes: P -> shapes of tokens, and of features that were computed before, in bf16.
    codec: pictures <-> packed latents.
    flops: of one evaluation of the model on one sample.
    tokens: each modality's slice of the S tokens.
    evaluations: of the model, that one velocity costs: 2 where guidance takes a second one.
    """

    velocity: Callable[[Any, Array, Array, Any], Array]
    features: Callable[[Any, Any], dict[str, Array]]
    tokenize: Callable[[Sequence[str]], dict[str, np.ndarray]]
    token_shapes: Callable[[int], dict[str, Any]]
    cond_shapes: Callable[[int], dict[str, Any]]
    codec: Codec
    flops: float
    tokens: Mapping[str, slice] = field(default_factory=lambda: {"image": slice(None)})
    evaluations: int = 1

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, channels) of a packed latent."""
        return int(np.prod(self.codec.grid)), self.codec.channels

    def decode(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> pictures [B, H, W, 3] uint8."""
        return self.codec.decode(params.get("vae"), tokens)

    def pixels(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> pictures [B, H, W, 3] fp32 from 0 to 255, differentiable: see `Codec.pixels`."""
        return self.codec.pixels(params.get("vae"), tokens)


def apply_options(config: Any, remat: str | None) -> dict[str, Any]:
    """How a transformer's `apply` computes, by a config's `model` section; `remat`, if not None, overrides its own."""
    reduce_dtype = None if remat == "none" else jnp.dtype(config.reduce_dtype)  # such programs have no gradients
    policy = config.remat if remat is None else remat
    return dict(dtype=jnp.dtype(config.dtype), remat=policy, attention=config.attention, reduce_dtype=reduce_dtype)


def check_lengths(prompts: Sequence[str], rows: Sequence[Sequence[int]], limit: int) -> None:
    """Raises ValueError for the first prompt whose row of ids is longer than `limit`."""
    for prompt, row in zip(prompts, rows):
        if len(row) > limit:
            raise ValueError(
                f"prompt {prompt!r} has {len(row)} tokens; the model takes {limit}: shorten it, or raise "
                "model.text_length"
            )
