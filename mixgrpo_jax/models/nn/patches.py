"""Latents as a transformer's tokens: 2 x 2 patches folded into channels, and their positions."""

import jax
import jax.numpy as jnp


def image_ids(rows: int, cols: int) -> jax.Array:
    """Positions (0, row, col) of a grid of packed latents in row-major order: [rows cols, 3], fp32."""
    row, col = jnp.meshgrid(jnp.arange(rows), jnp.arange(cols), indexing="ij")
    return jnp.stack([jnp.zeros_like(row), row, col], axis=-1).reshape(-1, 3).astype(jnp.float32)


def pack(latents: jax.Array) -> jax.Array:
    """Folds 2 x 2 patches into channels: [B, H, W, C] -> [B, (H/2)(W/2), 4 C], channels ordered (c, dy, dx).

    Raises ValueError when H or W is odd.
    """
    b, h, w, c = latents.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents are {h} x {w}: both sides must be even to form 2 x 2 patches")
    patches = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return patches.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """Inverse of `pack` for latents of height x width: [B, S, 4 C] -> [B, height, width, C].

    Raises ValueError when S is not (height/2)(width/2).
    """
    b, s, c = tokens.shape
    if height % 2 or width % 2 or s != (height // 2) * (width // 2):
        raise ValueError(f"{s} tokens do not make latents of {height} x {width}: need (height/2)(width/2) of them")
    patches = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return patches.reshape(b, height, width, c // 4)
