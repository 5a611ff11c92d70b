"""FLUX.2: double- and single-stream blocks as FLUX.1's, with modulations that all blocks share, SwiGLU, and no biases.

Parameters are a plain nested dict of arrays; blocks of a kind are stacked along a leading axis and run by a scan.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.layers import ZEROS, Embedder, Linear, RMSNorm
from mixgrpo_jax.models.nn.products import gathered
from mixgrpo_jax.models.nn.streams import Heads, Stream, TwoStreams, chunks, mutual, scales, stack

Params = dict[str, Any]

AXES = 4  # of positions: time, row, column, and the place in the text


@dataclass(frozen=True)
class Flux2Config:
    """Sizes of a FLUX.2 transformer, named as in diffusers' config.json. The output has `in_channels` channels."""

    in_channels: int = 128
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    guidance_embeds: bool = True

    def __post_init__(self):
        axes = self.axes_dims_rope
        if len(axes) != AXES or sum(axes) != self.attention_head_dim or any(dim % 2 for dim in axes):
            raise ValueError(
                f"axes_dims_rope={axes} must be {AXES} even numbers that add up to "
                f"attention_head_dim={self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Channels inside an MLP."""
        return int(self.width * self.mlp_ratio)


def flux2_dev() -> Flux2Config:
    """FLUX.2 [dev]: 32.2 B parameters, guidance-distilled."""
    return Flux2Config()


def flux2_klein_4b() -> Flux2Config:
    """FLUX.2 [klein] 4B, base or distilled: 3.88 B parameters."""
    return Flux2Config(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )


def flux2_klein_9b() -> Flux2Config:
    """FLUX.2 [klein] 9B, base or distilled: 9.08 B parameters."""
    return Flux2Config(
        num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
    )


def flux2_small(**overrides) -> Flux2Config:
    """A width-128 model of klein's architecture, for tests and for training from scratch on small pictures."""
    sizes: dict[str, Any] = dict(
        in_channels=96,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=192,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    return Flux2Config(**(sizes | overrides))


class _Stream(Stream):
    """A modality's weights of a double block. Its modulation is not its own, and its MLP is gated."""

    activation = staticmethod(layers.swiglu)

    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs):
        width = config.width
        self.attention = Heads(width, config.num_attention_heads, bias=False, rngs=rngs)
        self.attention_out = Linear(width, width, bias=False, rngs=rngs)
        self.mlp_in = Linear(width, 2 * config.hidden, bias=False, rngs=rngs)
        self.mlp_out = Linear(config.hidden, width, bias=False, rngs=rngs)


class _DoubleBlock(nnx.Module):
    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs):
        self.text = _Stream(config, rngs=rngs)
        self.image = _Stream(config, rngs=rngs)

    def __call__(self, text, image, modulations, turns, attend, tokens_last):
        return mutual((self.text, self.image), (text, image), modulations, turns, attend, tokens_last)


class _WideHeads(Heads):
    """Queries, keys and values of a single block, and what its MLP is made of, by one product."""

    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs):
        self.qkv_mlp = Linear(config.width, 3 * config.width + 2 * config.hidden, bias=False, rngs=rngs)
        self.q_norm, self.k_norm = (RMSNorm(config.attention_head_dim) for _ in range(2))
        self.heads = config.num_attention_heads
        self.width = config.width

    def __call__(self, x, turns, tokens_last):
        *qkv, mlp = jnp.split(self.qkv_mlp(x), [n * self.width for n in (1, 2, 3)], axis=-1)
        q, k, v = (each.reshape(*x.shape[:2], self.heads, -1) for each in qkv)
        if tokens_last:
            q, k, v = (jnp.moveaxis(each, 1, 3) for each in (q, k, v))
        return (*self.turned(q, k, turns, tokens_last), v), mlp


class _SingleBlock(nnx.Module):
    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs):
        self.attention = _WideHeads(config, rngs=rngs)
        self.out = Linear(config.width + config.hidden, config.width, bias=False, rngs=rngs)

    def __call__(self, x, modulation, turns, attend, tokens_last):
        shift, scale, gate = modulation
        heads, mlp = self.attention(layers.modulate(x, shift, scale), turns, tokens_last)
        return x + gate * self.out.joined(attend(*heads), layers.swiglu(mlp))


class _Flux2(TwoStreams):
    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs):
        width, channels = config.width, config.timestep_guidance_channels

        def linear(d_in: int, d_out: int, **options) -> Linear:
            return Linear(d_in, d_out, bias=False, rngs=rngs, **options)

        self.image_in = linear(config.in_channels, width)
        self.text_in = linear(config.joint_attention_dim, width)
        self.time_in = Embedder(channels, width, bias=False, rngs=rngs)
        self.guidance_in = Embedder(channels, width, bias=False, rngs=rngs) if config.guidance_embeds else None
        self.image_modulation = linear(width, 6 * width, init=ZEROS)
        self.text_modulation = linear(width, 6 * width, init=ZEROS)
        self.single_modulation = linear(width, 3 * width, init=ZEROS)
        self.double_blocks = stack(functools.partial(_DoubleBlock, config), config.num_layers, rngs)
        self.single_blocks = stack(functools.partial(_SingleBlock, config), config.num_single_layers, rngs)
        self.final_modulation = linear(width, 2 * width, init=ZEROS)
        self.final_out = linear(width, config.in_channels, init=ZEROS)
        self.axes_dims, self.theta, self.channels = config.axes_dims_rope, config.rope_theta, channels

    def condition(self, timestep, guidance, dtype):
        """silu of the summed time and guidance embeddings: [B, D]."""
        total = self.time_in(layers.sinusoid(1000 * timestep, self.channels).astype(dtype))
        if self.guidance_in is not None:
            total = total + self.guidance_in(layers.sinusoid(1000 * guidance, self.channels).astype(dtype))
        return jax.nn.silu(total)

    def __call__(self, x, text, condition, ids, remat, backend, reduce_dtype):
        linears = (self.text_modulation, self.image_modulation, self.single_modulation)
        shared = gathered([{"modulation": linear} for linear in linears], x.dtype, reduce_dtype)
        *double, single = (chunks(each["modulation"](condition), n) for each, n in zip(shared, (6, 6, 3)))
        tokens = self.tokens(x, text, (double, single), ids, remat, backend, reduce_dtype)
        scale, shift = chunks(self.final_modulation(condition), 2)
        return self.final_out(layers.modulate(tokens, shift, scale))


@functools.cache
def _graphdef(config: Flux2Config) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Flux2(config, rngs=nnx.Rngs(0))))[0]


def init(config: Flux2Config, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch.

    Modulations and the output projection are zero, so that every block starts as the identity and the model as v = 0;
    other kernels are LeCun normal.
    """
    return nnx.to_pure_dict(nnx.state(_Flux2(config, rngs=nnx.Rngs(key))))


def apply(
    config: Flux2Config,
    params: Params,
    x: jax.Array,
    timestep: jax.Array | float,
    text: jax.Array,
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
      guidance: distilled guidance scale, scalar or [B]; None for a model without guidance embedding.
      image_ids: positions [S, 4]: time, row, column, and 0.
      text_ids: positions [L, 4]; (0, 0, 0, l) of token l by default.
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
        text_ids = jnp.pad(jnp.arange(text.shape[1])[:, None], ((0, 0), (AXES - 1, 0)))
    ids = jnp.concatenate([text_ids, image_ids]).astype(jnp.float32)
    condition = model.condition(timestep, guidance, dtype)
    v = model(x.astype(dtype), text.astype(dtype), condition, ids, remat, attention, reduce_dtype)
    return v.astype(jnp.float32)


def flops(config: Flux2Config, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one sample's forward pass: 2 per multiply-add of matmuls and attention."""
    d, tokens = config.width, image_tokens + text_tokens
    block = tokens * (4 * d + 3 * config.hidden) * d + 2 * tokens * tokens * d
    embed = (1 + config.guidance_embeds) * (config.timestep_guidance_channels + d) * d + (6 + 6 + 3 + 2) * d * d
    ends = 2 * image_tokens * config.in_channels * d + text_tokens * config.joint_attention_dim * d
    return 2.0 * ((config.num_layers + config.num_single_layers) * block + embed + ends)
