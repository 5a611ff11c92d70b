"""Does a sign show what was asked for: its colours (`colour`), and everything at once (`strict`)?

Colours are judged by pure functions of the pixels, on the device; the number is read by `rewards.ocr`. The plate is
known by the picture's outermost ring of pixels, where no digit reaches.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.rewards import ocr
from mixgrpo_jax.rewards.contract import Images, Reward
from mixgrpo_jax.rewards.on_device import OnDevice

TOLERANCE = 0.25  # distance in the RGB unit cube at which a pixel counts 1/e
DIGIT_SHARE = 0.02  # share of pixels that even the thinnest number, "1", covers


@jax.jit
def colour_score(
    images: jax.typing.ArrayLike, plate_rgb: jax.typing.ArrayLike, digits_rgb: jax.typing.ArrayLike
) -> jax.Array:
    """How near a picture's colours are to the ones asked for, float32 [B] in [0, 1]: ring * presence * purity.

    With k(d) = exp(-(d / 0.25)^2) for a distance d in the RGB unit cube,

        ring     = mean of k(distance to the plate's colour) over the outermost pixels,
        presence = min(1, mean of k(distance to the digits' colour) over all pixels / 0.02),
        purity   = mean of k(distance to the segment between the two colours) over all pixels, weighted by
                   1 - k(distance to the plate's colour).

    The segment, because antialiased edges lie on it: a clean sign scores 1, and noise of any hue costs. The weights,
    because a short number covers few pixels, and its colour should count as much as a long one's.

    Args:
        images: [B, H, W, 3], uint8 or float from 0 to 255, in which it is differentiable.
        plate_rgb: [B, 3], 0 to 255.
        digits_rgb: [B, 3], 0 to 255.
    """
    pixels = _unit(images)
    plate, digits = _unit(plate_rgb)[:, None, None], _unit(digits_rgb)[:, None, None]
    on_plate = _nearness(pixels - plate)
    ring = _ring(on_plate).mean(-1)
    presence = jnp.minimum(1, _nearness(pixels - digits).mean((1, 2)) / DIGIT_SHARE)
    axis = digits - plate
    along = jnp.sum((pixels - plate) * axis, -1, keepdims=True) / jnp.maximum(jnp.sum(axis**2, -1, keepdims=True), 1e-6)
    on_segment = _nearness(pixels - plate - jnp.clip(along, 0, 1) * axis)
    off_plate = 1 - on_plate
    purity = jnp.sum(off_plate * on_segment, (1, 2)) / jnp.maximum(jnp.sum(off_plate, (1, 2)), 1e-6)
    return ring * presence * purity


@jax.jit
def nearest_colours(images: jax.typing.ArrayLike, palette: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Which colours of a palette the plate and the digits have, whatever was asked for: two of int32 [B].

    The plate's colour is the median of the outermost pixels; the digits' is the median of the 2% of pixels that are
    furthest from it.

    Args:
        images: uint8 [B, H, W, 3].
        palette: [B, K, 3], 0 to 255; the K colours to tell apart.
    """
    pixels, palette = _unit(images), _unit(palette)
    plate = jnp.median(_ring(pixels), axis=1, keepdims=True)
    flat = pixels.reshape(len(pixels), -1, 3)
    _, furthest = jax.lax.top_k(jnp.sum((flat - plate) ** 2, -1), max(1, int(DIGIT_SHARE * flat.shape[1])))
    digits = jnp.median(jnp.take_along_axis(flat, furthest[..., None], axis=1), axis=1, keepdims=True)
    nearest = [jnp.argmin(jnp.sum((palette - colour) ** 2, -1), -1) for colour in (plate, digits)]
    return nearest[0], nearest[1]


def colour() -> Reward:
    """Of signs: how near the colours are to the metadata's `plate_rgb` and `digits_rgb`, 0 to 1, see `colour_score`."""

    def inputs(prompts: list[str], metadata: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        del prompts
        return _column(metadata, "plate_rgb"), _column(metadata, "digits_rgb")

    def function(params: Any, images: jax.Array, colours: tuple[jax.Array, jax.Array]) -> jax.Array:
        del params
        return colour_score(images, *colours)

    return Reward("colour", "device", OnDevice(function, {}, inputs))


def strict(where: Literal["host", "device"] = "device") -> Reward:
    """Of signs: 1 where the number is read exactly, on the host or the device, and both colours are right, else 0."""
    return Reward("strict", "host", functools.partial(strict_score, read=ocr.reader(where)))


def strict_score(
    images: Images, prompts: list[str], metadata: list[dict], read: ocr.Read = ocr.read_on_device
) -> np.ndarray:
    """1 where the number is read exactly and both colours are the ones asked for, else 0; float32 [B].

    Too sparse to learn from, and therefore the fair measure on held-out prompts.
    """
    del prompts
    read_right = [text == m["number"] for text, m in zip(read(images), metadata, strict=True)]
    return (named_right(images, metadata) & np.array(read_right)).astype(np.float32)


def named_right(images: Images, metadata: list[dict]) -> np.ndarray:
    """Whether plate and digits are, of the colours in `metadata["palette"]`, nearest to those asked for; bool [B]."""
    palette = _column(metadata, "palette")
    found = np.stack(nearest_colours(images, palette), -1)  # [B, 2]
    asked = np.stack([_column(metadata, "plate_rgb"), _column(metadata, "digits_rgb")], 1)  # [B, 2, 3]
    return (np.take_along_axis(palette, found[..., None], 1) == asked).all((1, 2))


def _column(metadata: list[dict], name: str) -> np.ndarray:
    return np.stack([m[name] for m in metadata])


def _unit(colours: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(colours, jnp.float32) / 255


def _nearness(offset: jax.Array) -> jax.Array:
    return jnp.exp(-jnp.sum(offset**2, -1) / TOLERANCE**2)


def _ring(x: jax.Array) -> jax.Array:
    """The outermost pixels of [B, H, W, ...], as [B, 2 (H + W) - 4, ...]."""
    return jnp.concatenate([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], axis=1)
