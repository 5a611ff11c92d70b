"""The recognition network as a function of pictures, and what it expects of them.

MobileOne-style convolutions halve the picture's height to one row and its width to an eighth; two blocks of attention
run along that row; a linear layer gives each position its logits over the alphabet.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.models.ppocr.graph import Network, Node, Params
from mixgrpo_jax.models.ppocr.operators import OPERATORS

HEIGHT = 48  # pixels; what the network was trained at
MIN_WIDTH = 5  # pixels, at that height; in narrower pictures the network sees no position
FRACTION = 22  # bits after the point in Pillow's fixed-point weights; with a byte before it they fit into an int32


def preprocess(images: jax.typing.ArrayLike) -> jax.Array:
    """Pictures of height 48 at the same aspect ratio, fp32 [B, 3, 48, W'] in [-1, 1], with W' = round(48 W / H).

    The resize is bilinear and antialiased: the width, then the height. Bytes are bytes again after each, by Pillow's
    fixed-point arithmetic and equal to its result. Floats are never rounded, so that the result is differentiable.

    Args:
        images: [B, H, W, 3], uint8 or float from 0 to 255.

    Raises:
        ValueError: images of another shape or dtype, or so narrow that the network would see no position.
    """
    images = jnp.asarray(images)
    _check(images)
    x = _resize(_resize(images, 2, _width(images)), 1, HEIGHT)
    return x.astype(jnp.float32).transpose(0, 3, 1, 2) / 127.5 - 1


def _resize(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    weights = _bilinear(x.shape[axis], size)
    if jnp.issubdtype(x.dtype, jnp.floating):
        y = jnp.tensordot(x.astype(jnp.float32), weights.astype(np.float32), ((axis,), (1,)), precision="highest")
    else:
        fixed = np.floor(weights * 2**FRACTION + 0.5).astype(np.int32)
        y = jnp.tensordot(x.astype(jnp.int32), fixed, ((axis,), (1,)))
        y = (y + 2 ** (FRACTION - 1)) >> FRACTION
    return jnp.moveaxis(y, -1, axis)


def _bilinear(source: int, target: int) -> np.ndarray:
    """Weight of each pixel in each resized one, float64 [target, source]: triangles, widened when shrinking."""
    ratio = source / target
    centres = (np.arange(target)[:, None] + 0.5) * ratio
    triangles = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - centres) / max(ratio, 1))
    return triangles / triangles.sum(1, keepdims=True)


def _width(images: jax.Array) -> int:
    return round(images.shape[2] * HEIGHT / images.shape[1])


def _check(images: jax.Array) -> None:
    is_picture = images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape or not is_picture:
        raise ValueError(f"images are {images.dtype} {images.shape}: give [B, H, W, 3], uint8 or float from 0 to 255")
    if _width(images) < MIN_WIDTH:
        raise ValueError(
            f"images of {images.shape[1]} x {images.shape[2]} pixels: text needs more width for its height"
        )


def logits(network: Network, params: Params, pixels: jax.typing.ArrayLike) -> jax.Array:
    """Logits of each class at each of T positions, about W' / 8: fp32 [B, 3, 48, W'] -> [B, T, classes].

    Shapes are worked out while tracing, and products are taken in fp32 on every device.

    Raises:
        ValueError: where an operator's attribute has a value that is not known; the message names both.
    """
    values: dict[str, Any] = {**network.constants, **params, network.input: jnp.asarray(pixels)}
    with jax.default_matmul_precision("float32"):
        for node in network.nodes:
            values[node.output] = _run(node, values)
    return values[network.output]


def _run(node: Node, values: dict[str, Any]) -> Any:
    try:
        return OPERATORS[node.operator](*(values[name] for name in node.inputs), **node.attributes)
    except ValueError as error:
        raise ValueError(f"operator {node.operator} of {node.output!r}: {error}") from error
