"""AutoencoderKL, the convolutional autoencoder of latent diffusion: images to latents of a smaller side, and back.

Arrays are [B, H, W, C]. Modules carry the names of diffusers' AutoencoderKL, so that the path of a parameter is that of
its tensor. AutoencoderKLFlux2 has the same modules, and statistics of its latents beside them.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.layers import LECUN, Linear

Params = dict[str, Any]

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an AutoencoderKL, named as in diffusers' config.json, whose defaults for absent fields these are.

    With a `batch_norm_eps` they are of an AutoencoderKLFlux2, whose decoder has widths of its own unless there are
    none, and whose latents have running statistics in the place of a scale: see `flux2_vae` and `standardise`.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    decoder_block_out_channels: tuple[int, ...] = ()
    batch_norm_eps: float | None = None

    def __post_init__(self):
        for field in ("block_out_channels", "decoder_block_out_channels"):
            if any(width % self.norm_num_groups for width in getattr(self, field)):
                raise ValueError(
                    f"{field}={getattr(self, field)} must be multiples of norm_num_groups={self.norm_num_groups}"
                )

    @property
    def downsampling(self) -> int:
        """Pixels along a side of a latent: each stage but the last halves the resolution."""
        return 2 ** (len(self.block_out_channels) - 1)


def vae_tiny(**overrides) -> VAEConfig:
    """16 latent channels at an eighth of the side, with 8 to 16 channels a stage, for tests."""
    sizes: dict[str, Any] = dict(
        block_out_channels=(8, 8, 16, 16),
        latent_channels=16,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return VAEConfig(**(sizes | overrides))


def vae_16(scaling_factor: float, shift_factor: float) -> VAEConfig:
    """An autoencoder of 16 latent channels, as FLUX.1 and Stable Diffusion 3 have it: 83.8 M parameters."""
    return VAEConfig(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux2_vae() -> VAEConfig:
    """The autoencoder of FLUX.2: 84.0 M parameters, 32 latent channels; the defaults of AutoencoderKLFlux2."""
    return VAEConfig(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=32,
        sample_size=1024,
        scaling_factor=1.0,
        batch_norm_eps=1e-4,
    )


class _Sequence(nnx.Module):
    """Modules run one after another, under the names "0", "1", and so on; the identity when there is none."""

    def __init__(self, modules: Iterable[nnx.Module]):
        self.length = 0
        for module in modules:
            setattr(self, str(self.length), module)
            self.length += 1

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, str(i)) for i in range(self.length))

    def __call__(self, x):
        for module in self:
            x = module(x)
        return x


class _Conv(nnx.Module):
    """Convolution with `kernel` [size, size, c_in, c_out]; a side of n becomes n / stride."""

    def __init__(self, c_in: int, c_out: int, *, size: int = 3, stride: int = 1, rngs: nnx.Rngs):
        self.kernel = nnx.Param(LECUN(rngs.params(), (size, size, c_in, c_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(c_out, jnp.float32))
        self.stride = stride

    def __call__(self, x):
        # On an even side, SAME with a stride of 2 pads the end alone, as the released models do.
        kernel, numbers = self.kernel[...].astype(x.dtype), ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 2, "SAME", dimension_numbers=numbers)
        return y + self.bias[...].astype(x.dtype)


class _GroupNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias, mean and var over space and a group of channels, in fp32."""

    def __init__(self, width: int, groups: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.groups = groups

    def __call__(self, x):
        centred = x.astype(jnp.float32)
        centred = centred - self._mean(centred)
        y = centred * jax.lax.rsqrt(self._mean(centred * centred) + EPS)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def _mean(self, x):
        # Space first: splitting the channel axis of a whole activation would change its layout on a TPU.
        by_channel = jnp.mean(x, axis=(1, 2))
        by_group = jnp.mean(by_channel.reshape(len(x), self.groups, -1), axis=-1)
        return jnp.repeat(by_group, x.shape[-1] // self.groups, axis=-1)[:, None, None]


class _Resnet(nnx.Module):
    def __init__(self, c_in: int, c_out: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = _GroupNorm(c_in, groups)
        self.conv1 = _Conv(c_in, c_out, rngs=rngs)
        self.norm2 = _GroupNorm(c_out, groups)
        self.conv2 = _Conv(c_out, c_out, rngs=rngs)
        self.conv_shortcut = _Conv(c_in, c_out, size=1, rngs=rngs) if c_in != c_out else None

    def __call__(self, x):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nnx.Module):
    """Self-attention of one head over all positions, added to its input."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = _GroupNorm(width, groups)
        self.to_q = Linear(width, width, rngs=rngs)
        self.to_k = Linear(width, width, rngs=rngs)
        self.to_v = Linear(width, width, rngs=rngs)
        self.to_out = _Sequence([Linear(width, width, rngs=rngs)])

    def __call__(self, x):
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, 1, c)
        y = layers.attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out(y).reshape(x.shape)


class _MidBlock(nnx.Module):
    def __init__(self, width: int, config: VAEConfig, *, rngs: nnx.Rngs):
        groups = config.norm_num_groups
        self.resnets = _resnets(width, width, 2, groups, rngs)
        self.attentions = _Sequence([_Attention(width, groups, rngs=rngs)] if config.mid_block_add_attention else [])

    def __call__(self, x):
        before, after = self.resnets
        return after(self.attentions(before(x)))


class _Downsample(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = _Conv(width, width, stride=2, rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


class _Upsample(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = _Conv(width, width, rngs=rngs)

    def __call__(self, x):
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class _DownBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, config: VAEConfig, *, last: bool, rngs: nnx.Rngs):
        self.resnets = _resnets(c_in, c_out, config.layers_per_block, config.norm_num_groups, rngs)
        self.downsamplers = _Sequence([] if last else [_Downsample(c_out, rngs=rngs)])

    def __call__(self, x):
        return self.downsamplers(self.resnets(x))


class _UpBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, config: VAEConfig, *, last: bool, rngs: nnx.Rngs):
        self.resnets = _resnets(c_in, c_out, config.layers_per_block + 1, config.norm_num_groups, rngs)
        self.upsamplers = _Sequence([] if last else [_Upsample(c_out, rngs=rngs)])

    def __call__(self, x):
        return self.upsamplers(self.resnets(x))


class _Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = _Conv(config.in_channels, widths[0], rngs=rngs)
        self.down_blocks = _stages(_DownBlock, widths, config, rngs)
        self.mid_block = _MidBlock(widths[-1], config, rngs=rngs)
        self.conv_norm_out = _GroupNorm(widths[-1], config.norm_num_groups)
        self.conv_out = _Conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x):
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class _Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.decoder_block_out_channels or config.block_out_channels
        self.conv_in = _Conv(config.latent_channels, widths[-1], rngs=rngs)
        self.mid_block = _MidBlock(widths[-1], config, rngs=rngs)
        self.up_blocks = _stages(_UpBlock, widths[::-1], config, rngs)
        self.conv_norm_out = _GroupNorm(widths[0], config.norm_num_groups)
        self.conv_out = _Conv(widths[0], config.out_channels, rngs=rngs)

    def __call__(self, x):
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class _Statistics(nnx.Module):
    """Mean and variance of 2 x 2 patches of latents, as they were in training."""

    def __init__(self, channels: int):
        self.running_mean = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.running_var = nnx.Param(jnp.ones(channels, jnp.float32))


class _Autoencoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.encoder = _Encoder(config, rngs=rngs)
        self.decoder = _Decoder(config, rngs=rngs)
        self.quant_conv = _Conv(moments, moments, size=1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = _Conv(latents, latents, size=1, rngs=rngs) if config.use_post_quant_conv else None
        self.bn = None if config.batch_norm_eps is None else _Statistics(4 * latents)

    def encode(self, x):
        """Images to moments, mean and log-variance along the channels."""
        moments = self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z):
        """Latents in the autoencoder's own scale to images."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


def _resnets(c_in: int, c_out: int, count: int, groups: int, rngs: nnx.Rngs) -> _Sequence:
    widths = [c_in] + count * [c_out]
    return _Sequence([_Resnet(*pair, groups, rngs=rngs) for pair in itertools.pairwise(widths)])


def _stages(block, widths: tuple[int, ...], config: VAEConfig, rngs: nnx.Rngs) -> _Sequence:
    pairs = list(itertools.pairwise(widths[:1] + widths))
    return _Sequence([block(*pair, config, last=i == len(pairs) - 1, rngs=rngs) for i, pair in enumerate(pairs)])


@functools.cache
def _graphdef(config: VAEConfig) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Autoencoder(config, rngs=nnx.Rngs(0))))[0]


def init(config: VAEConfig, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch: kernels LeCun normal, biases zero."""
    return nnx.to_pure_dict(nnx.state(_Autoencoder(config, rngs=nnx.Rngs(key))))


def encode(
    config: VAEConfig, params: Params, images: jax.Array, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Moments of the posterior N(mean, exp(logvar)) of the autoencoder's latent z.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      images: [B, H, W, in_channels] in [-1, 1]; f below is `config.downsampling`, 8 in the released models.
      dtype: dtype of convolutions and matmuls; norm statistics are fp32 in any case.

    Returns:
      mean and logvar, clipped to [-30, 20], each [B, H/f, W/f, latent_channels] in fp32 and in the autoencoder's own
      scale; `to_latents` maps the mean to the transformer's.

    Raises:
      ValueError: H or W is no multiple of f, or the number of channels is not `in_channels`.
    """
    check_channels("images", images, "in_channels", config.in_channels)
    h, w = images.shape[1:3]
    if h % config.downsampling or w % config.downsampling:
        raise ValueError(f"images are {h} x {w}: resize or crop both sides to multiples of {config.downsampling}")
    moments = nnx.merge(_graphdef(config), params).encode(images.astype(dtype)).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30, 20)


def to_latents(config: VAEConfig, z: jax.Array) -> jax.Array:
    """x = (z - shift_factor) scaling_factor: from the autoencoder's scale to the unit scale of the transformer."""
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


def standardise(config: VAEConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(var + batch_norm_eps) by the running statistics of packed latents [B, S, 4 C], in fp32.

    Of an autoencoder without statistics, x.
    """
    if config.batch_norm_eps is None:
        return tokens
    mean, std = _statistics(config, params)
    return (tokens.astype(jnp.float32) - mean) / std


def restore(config: VAEConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Inverse of `standardise`."""
    if config.batch_norm_eps is None:
        return tokens
    mean, std = _statistics(config, params)
    return tokens.astype(jnp.float32) * std + mean


def _statistics(config: VAEConfig, params: Params) -> tuple[jax.Array, jax.Array]:
    mean, variance = (params["bn"][name].astype(jnp.float32) for name in ("running_mean", "running_var"))
    return mean, jnp.sqrt(variance + config.batch_norm_eps)


def decode(config: VAEConfig, params: Params, latents: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Images of latents x in the transformer's scale: the decoder at z = x / scaling_factor + shift_factor.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      latents: [B, h, w, latent_channels].
      dtype: dtype of convolutions and matmuls; norm statistics are fp32 in any case.

    Returns:
      Images [B, f h, f w, out_channels] in fp32 with f = `config.downsampling`, nominally in [-1, 1] but not clipped.

    Raises:
      ValueError: the number of channels is not `latent_channels`.
    """
    check_channels("latents", latents, "latent_channels", config.latent_channels)
    z = latents.astype(jnp.float32) / config.scaling_factor + (config.shift_factor or 0.0)
    return nnx.merge(_graphdef(config), params).decode(z.astype(dtype)).astype(jnp.float32)


def check_channels(name: str, x: jax.Array, field: str, channels: int) -> None:
    """Raises ValueError unless x is [B, H, W, channels]."""
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"{name} have shape {x.shape}: pass [batch, height, width, {field}={channels}]")
