"""Pictures as a reward model's image tower sees them, computed on the device inside the reward's own program."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# Of the pictures in [0, 1] that CLIP was trained on; BLIP took them over.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

RESIZES = ("crop", "squash")
METHODS = ("cubic", "linear")


def preprocess(
    images: jax.typing.ArrayLike,
    size: int,
    *,
    resize: Literal["crop", "squash"] = "crop",
    method: Literal["cubic", "linear"] = "cubic",
    rounded: bool = True,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> jax.Array:
    """(resized(images) / 255 - mean) / std, fp32 [B, size, size, 3].

    The resize is antialiased, as PIL's is: when shrinking, the kernel is widened by the ratio of the sizes. The cubic
    kernel is Keys' with a = -1/2. PIL resizes the width and then the height, and holds bytes after each, rounded and
    clipped; `rounded` does the same (Pillow 13 starts with the height of a picture far taller than wide).
    Where the margin to crop is odd, the extra pixel is cut at the bottom or right.

    Args:
        images: [B, H, W, 3], uint8 or float from 0 to 255. Float images are never rounded or clipped, whatever
            `rounded` says, so that the result is differentiable and its gradient is the true one.
        size: side of the result.
        resize: "crop" brings the shorter side to `size` and cuts the centre out of the longer one; "squash" brings both
            sides to `size`, whatever becomes of the aspect ratio.
        method: "cubic" or "linear".
        rounded: of uint8 images, as PIL resizes (True) or as PyTorch resizes float tensors (False).
        mean, std: of each channel, for pixels in [0, 1].

    Raises:
        ValueError: images of another shape or an integer dtype other than uint8, or an unknown resize or method.
    """
    images = jnp.asarray(images)
    _check(images, size, resize, method)
    rounded = rounded and images.dtype == jnp.uint8
    height, width = _target(images.shape[1], images.shape[2], size, resize)
    x = images.astype(jnp.float32)
    for axis, length in ((2, width), (1, height)):
        x = _resize_axis(x, axis, length, method)
        x = jnp.clip(jnp.floor(x + 0.5), 0, 255) if rounded else x
    top, left = (height - size) // 2, (width - size) // 2
    x = x[:, top : top + size, left : left + size]
    return (x / 255 - jnp.array(mean)) / jnp.array(std)


def pooled(pictures: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """Means over the cells of pictures [B, H, W], row by row, over the largest of each picture: [B, S] in [0, 1]."""
    b, h, w = pictures.shape
    cells = pictures.reshape(b, h // cell[0], cell[0], w // cell[1], cell[1]).mean((2, 4)).reshape(b, -1)
    return cells / np.maximum(cells.max(1, keepdims=True), 1e-6)


def _target(height: int, width: int, size: int, resize: str) -> tuple[int, int]:
    """Height and width after the resize and before the crop."""
    if resize == "squash":
        return size, size
    short = min(height, width)
    return size * height // short, size * width // short


def _resize_axis(x: jax.Array, axis: int, length: int, method: str) -> jax.Array:
    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    return jax.image.resize(x, shape, method, antialias=True)


def _check(images: jax.Array, size: int, resize: str, method: str) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images have shape {images.shape}: give [B, H, W, 3]")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}: give uint8, or float from 0 to 255")
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    for name, value, choices in (("resize", resize, RESIZES), ("method", method, METHODS)):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {choices}")
