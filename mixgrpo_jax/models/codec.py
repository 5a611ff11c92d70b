"""Pictures <-> the packed latents that a transformer sees: through a VAE, or by folding pixels."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.models import vae
from mixgrpo_jax.models.nn import placement
from mixgrpo_jax.models.nn.patches import pack, unpack


class Codec(Protocol):
    """What a policy needs of a latent space. `params` are those of the autoencoder, None without one."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of packed tokens."""

    @property
    def channels(self) -> int:
        """Channels of a packed token."""

    def encode(self, params: Any, images: Array) -> Array:
        """[B, H, W, 3] uint8 -> packed latents [B, S, C] fp32."""

    def decode(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> [B, H, W, 3] uint8: `pixels`, rounded and clipped."""

    def pixels(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> [B, H, W, 3] fp32 on the scale 0 to 255, neither rounded nor clipped.

        Rewards with a gradient look at these: `decode` has none.
        """


@dataclass(frozen=True)
class PixelCodec:
    """A latent space without a learned autoencoder: pixels in [-1, 1], folded by 4 x 2 into channels.

    It stands where a VAE stands: pictures [B, H, W, 3] uint8 <-> latents [B, H/4, W/2, 24], packed 2 x 2.
    """

    image_size: tuple[int, int]
    fold: tuple[int, int] = (4, 2)

    def __post_init__(self):
        _check_divides(self.image_size, (2 * self.fold[0], 2 * self.fold[1]))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of packed tokens."""
        return self.image_size[0] // (2 * self.fold[0]), self.image_size[1] // (2 * self.fold[1])

    @property
    def channels(self) -> int:
        """Channels of a packed token."""
        return 4 * 3 * self.fold[0] * self.fold[1]

    def encode(self, params: Any, images: Array) -> Array:
        """[B, H, W, 3] uint8 -> packed latents [B, S, C] fp32."""
        b, h, w, _ = images.shape
        (dy, dx), x = self.fold, _signed(images)
        x = x.reshape(b, h // dy, dy, w // dx, dx, 3).transpose(0, 1, 3, 5, 2, 4)
        return pack(x.reshape(b, h // dy, w // dx, 3 * dy * dx))

    def decode(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> [B, H, W, 3] uint8, rounded and clipped."""
        return _bytes(self.pixels(params, tokens))

    def pixels(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> [B, H, W, 3] fp32 on the scale 0 to 255, neither rounded nor clipped."""
        (h, w), (dy, dx) = self.image_size, self.fold
        x = unpack(tokens.astype(jnp.float32), h // dy, w // dx)
        x = x.reshape(-1, h // dy, w // dx, 3, dy, dx).transpose(0, 1, 4, 2, 5, 3).reshape(-1, h, w, 3)
        return _scaled(x)


@dataclass(frozen=True)
class VAECodec:
    """The latent space of an autoencoder: its latents, packed 2 x 2, and standardised where it has their statistics.

    Products are computed in `dtype`.
    """

    config: vae.VAEConfig
    image_size: tuple[int, int]
    dtype: Any

    def __post_init__(self):
        _check_divides(self.image_size, (2 * self.config.downsampling,) * 2)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of packed tokens."""
        side = 2 * self.config.downsampling
        return self.image_size[0] // side, self.image_size[1] // side

    @property
    def channels(self) -> int:
        """Channels of a packed token."""
        return 4 * self.config.latent_channels

    def encode(self, params: Any, images: Array) -> Array:
        """[B, H, W, 3] uint8 -> packed latents [B, S, C] fp32, the posterior's mean."""
        mean, _ = vae.encode(self.config, params, _signed(images), self.dtype)
        return vae.standardise(self.config, params, pack(vae.to_latents(self.config, mean)))

    def decode(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> [B, H, W, 3] uint8, rounded and clipped."""
        return placement.one_by_one(lambda sample: _bytes(self._pixels(params, sample)), tokens)

    def pixels(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> [B, H, W, 3] fp32 on the scale 0 to 255, neither rounded nor clipped."""
        return placement.one_by_one(lambda sample: self._pixels(params, sample), tokens)

    def _pixels(self, params: Any, tokens: Array) -> Array:
        rows, cols = self.grid
        latents = unpack(vae.restore(self.config, params, tokens), 2 * rows, 2 * cols)
        return _scaled(vae.decode(self.config, params, latents, self.dtype))


def codec_for(config: vae.VAEConfig | None, image_size: tuple[int, int], dtype: Any, channels: int) -> Codec:
    """The autoencoder's latent space for pictures of this size; without one, folded pixels.

    Raises ValueError where its tokens have other channels than the transformer takes.
    """
    codec: Codec = PixelCodec(image_size) if config is None else VAECodec(config, image_size, dtype)
    if codec.channels != channels:
        raise ValueError(f"the transformer takes {channels} channels a token, the codec makes {codec.channels}")
    return codec


def _check_divides(image_size: tuple[int, int], sides: tuple[int, int]) -> None:
    for size, side, axis in zip(image_size, sides, ("rows", "columns")):
        if size % side:
            raise ValueError(f"model.image_size: {size} {axis} are not a multiple of {side}; choose one")


def _signed(images: Array) -> Array:
    return images.astype(jnp.float32) / 127.5 - 1


def _scaled(images: Array) -> Array:
    return (images + 1) * 127.5


def _bytes(pixels: Array) -> Array:
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
