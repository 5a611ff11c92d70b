"""Arrays that are read where they are indexed, so that a model is never held whole on a host."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Index = tuple[slice, ...]
TILE = 256


@dataclass(frozen=True)
class Lazy:
    """An array that is read where it is indexed, by slices: `lazy[2:3]` is one block's row, `lazy[()]` the whole."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def __getitem__(self, index: slice | Index) -> np.ndarray:
        return self.read(index if isinstance(index, tuple) else (index,))


def place(params: Any, shardings: Any = None) -> Any:
    """A tree of `Lazy` as arrays: on the host, or by one sharding or a tree of them, one leaf at a time."""
    if shardings is None:
        return jax.tree.map(lambda leaf: leaf[()], params)
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, params)
    return jax.tree.map(_place_leaf, params, shardings)


def _place_leaf(leaf: Lazy, sharding: jax.sharding.Sharding) -> jax.Array:
    @functools.cache  # devices may hold the same part
    def read(bounds):
        return leaf[tuple(slice(*pair) for pair in bounds)]

    def callback(index):
        return read(tuple((axis.start, axis.stop) for axis in index))

    return jax.make_array_from_callback(leaf.shape, sharding, callback, dtype=leaf.dtype)


def contiguous(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """A copy in row-major order, in `dtype` or else in its own."""
    result = np.empty(array.shape, array.dtype if dtype is None else dtype)
    copy(array, result)
    return result


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source."""
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    # By tiles that fit the cache: a transposed matrix is copied several times faster so.
    for i in range(0, source.shape[0], TILE):
        for j in range(0, source.shape[1], TILE):
            target[i : i + TILE, j : j + TILE] = source[i : i + TILE, j : j + TILE]
