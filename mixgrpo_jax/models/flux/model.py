"""FLUX.1: a rectified-flow transformer of double-stream blocks (text and image weights apart) and single-stream ones.

Parameters are a plain nested dict of arrays; blocks of a kind are stacked along a leading axis and run by a scan.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.layers import ZEROS, Embedder, Linear
from mixgrpo_jax.models.nn.streams import MLP_RATIO, Heads, Stream, TwoStreams, chunks, mutual, scales, stack

Params = dict[str, Any]

TIME_CHANNELS = 256


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer, named as in diffusers' config.json. The output has `in_channels` channels."""

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope={self.axes_dims_rope} must be even numbers that add up to "
                f"attention_head_dim={self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim


def flux1_dev() -> FluxConfig:
    """FLUX.1 [dev]: 11.9 B parameters, guidance-distilled."""
    return FluxConfig(guidance_embeds=True)


def flux1_schnell() -> FluxConfig:
    """FLUX.1 [schnell]: FLUX.1 [dev] without the guidance embedding."""
    return FluxConfig()


def flux_small(**overrides) -> FluxConfig:
    """A width-128 model of the same architecture, for tests and for training from scratch on small images."""
    sizes: dict[str, Any] = dict(
        in_channels=96,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxConfig(**(sizes | overrides))


class _DoubleBlock(nnx.Module):
    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.text = Stream(config.width, config.num_attention_heads, rngs=rngs)
        self.image = Stream(config.width, config.num_attention_heads, rngs=rngs)

    def __call__(self, text, image, condition, turns, attend, tokens_last):
        streams = (self.text, self.image)
        modulations = [chunks(stream.modulation(condition), stream.chunks) for stream in streams]
        return mutual(streams, (text, image), modulations, turns, attend, tokens_last)


class _SingleBlock(nnx.Module):
    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.modulation = Linear(width, 3 * width, init=ZEROS, rngs=rngs)
        self.attention = Heads(width, config.num_attention_heads, rngs=rngs)
        self.mlp_in = Linear(width, MLP_RATIO * width, rngs=rngs)
        self.out = Linear((1 + MLP_RATIO) * width, width, rngs=rngs)

    def __call__(self, x, condition, turns, attend, tokens_last):
        shift, scale, gate = chunks(self.modulation(condition), 3)
        h = layers.modulate(x, shift, scale)
        y = attend(*self.attention(h, turns, tokens_last))
        return x + gate * self.out.joined(y, layers.gelu(self.mlp_in(h)))


class _Flux(TwoStreams):
    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.image_in = Linear(config.in_channels, width, rngs=rngs)
        self.text_in = Linear(config.joint_attention_dim, width, rngs=rngs)
        self.time_in = Embedder(TIME_CHANNELS, width, rngs=rngs)
        self.guidance_in = Embedder(TIME_CHANNELS, width, rngs=rngs) if config.guidance_embeds else None
        self.pooled_in = Embedder(config.pooled_projection_dim, width, rngs=rngs)
        self.double_blocks = stack(functools.partial(_DoubleBlock, config), config.num_layers, rngs)
        self.single_blocks = stack(functools.partial(_SingleBlock, config), config.num_single_layers, rngs)
        self.final_modulation = Linear(width, 2 * width, init=ZEROS, rngs=rngs)
        self.final_out = Linear(width, config.in_channels, init=ZEROS, rngs=rngs)
        self.axes_dims = config.axes_dims_rope

    def condition(self, timestep, pooled, guidance):
        """silu of the summed time, guidance and pooled-text embeddings: [B, D]."""
        total = self.pooled_in(pooled) + self.time_in(layers.sinusoid(1000 * timestep).astype(pooled.dtype))
        if self.guidance_in is not None:
            total = total + self.guidance_in(layers.sinusoid(1000 * guidance).astype(pooled.dtype))
        return jax.nn.silu(total)

    def __call__(self, x, text, condition, ids, remat, backend, reduce_dtype):
        tokens = self.tokens(x, text, (condition, condition), ids, remat, backend, reduce_dtype)
        scale, shift = chunks(self.final_modulation(condition), 2)
        return self.final_out(layers.modulate(tokens, shift, scale))


@functools.cache
def _graphdef(config: FluxConfig) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Flux(config, rngs=nnx.Rngs(0))))[0]


def init(config: FluxConfig, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch.

    Modulations and the output projection are zero, so that every block starts as the identity and the model as v = 0;
    other kernels are LeCun normal.
    """
    return nnx.to_pure_dict(nnx.state(_Flux(config, rngs=nnx.Rngs(key))))


def apply(
    config: FluxConfig,
    params: Params,
    x: jax.Array,
    timestep: jax.Array | float,
    text: jax.Array,
    pooled: jax.Array,
    guidance: jax.Array | float | None,
    image_ids: jax.Array,
    text_ids: jax.Array | None = None,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: str = "none",
    attention: layers.Backend = "xla",
    reduce_dtype: jnp.dtype | None = jnp.float32,
) -> jax.Array:
    """Velocity v(x, sigma, text) of packed latents.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      x: packed latents [B, S, in_channels].
      timestep: sigma in [0, 1], scalar or [B].
      text: token features [B, L, joint_attention_dim]; padding tokens are attended, as in the released models.
      pooled: pooled text features [B, pooled_projection_dim].
      guidance: distilled guidance scale, scalar or [B]; None for a model without guidance embedding.
      image_ids: positions [S, 3], see `image_ids`.
      text_ids: positions [L, 3]; zeros by default.
      dtype: dtype of the matmuls; parameters are cast on use. Time embedding, rotary angles and norm statistics
        are fp32 in any case.
      remat: what the backward pass of a block finds stored, see `remat.rematerialise`.
      attention: back end, see `attention.attention`.
      reduce_dtype: in which gradients of kernels are summed over devices; None where there are none.

    Returns:
      v [B, S, in_channels] in fp32.

    Raises:
      ValueError: `guidance` does not fit config.guidance_embeds, or `remat` or `attention` is unknown.
    """
    timestep, guidance = scales(timestep, guidance, len(x), config.guidance_embeds)
    model = nnx.merge(_graphdef(config), params)
    if text_ids is None:
        text_ids = jnp.zeros((text.shape[1], 3))
    ids = jnp.concatenate([text_ids, image_ids]).astype(jnp.float32)
    condition = model.condition(timestep, pooled.astype(dtype), guidance)
    return model(x.astype(dtype), text.astype(dtype), condition, ids, remat, attention, reduce_dtype).astype(
        jnp.float32
    )


def flops(config: FluxConfig, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one sample's forward pass: 2 per multiply-add of matmuls and attention."""
    d, tokens = config.width, image_tokens + text_tokens
    per_token = (4 + 2 * MLP_RATIO) * d * d
    attend = 2 * tokens * tokens * d
    double = tokens * per_token + attend + 2 * 6 * d * d
    single = tokens * per_token + attend + 3 * d * d
    embed = (1 + config.guidance_embeds) * (TIME_CHANNELS + d) * d + (config.pooled_projection_dim + d) * d
    ends = 2 * image_tokens * config.in_channels * d + text_tokens * config.joint_attention_dim * d + 2 * d * d
    return 2.0 * (config.num_layers * double + config.num_single_layers * single + embed + ends)
