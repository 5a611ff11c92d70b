"""BRISQUE: do a picture's local statistics look like those of a good photograph? Without a reference, on the device.

Mittal, Moorthy, Bovik: No-Reference Image Quality Assessment in the Spatial Domain (2012). Its support vectors come
from the package brisque, of which only the files are read: importing it would bring OpenCV along.
"""

import functools
import importlib.util
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.on_device import OnDevice

LUMA = (0.2125, 0.7154, 0.0721)
SIZE, SIGMA = 7, 7 / 6  # of the Gaussian window of local statistics, in pixels
CONTRAST = 1 / 255  # added to the local deviation, lest flat places divide by zero
HALVE = (-3 / 32, 19 / 32, 19 / 32, -3 / 32)  # cubic with a = -3/4, midway between two pixels
TINY = 1e-12

# The shape alpha of a generalised Gaussian, in the range in which the regression was trained, and the ratio
# (E|x|)^2 / E x^2 that it has.
ALPHA = np.arange(0.2, 10.0005, 0.001)
RATIO = np.exp([2 * math.lgamma(2 / a) - math.lgamma(1 / a) - math.lgamma(3 / a) for a in ALPHA])


class Regression(NamedTuple):
    """score = sum_i coefficients_i exp(-gamma |vectors_i - x|^2) - rho, with features x scaled from [low, high]."""

    coefficients: np.ndarray  # [N]
    vectors: np.ndarray  # [N, 36]
    gamma: float
    rho: float
    low: np.ndarray  # [36]
    high: np.ndarray  # [36]


@functools.cache
def regression() -> Regression:
    """What the package brisque ships, trained on opinions of distorted photographs.

    Raises:
        ImportError: if brisque is not installed.
    """
    package = importlib.util.find_spec("brisque")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "the brisque reward reads its support vectors from the package brisque, which is not installed: "
            "pip install --no-deps brisque"
        )
    folder = Path(package.submodule_search_locations[0], "models")
    header, _, rows = (folder / "svm.txt").read_text().partition("SV\n")
    fields = dict(line.split(maxsplit=1) for line in header.splitlines())
    coefficients, vectors = zip(*(_row(line) for line in rows.splitlines()))
    with open(folder / "normalize.pickle", "rb") as file:
        limits = _Numbers(file).load()
    low, high = np.array(limits["min_"]), np.array(limits["max_"])
    return Regression(
        np.array(coefficients), np.stack(vectors), float(fields["gamma"]), float(fields["rho"]), low, high
    )


def _row(line: str) -> tuple[float, np.ndarray]:
    """A support vector as libsvm writes it: coefficient, then index:value of what is not zero, from 1."""
    coefficient, *entries = line.split()
    vector = np.zeros(36)
    for index, value in (entry.split(":") for entry in entries):
        vector[int(index) - 1] = float(value)
    return float(coefficient), vector


class _Numbers(pickle.Unpickler):
    """Reads plain containers of numbers, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"normalize.pickle of the package brisque names {module}.{name}: install brisque anew")


@jax.jit
def brisque(images: jax.typing.ArrayLike) -> jax.Array:
    """BRISQUE's score, about 0 for the best photographs to 100 for the worst distortions; fp32 [B].

    Args:
        images: [B, H, W, 3], uint8 or float from 0 to 255, in which it is differentiable.
    """
    x = jnp.sum(jnp.asarray(images, jnp.float32) / 255 * jnp.array(LUMA), axis=-1)
    model = regression()
    found = jnp.concatenate([features(x), features(_halved(x))], axis=-1)
    scaled = 2 * (found - model.low) / (model.high - model.low) - 1
    distance = jnp.sum((scaled[:, None] - model.vectors) ** 2, axis=-1)
    return jnp.sum(model.coefficients * jnp.exp(-model.gamma * distance), axis=-1) - model.rho


def features(x: jax.Array) -> jax.Array:
    """Parameters of the distributions of local contrast and of its products between neighbours.

    With m and s the mean and deviation in a Gaussian window about each pixel, the contrast is (x - m) / (s + 1/255).

    Args:
        x: luma [B, H, W] in [0, 1].

    Returns:
        [B, 18]: shape and variance of the contrast; then shape, mean, and left and right variance of its product with
        the neighbour to the right, below, and on the two diagonals.
    """
    contrast = _contrast(x)
    shape, _, left, right = _fit(contrast)
    products = [
        contrast[:, :, :-1] * contrast[:, :, 1:],
        contrast[:, :-1] * contrast[:, 1:],
        contrast[:, :-1, :-1] * contrast[:, 1:, 1:],
        contrast[:, 1:, :-1] * contrast[:, :-1, 1:],
    ]
    return jnp.stack([shape, (left + right) / 2, *(value for product in products for value in _fit(product))], axis=-1)


def _contrast(x: jax.Array) -> jax.Array:
    radius = SIZE // 2
    height, width = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (radius, radius), (radius, radius)))
    bell = np.exp(-((np.arange(SIZE) - radius) ** 2) / (2 * SIGMA**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    neighbours = [(w, padded[:, i : i + height, j : j + width]) for (i, j), w in np.ndenumerate(window)]
    mean = sum(w * y for w, y in neighbours)
    # Of differences: that of E x^2 and (E x)^2 would lose flat places to rounding.
    variance = sum(w * (y - mean) ** 2 for w, y in neighbours)
    return (x - mean) / (_root(variance) + CONTRAST)


def _fit(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Shape, mean, left and right variance of an asymmetric generalised Gaussian, by moments: x [B, H, W] -> [B] each.

    For r = (E|x|)^2 / E x^2, and l and r' the root mean squares of negative and other values, the shape is that whose
    ratio is R = r (l^3 + r'^3) (l + r') / (l^2 + r'^2)^2, and the mean is (r' - l) sqrt(R).
    """
    axes = (1, 2)
    squares = x * x
    left, right = (
        jnp.sum(squares * side, axes) / jnp.maximum(jnp.sum(side, axes), 1) for side in (1.0 * (x < 0), 1.0 * (x >= 0))
    )
    l, r = _root(left), _root(right)
    ratio = jnp.mean(jnp.abs(x), axes) ** 2 / (jnp.mean(squares, axes) + TINY)
    ratio *= (l**3 + r**3) * (l + r) / ((left + right) ** 2 + TINY)
    ratio = jnp.clip(ratio, RATIO[0], RATIO[-1])
    return jnp.interp(ratio, RATIO, ALPHA), (r - l) * jnp.sqrt(ratio), left, right


def _root(x: jax.Array) -> jax.Array:
    """sqrt(x), with a gradient of 0 where x is 0, in flat places, and not an infinite one."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _halved(x: jax.Array) -> jax.Array:
    """[B, H, W] -> [B, H/2, W/2], odd sizes rounded to even ones, edges repeated."""
    for axis in (1, 2):
        length = round(x.shape[axis] / 2)
        padding = [(0, 0)] * 3
        padding[axis] = (1, 2)
        padded = jnp.pad(x, padding, mode="edge")
        halves = (jax.lax.slice_in_dim(padded, i, i + 2 * length - 1, stride=2, axis=axis) for i in range(len(HALVE)))
        x = functools.reduce(jnp.add, (w * half for w, half in zip(HALVE, halves)))
    return x


def brisque_reward() -> Reward:
    """-BRISQUE, what the pixels alone tell: 0 for the best photographs to -100 for the worst distortions.

    Raises ImportError as `regression` does.
    """
    regression()
    score = OnDevice(lambda params, images, inputs: -brisque(images), {}, lambda prompts, metadata: None)
    return Reward("brisque", "device", score)
