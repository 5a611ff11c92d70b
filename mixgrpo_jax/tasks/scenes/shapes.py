"""Simple shapes of plain colours on a plain ground: what the pictures of the task `scenes` are made of.

The renderer puts them together, and the detector (`detector.py`) takes them apart.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

HEIGHT, WIDTH, SIZE = 24, 24, 8  # pixels: of a picture, and of a shape's box
GROUND = (235, 235, 235)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "yellow": (250, 205, 10),
    "green": (15, 145, 60),
    "blue": (25, 60, 215),
    "purple": (150, 30, 170),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross")

_OVERSAMPLING = 8  # antialiases the outlines


class Shape(NamedTuple):
    """A shape of a colour, and the pixel at the upper left of its box."""

    name: str
    colour: str
    left: int
    top: int


@functools.cache
def coverage(name: str) -> np.ndarray:
    """Share of each pixel of its box that a shape covers, float32 [SIZE, SIZE] in [0, 1]."""
    side = SIZE * _OVERSAMPLING
    x, y = np.meshgrid(*[(np.arange(side) + 0.5) / side * 2 - 1] * 2)  # the box is [-1, 1]^2, y downwards
    inside = {
        "circle": np.hypot(x, y) < 1,
        "square": np.full_like(x, True),
        "triangle": np.abs(x) < (1 + y) / 2,
        "cross": np.minimum(np.abs(x), np.abs(y)) < 1 / 3,
    }[name]
    return inside.reshape(SIZE, _OVERSAMPLING, SIZE, _OVERSAMPLING).mean((1, 3), dtype=np.float32)


def render(shapes: Iterable[Shape]) -> np.ndarray:
    """Picture of shapes, uint8 [24, 24, 3], antialiased."""
    picture = np.full((HEIGHT, WIDTH, 3), GROUND, np.float32)
    for shape in shapes:
        box = picture[shape.top : shape.top + SIZE, shape.left : shape.left + SIZE]
        box += coverage(shape.name)[..., None] * (np.array(PALETTE[shape.colour], np.float32) - box)
    return np.rint(picture).astype(np.uint8)
