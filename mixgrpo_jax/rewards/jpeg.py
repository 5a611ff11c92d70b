"""How well does a picture compress? JPEG's file size, on the host: exact, and a first thing to try an algorithm on."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from mixgrpo_jax.rewards.contract import Images, Reward

QUALITY = 95
SCALE = 500  # of compressibility, kilobytes: about a 512-pixel image of noise, so that scores lie between -1 and 0


def kilobytes(images: Images) -> np.ndarray:
    """Size of each image as JPEG of quality 95 with 4:2:0 chroma, in 1000 bytes; float32 [B].

    Args:
        images: uint8 [B, H, W, 3].

    Raises:
        ValueError: images of another shape or dtype.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 [B, H, W, 3]")
    with ThreadPoolExecutor() as pool:  # encoding leaves Python's lock
        return np.fromiter(pool.map(_size, images), np.float32, len(images)) / 1000


def _size(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
    return buffer.tell()


def incompressibility(images: Images, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """`kilobytes`, float32 [B]: pictures with much detail score high."""
    del prompts, metadata
    return kilobytes(images)


def compressibility(images: Images, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """-`kilobytes` / 500, float32 [B]: smooth pictures score high."""
    del prompts, metadata
    return -kilobytes(images) / SCALE


def jpeg_compressibility() -> Reward:
    """-`kilobytes` / 500 as JPEG: smooth pictures score high."""
    return Reward("jpeg_compressibility", "host", compressibility)


def jpeg_incompressibility() -> Reward:
    """`kilobytes` as JPEG: pictures with much detail score high."""
    return Reward("jpeg_incompressibility", "host", incompressibility)
