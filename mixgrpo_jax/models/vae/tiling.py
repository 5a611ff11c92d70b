"""Decoding large latents tile by tile."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.models.vae import model
from mixgrpo_jax.models.vae.model import Params, VAEConfig


def tiled_decode(
    config: VAEConfig,
    params: Params,
    latents: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    tile: int = 64,
    overlap: float = 0.25,
) -> jax.Array:
    """`decode` in overlapping square tiles, one at a time: activations take the memory of one tile.

    Tiles are spread evenly, and where two overlap, the weight of the later one grows linearly from 0 to 1. A tile's
    norms and attention see that tile alone: the result resembles `decode`'s, and equals it when one tile is enough.

    Args:
      config, params, latents, dtype: as for `decode`.
      tile: side of a tile, in latents.
      overlap: least part of a tile's side that is shared with the next tile, at most 0.5.

    Returns:
      Images as `decode` returns them.

    Raises:
      ValueError: `overlap` is above 0.5 or less than one latent.
    """
    if not 1 <= tile * overlap <= tile / 2:
        raise ValueError(f"overlap={overlap} of tile={tile}: choose an overlap from 1/tile to 0.5")
    (b, h, w, c), f = latents.shape, config.downsampling
    rows, cols = (_tiles(size, tile, overlap, f) for size in (h, w))

    def add(images, placed):
        (row, weight_y), (col, weight_x) = placed
        z = jax.lax.dynamic_slice(latents, (0, row, col, 0), (b, min(tile, h), min(tile, w), c))
        part = model.decode(config, params, z, dtype) * weight_y[:, None, None] * weight_x[:, None]
        start = (0, f * row, f * col, 0)
        part += jax.lax.dynamic_slice(images, start, part.shape)
        return jax.lax.dynamic_update_slice(images, part, start), None

    y, x = np.indices((len(rows[0]), len(cols[0]))).reshape(2, -1)
    grid = [array[y] for array in rows], [array[x] for array in cols]
    return jax.lax.scan(add, jnp.zeros((b, f * h, f * w, config.out_channels)), grid)[0]


def _tiles(size: int, tile: int, overlap: float, f: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts [n] of the tiles along a side, and the weights [n, f tile] of their pixels."""
    tile, step = min(tile, size), tile - int(tile * overlap)
    count = 1 + math.ceil((size - tile) / step)
    starts = np.linspace(0, size - tile, count).round().astype(np.int32)

    def ramp(k, pixels):
        """From 0 to 1 where tiles k - 1 and k overlap. The weight r_k - r_(k+1) telescopes, so that all add up to 1."""
        if k in (0, count):
            return np.full(len(pixels), k == 0, np.float32)
        return np.interp(pixels, (f * starts[k], f * (starts[k - 1] + tile)), (0, 1))

    positions = f * starts[:, None] + np.arange(f * tile)
    weights = [ramp(k, pixels) - ramp(k + 1, pixels) for k, pixels in enumerate(positions)]
    return starts, np.stack(weights).astype(np.float32)
