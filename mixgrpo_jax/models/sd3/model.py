"""Stable Diffusion 3 and 3.5: a rectified-flow transformer whose text and image streams attend to each other.

Positions are a table that the tokens' embedding adds, cropped at its centre to the picture's grid; nothing is rotated.
In dual blocks, the first ones of 3.5 Medium, the image attends to itself once more. The last block reads the text and
leaves it. Parameters are a plain nested dict; blocks of a kind are stacked along a leading axis and run by a scan.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.layers import LECUN, ZEROS, Embedder, Linear
from mixgrpo_jax.models.nn.placement import spread
from mixgrpo_jax.models.nn.products import gathered
from mixgrpo_jax.models.nn.remat import rematerialise
from mixgrpo_jax.models.nn.streams import MLP_RATIO, Heads, Stream, chunks, jointly, stack

Params = dict[str, Any]

TIME_CHANNELS = 256
QK_NORMS = (None, "rms_norm")


@dataclass(frozen=True)
class SD3Config:
    """Sizes of a Stable Diffusion 3 transformer, named as in diffusers' config.json.

    A token has patch_size^2 in_channels channels. The first len(dual_attention_layers) blocks are dual.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self):
        dual = self.dual_attention_layers
        if dual != tuple(range(len(dual))) or len(dual) >= self.num_layers:
            raise ValueError(f"dual_attention_layers={dual} must be the first ones, and not all {self.num_layers}")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm={self.qk_norm!r} is unknown: choose one of {QK_NORMS}")
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim={self.caption_projection_dim} must be num_attention_heads x "
                f"attention_head_dim={self.width}"
            )
        if self.width % 4:
            raise ValueError(f"num_attention_heads x attention_head_dim={self.width} must be a multiple of 4")

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return self.patch_size**2 * self.in_channels


def sd3_medium() -> SD3Config:
    """Stable Diffusion 3 Medium: 2.08 B parameters, 0.06 B of them its positions."""
    return SD3Config(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)


def sd35_medium() -> SD3Config:
    """Stable Diffusion 3.5 Medium: 2.47 B parameters, 0.23 B of them its positions."""
    return SD3Config(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def sd35_large() -> SD3Config:
    """Stable Diffusion 3.5 Large: 8.15 B parameters."""
    return SD3Config(
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )


def sd3_small(**overrides) -> SD3Config:
    """A width-128 model of 3.5 Medium's architecture, for tests and for training from scratch on small pictures."""
    sizes: dict[str, Any] = dict(
        sample_size=16,
        in_channels=24,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        out_channels=24,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return SD3Config(**(sizes | overrides))


def _stream(kind: Any, config: SD3Config, rngs: nnx.Rngs) -> Any:
    return kind(config.width, config.num_attention_heads, norm=config.qk_norm is not None, rngs=rngs)


class _SelfAttention(nnx.Module):
    """The image's own attention in a dual block."""

    def __init__(self, width: int, heads: int, *, norm: bool, rngs: nnx.Rngs):
        self.attention = Heads(width, heads, norm=norm, rngs=rngs)
        self.attention_out = Linear(width, width, rngs=rngs)


class _DualStream(Stream):
    """The image's weights of a dual block: after the joint attention it has one of its own, of the same input."""

    chunks = 9

    def __init__(self, width: int, heads: int, *, norm: bool, rngs: nnx.Rngs):
        super().__init__(width, heads, norm=norm, rngs=rngs)
        self.own = _SelfAttention(width, heads, norm=norm, rngs=rngs)


class _ReadStream(nnx.Module):
    """The text's weights of the last block, which attends to it and leaves it; here the modulation is scale, shift."""

    chunks = 2

    def __init__(self, width: int, heads: int, *, norm: bool, rngs: nnx.Rngs):
        self.modulation = Linear(width, self.chunks * width, init=ZEROS, rngs=rngs)
        self.attention = Heads(width, heads, norm=norm, rngs=rngs)


class _Block(nnx.Module):
    text_kind: Any = Stream
    image_kind: Any = Stream

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.text = _stream(self.text_kind, config, rngs)
        self.image = _stream(self.image_kind, config, rngs)

    def __call__(self, text, image, condition, attend, tokens_last):
        """`attend` is of all tokens, and of the image's alone."""
        streams, (attend_all, attend_own) = (self.text, self.image), attend
        of_text, of_image = (chunks(stream.modulation(condition), stream.chunks) for stream in streams)
        last = isinstance(self.text, _ReadStream)
        shift, scale = of_text[::-1] if last else of_text[:2]
        heads = [
            self.text.attention(layers.modulate(text, shift, scale), None, tokens_last),
            self.image.attention(layers.modulate(image, *of_image[:2]), None, tokens_last),
        ]
        y_text, y_image = jointly(attend_all, heads, [text.shape[1], image.shape[1]], tokens_last)
        if isinstance(self.image, _DualStream):
            *_, shift, scale, gate = of_image
            y = attend_own(*self.image.own.attention(layers.modulate(image, shift, scale), None, tokens_last))
            image = image + gate * self.image.own.attention_out(y)
        image = self.image.finish(image, y_image, of_image)
        return (text if last else self.text.finish(text, y_text, of_text)), image


class _DualBlock(_Block):
    image_kind = _DualStream


class _LastBlock(_Block):
    text_kind = _ReadStream


class _SD3(nnx.Module):
    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        width, patch = config.width, config.patch_size
        shape = (config.in_channels, patch, patch, width)
        kernel = LECUN(rngs.params(), (config.channels, width), jnp.float32)
        self.patch_embedding = nnx.Param(kernel.reshape(shape))
        self.patch_bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.position_table = nnx.Param(sinusoids(config.pos_embed_max_size, config.sample_size // patch, width)[None])
        self.text_in = Linear(config.joint_attention_dim, width, rngs=rngs)
        self.time_in = Embedder(TIME_CHANNELS, width, rngs=rngs)
        self.pooled_in = Embedder(config.pooled_projection_dim, width, rngs=rngs)
        dual = len(config.dual_attention_layers)
        kinds = ((_DualBlock, dual), (_Block, config.num_layers - dual - 1), (_LastBlock, 1))
        # Without blocks of a kind there are no arrays of length 0, which checkpoints would not take.
        stacks = (stack(functools.partial(kind, config), n, rngs) if n else None for kind, n in kinds)
        self.dual_blocks, self.joint_blocks, self.last_blocks = stacks
        self.final_modulation = Linear(width, 2 * width, init=ZEROS, rngs=rngs)
        self.final_out = Linear(width, patch**2 * config.out_channels, init=ZEROS, rngs=rngs)

    def embed(self, x, grid):
        """Tokens [B, S, C], embedded, with the positions of a grid (rows, columns) at the table's centre."""
        kernel, table = self.patch_embedding[...], jax.lax.stop_gradient(self.position_table[...])
        side = round(table.shape[1] ** 0.5)
        top, left = ((side - size) // 2 for size in grid)
        positions = table.reshape(side, side, -1)[top : top + grid[0], left : left + grid[1]]
        x = x @ kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype) + self.patch_bias[...].astype(x.dtype)
        return x + positions.reshape(-1, positions.shape[-1]).astype(x.dtype)

    def condition(self, timestep, pooled):
        """silu of the summed time and pooled-text embeddings: [B, D]."""
        time = self.time_in(layers.sinusoid(1000 * timestep).astype(pooled.dtype))
        return jax.nn.silu(self.pooled_in(pooled) + time)

    def __call__(self, x, text, condition, grid, remat, backend, reduce_dtype):
        (split, tokens), dtype = (text.shape[1], x.shape[1]), x.dtype
        length = split + tokens
        total, tokens_last = layers.form(length, dtype, backend)
        attention = functools.partial(layers.attention, tokens_last=tokens_last, backend=backend)
        padded = total > length  # behind all tokens, where attention leaves it out
        attend = tuple(functools.partial(attention, length=n if padded else None) for n in (length, tokens))

        def body(streams, block):
            with jax.named_scope("block"):
                block = gathered(block, dtype, reduce_dtype)
                return spread(block(*streams, condition, attend, tokens_last)), None

        image = jnp.pad(self.embed(x, grid), ((0, 0), (0, total - length), (0, 0)))
        streams = spread((self.text_in(spread(text)), spread(image)))
        for blocks in filter(None, (self.dual_blocks, self.joint_blocks, self.last_blocks)):
            streams, _ = jax.lax.scan(rematerialise(body, remat), streams, blocks)
        scale, shift = chunks(self.final_modulation(condition), 2)
        return self.final_out(layers.modulate(streams[1][:, :tokens], shift, scale))


def sinusoids(side: int, base: int, width: int) -> np.ndarray:
    """Positions of a square grid of tokens, as fresh models have them: [side^2, width], fp32.

    A quarter of the channels each are sines and cosines of the column, then of the row, on the scale on which `base`
    tokens, those of a picture of the size in training, fill the grid.
    """
    frequencies = 1e4 ** -(np.arange(width // 4) / (width // 4))
    angles = (np.arange(side) / np.float32(side / base))[:, None] * frequencies
    each = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
    both = np.broadcast_arrays(each[None], each[:, None])
    return np.concatenate(both, axis=-1).reshape(side * side, width)


@functools.cache
def _graphdef(config: SD3Config) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _SD3(config, rngs=nnx.Rngs(0))))[0]


def init(config: SD3Config, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch.

    Modulations and the output projection are zero, so that every block starts as the identity and the model as v = 0;
    other kernels are LeCun normal, and positions sinusoids.
    """
    return nnx.to_pure_dict(nnx.state(_SD3(config, rngs=nnx.Rngs(key))))


def apply(
    config: SD3Config,
    params: Params,
    x: jax.Array,
    timestep: jax.Array | float,
    text: jax.Array,
    pooled: jax.Array,
    grid: tuple[int, int],
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: str = "none",
    attention: layers.Backend = "xla",
    reduce_dtype: jnp.dtype | None = jnp.float32,
) -> jax.Array:
    """Velocity v(x, sigma, text) of packed latents.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype. The table of positions has no gradient.
      x: packed latents [B, S, channels], see `patches.pack`.
      timestep: sigma in [0, 1], scalar or [B].
      text: token features [B, L, joint_attention_dim]; padding tokens are attended, as in the released models.
      pooled: pooled text features [B, pooled_projection_dim].
      grid: rows and columns of the tokens, S in all.
      dtype: dtype of the matmuls; parameters are cast on use. Time embedding and norm statistics are fp32 in any case.
      remat: what the backward pass of a block finds stored, see `remat.rematerialise`.
      attention: back end, see `attention.attention`.
      reduce_dtype: in which gradients of kernels are summed over devices; None where there are none.

    Returns:
      v [B, S, channels] in fp32.

    Raises:
      ValueError: the grid is larger than the table of positions, or `remat` or `attention` is unknown.
    """
    if max(grid) > config.pos_embed_max_size:
        raise ValueError(
            f"a picture of {grid[0]} x {grid[1]} tokens is larger than pos_embed_max_size={config.pos_embed_max_size}: "
            "choose a smaller model.image_size"
        )
    model = nnx.merge(_graphdef(config), params)
    timestep = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), x.shape[:1])
    condition = model.condition(timestep, pooled.astype(dtype))
    v = model(x.astype(dtype), text.astype(dtype), condition, grid, remat, attention, reduce_dtype)
    # The released models' channels are (dy, dx, c), and ours, as those of their input, (c, dy, dx).
    v = v.reshape(*v.shape[:2], -1, config.out_channels).swapaxes(-1, -2)
    return v.reshape(x.shape).astype(jnp.float32)


def flops(config: SD3Config, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one sample's forward pass: 2 per multiply-add of matmuls and attention."""
    d, tokens, dual = config.width, image_tokens + text_tokens, len(config.dual_attention_layers)
    per_token = (4 + 2 * MLP_RATIO) * d * d
    block = tokens * per_token + 2 * tokens * tokens * d + 2 * 6 * d * d
    own = image_tokens * 4 * d * d + 2 * image_tokens * image_tokens * d + 3 * d * d
    left_out = text_tokens * (per_token - 3 * d * d) + 4 * d * d  # by the last block
    embed = (TIME_CHANNELS + d) * d + (config.pooled_projection_dim + d) * d
    ends = 2 * image_tokens * config.channels * d + text_tokens * config.joint_attention_dim * d + 2 * d * d
    return 2.0 * (config.num_layers * block + dual * own - left_out + embed + ends)
