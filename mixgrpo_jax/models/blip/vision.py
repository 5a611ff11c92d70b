"""BLIP's vision transformer: images to one feature for the class and one for each patch."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixgrpo_jax.models.clip.text import LayerNorm
from mixgrpo_jax.models.clip.vision import patches
from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.layers import Linear, normal

Params = dict[str, Any]

INIT = normal(0.02)
gelu = functools.partial(jax.nn.gelu, approximate=False)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision transformer, named as in transformers' BlipVisionConfig."""

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")

    @property
    def tokens(self) -> int:
        """Tokens of an image: its patches, and one for the class before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


def check_heads(hidden_size: int, num_attention_heads: int) -> None:
    """Raises ValueError unless the heads divide the width."""
    if hidden_size % num_attention_heads:
        raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads}")


def linear(d_in: int, d_out: int, *, rngs: nnx.Rngs) -> Linear:
    """A linear layer with BLIP's initialisation."""
    return Linear(d_in, d_out, init=INIT, rngs=rngs)


class _VisionBlock(nnx.Module):
    """Pre-norm, with one product for queries, keys and values."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        d, d_ff, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention_norm = LayerNorm(d, eps=eps)
        self.qkv = linear(d, 3 * d, rngs=rngs)
        self.attention_out = linear(d, d, rngs=rngs)
        self.mlp_norm = LayerNorm(d, eps=eps)
        self.mlp_in = linear(d, d_ff, rngs=rngs)
        self.mlp_out = linear(d_ff, d, rngs=rngs)
        self.heads = config.num_attention_heads

    def __call__(self, x):
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        x = x + self.attention_out(layers.attention(*jnp.moveaxis(qkv, 2, 0)))
        return x + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(x))))


class _Vision(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        d, patch = config.hidden_size, config.patch_size
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.patch_kernel = nnx.Param(INIT(rngs.params(), (patch, patch, 3, d), jnp.float32))
        self.patch_bias = nnx.Param(jnp.zeros(d, jnp.float32))
        self.class_token = nnx.Param(INIT(rngs.params(), (1, 1, d), jnp.float32))
        self.positions = nnx.Param(INIT(rngs.params(), (1, config.tokens, d), jnp.float32))
        self.blocks = jax.vmap(lambda key: _VisionBlock(config, rngs=nnx.Rngs(key)))(keys)
        self.final_norm = LayerNorm(d, eps=config.layer_norm_eps)

    def __call__(self, images):
        kernel, bias, first, positions = (
            parameter[...].astype(images.dtype)
            for parameter in (self.patch_kernel, self.patch_bias, self.class_token, self.positions)
        )
        x = patches(images, len(kernel)) @ kernel.reshape(-1, kernel.shape[-1]) + bias
        first = jnp.broadcast_to(first, (len(x), *first.shape[1:]))
        x = jnp.concatenate([first, x], axis=1) + positions
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        return self.final_norm(x)


@functools.cache
def _graphdef(config: VisionConfig) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Vision(config, rngs=nnx.Rngs(0))))[0]


def init(config: VisionConfig, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch, N(0, 0.02^2)."""
    return nnx.to_pure_dict(nnx.state(_Vision(config, rngs=nnx.Rngs(key))))


def apply(config: VisionConfig, params: Params, images: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Features of images, after the final norm.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      images: normalised, [B, image_size, image_size, 3].
      dtype: dtype of the matmuls; norm statistics are fp32 in any case.

    Returns:
      [B, tokens, D] in `dtype`, the class's first.

    Raises:
      ValueError: images of another size.
    """
    if images.shape[1:] != (config.image_size, config.image_size, 3):
        raise ValueError(f"images are {images.shape}: resize them to image_size={config.image_size}, [B, H, W, 3]")
    return nnx.merge(_graphdef(config), params)(jnp.asarray(images, dtype))
