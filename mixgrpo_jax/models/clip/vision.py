"""CLIP's image encoder: pixels to one vector in the space that its text encoder shares."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixgrpo_jax.models.clip.text import LayerNorm, TowerConfig, apply_blocks, block_table, make_blocks, norm
from mixgrpo_jax.models.io.weights import Rule, linear
from mixgrpo_jax.models.nn.layers import Linear, normal

Params = dict[str, Any]

PREFIX = "vision_model."
PATCH_AXES = (2, 3, 1, 0)  # a convolution's (out, in, y, x) to [y, x, in, out]


def table(prefix: str = PREFIX) -> list[Rule]:
    """Rules from transformers' tensors to parameters; `prefix` stands before the names of the encoder's tensors."""
    return [
        Rule(f"{prefix}embeddings.class_embedding", "class_embedding"),
        Rule(f"{prefix}embeddings.patch_embedding.weight", "patch_embedding", PATCH_AXES),
        Rule(f"{prefix}embeddings.position_embedding.weight", "positions"),
        *norm(f"{prefix}pre_layrnorm", "pre_norm"),  # so it is spelt
        *block_table(prefix),
        *norm(f"{prefix}post_layernorm", "post_norm"),
        *linear("visual_projection", "projection", bias=False),
    ]


@dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """Sizes of a CLIP image encoder, named as in transformers' config.json: square RGB pictures in square patches."""

    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")

    @property
    def tokens(self) -> int:
        """Length of the sequence: the class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


class _Encoder(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        d, p = config.hidden_size, config.patch_size
        self.blocks = make_blocks(config, rngs)
        self.class_embedding = nnx.Param(normal(d**-0.5)(rngs.params(), (d,), jnp.float32))
        self.patch_embedding = nnx.Param(normal((3 * p * p) ** -0.5)(rngs.params(), (p, p, 3, d), jnp.float32))
        self.positions = nnx.Param(normal(d**-0.5)(rngs.params(), (config.tokens, d), jnp.float32))
        self.pre_norm = LayerNorm(d, eps=config.layer_norm_eps)
        self.post_norm = LayerNorm(d, eps=config.layer_norm_eps)
        self.projection = Linear(d, config.projection_dim, bias=False, init=normal(d**-0.5), rngs=rngs)

    def tokens(self, pixels, dtype):
        kernel = self.patch_embedding[...]
        x = patches(pixels, kernel.shape[0]).astype(dtype) @ kernel.reshape(-1, kernel.shape[-1]).astype(dtype)
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...].astype(dtype)
        return apply_blocks(self.blocks, self.pre_norm(x))

    def __call__(self, pixels, dtype):
        return self.projection(self.post_norm(self.tokens(pixels, dtype)[:, 0]))


def patches(pixels: jax.Array, size: int) -> jax.Array:
    """Patches row by row, each flattened as [y, x, channel]: [B, S, S, 3] -> [B, (S / size)^2, 3 size^2]."""
    b, side, _, channels = pixels.shape
    x = pixels.reshape(b, side // size, size, side // size, size, channels).swapaxes(2, 3)
    return x.reshape(b, (side // size) ** 2, -1)


@functools.cache
def _graphdef(config: CLIPVisionConfig) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Encoder(config, rngs=nnx.Rngs(0))))[0]


def init(config: CLIPVisionConfig, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch, normal with CLIP's own scales (residual branches by 1/sqrt(2 D N))."""
    return nnx.to_pure_dict(nnx.state(_Encoder(config, rngs=nnx.Rngs(key))))


def apply(config: CLIPVisionConfig, params: Params, pixels: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """One vector per picture: the class token after the last block and the final norm, projected.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      pixels: [B, image_size, image_size, 3], normalised.
      dtype: dtype of the matmuls; norm statistics are fp32 in any case.

    Returns:
      [B, projection_dim] in `dtype`, not normalised.

    Raises:
      ValueError: pixels of another shape.
    """
    _check(config, pixels)
    return nnx.merge(_graphdef(config), params)(pixels, dtype)


def features(config: CLIPVisionConfig, params: Params, pixels: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """A vector per patch, row by row, after the last block: [B, N, hidden_size] in `dtype`. Arguments as of `apply`."""
    _check(config, pixels)
    return nnx.merge(_graphdef(config), params).tokens(pixels, dtype)[:, 1:]


def _check(config: CLIPVisionConfig, pixels: jax.Array) -> None:
    if pixels.ndim != 4 or pixels.shape[1:] != (expected := (config.image_size, config.image_size, 3)):
        raise ValueError(
            f"pixels have shape {pixels.shape}, and the config expects [B, {', '.join(map(str, expected))}]"
        )
