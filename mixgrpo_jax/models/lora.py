"""Low-rank adapters over a frozen base: y = x W + (alpha/r) (x A) B, with A [d_in, r] and B [r, d_out] in fp32.

An adapted kernel stands where the kernel stood, so that a model's functions take adapted parameters as they are:
`apply(config, lora.attach(params, adapters, scale), ...)`. The base alone is the policy before training.
"""

import dataclasses
import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array

from mixgrpo_jax.models.io.weights import Params
from mixgrpo_jax.models.lora_config import BASES, LoraConfig
from mixgrpo_jax.models.nn import products


def _gaussian(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape) / shape[-1]


def _kaiming_uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(shape[-2])


INITS = {"gaussian": _gaussian, "kaiming_uniform": _kaiming_uniform}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraKernel:
    """W + scale A B as an operand of a product, never formed: base [..., d_in, d_out], a [..., d_in, r], b."""

    base: Any
    a: Array
    b: Array
    scale: float = dataclasses.field(metadata=dict(static=True))

    __array_ufunc__ = None  # a NumPy array on the left leaves the product to __rmatmul__

    def __getitem__(self, index: Any) -> "LoraKernel":
        return jax.tree.map(lambda leaf: leaf[index], self)

    def astype(self, dtype: Any) -> "LoraKernel":
        """All three factors in dtype."""
        return LoraKernel(self.base.astype(dtype), self.a.astype(dtype), self.b.astype(dtype), self.scale)

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.base + self.scale * ((x @ self.a) @ self.b)

    def joined(self, *parts: Array) -> Array:
        """[part, ...] @ kernel, with parts [..., d] that are not joined: [..., d_out]."""
        return products.joined(parts, self.base) + self.scale * (products.joined(parts, self.a) @ self.b)

    def tokens_last(self, x: Array) -> Array:
        """[B, S, d_in] -> [B, d_out, S]."""
        return products.tokens_last(x, self.base) + self.scale * products.tokens_last(x @ self.a, self.b)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Kernel:
    """A kernel of `dtype`, stored as int8 values [..., d_in, d_out] times an fp32 scale per output, [..., 1, d_out]."""

    values: Array
    scale: Array
    dtype: Any = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense kernel."""
        return self.values.shape

    def __getitem__(self, index: Any) -> "Int8Kernel":
        return jax.tree.map(lambda leaf: leaf[index], self)

    def astype(self, dtype: Any) -> Array:
        """The dense kernel."""
        return (self.values.astype(np.float32) * self.scale).astype(dtype)


def init(config: LoraConfig, params: Params, key: Array) -> Params:
    """Fresh adapters {"a": [..., d_in, r], "b": [..., r, d_out]} in fp32 at the paths of the targeted layers.

    `params` may be shapes. A layer's numbers depend on the key and its path alone. Raises ValueError when no layer
    matches config.targets.
    """
    layers = kernels(params)
    targets = [layer for layer in layers if re.fullmatch(config.targets, layer)]
    if not targets:
        raise ValueError(f"model.lora.targets={config.targets!r} matches no layer; there are {some(layers)}")

    def adapter(layer: str) -> dict[str, Array]:
        a, b = factors(layers[layer].shape, config.rank).values()
        layer_key = jax.random.fold_in(key, np.uint32(zlib.crc32(layer.encode())))
        return {"a": INITS[config.init](layer_key, a.shape), "b": jnp.zeros(b.shape)}

    return _unflatten({layer: adapter(layer) for layer in targets})


def attach(params: Params, adapters: Params, scale: float) -> Params:
    """The parameters with each targeted kernel W in the role of W + scale A B. With no adapters, the base itself.

    Raises ValueError for an adapter of a layer that `params` lacks.
    """
    return _replace(params, adapters, lambda kernel, a, b: LoraKernel(kernel, a, b, float(scale)))


def merge(params: Params, adapters: Params, scale: float) -> Params:
    """The parameters with each targeted kernel replaced by W + scale A B: computed in fp32, kept in W's dtype.

    Raises ValueError for an adapter of a layer that `params` lacks.
    """

    def merged(kernel, a, b):
        return (kernel.astype(jnp.float32) + scale * jnp.matmul(a, b, precision="highest")).astype(kernel.dtype)

    return _replace(params, adapters, merged)


def freeze(params: Params, base: str) -> Params:
    """Parameters in the dtype of a frozen base, on the host if they come from there.

    "float32" and "bfloat16" cast every leaf. "int8" rounds the kernels of stacked blocks [L, d_in, d_out], nearly all
    of a large model, to 127 steps of each output's largest weight, |error| <= max_in |w| / 254, and casts the others to
    bf16. Raises ValueError for another base.
    """
    if base not in BASES:
        raise ValueError(f"base={base!r} is unknown: choose one of {BASES}")

    def frozen(path, leaf):
        if base == "int8" and path[-1].key == "kernel" and leaf.ndim == 3:
            return _quantised(leaf)
        return leaf.astype(jnp.float32 if base == "float32" else jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(frozen, params)


def _quantised(kernel: Array) -> Int8Kernel:
    kernel32 = kernel.astype(np.float32)
    scale = abs(kernel32).max(axis=-2, keepdims=True) / 127
    values = (kernel32 / (scale + (scale == 0))).round().astype(np.int8)
    return Int8Kernel(values, scale, np.dtype(kernel.dtype))


def kernels(params: Params) -> dict[str, Any]:
    """The kernels of linear layers, one or stacked, by the layer's path."""
    leaves = traverse_util.flatten_dict(params, sep="/").items()
    return {path[: -len("/kernel")]: k for path, k in leaves if path.endswith("/kernel") and len(k.shape) in (2, 3)}


def factors(kernel: tuple[int, ...], rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a layer's A and B, from its kernel's."""
    *blocks, d_in, d_out = kernel
    shapes = {"a": (*blocks, d_in, rank), "b": (*blocks, rank, d_out)}
    return {factor: jax.ShapeDtypeStruct(shape, jnp.float32) for factor, shape in shapes.items()}


def pairs(adapters: Params) -> dict[str, tuple[Any, Any]]:
    """A and B by the layer's path."""
    leaves = traverse_util.flatten_dict(adapters, sep="/")
    return {path[:-2]: (leaf, leaves[f"{path[:-2]}/b"]) for path, leaf in leaves.items() if path.endswith("/a")}


def _replace(params: Params, adapters: Params, make: Callable[[Any, Any, Any], Any]) -> Params:
    leaves = traverse_util.flatten_dict(params, sep="/")
    for layer, (a, b) in pairs(adapters).items():
        if f"{layer}/kernel" not in leaves:
            raise ValueError(f"adapters of {layer} are of another model: this one has no such layer")
        leaves[f"{layer}/kernel"] = make(leaves[f"{layer}/kernel"], a, b)
    return _unflatten(leaves)


def _unflatten(layers: Mapping[str, Any]) -> Params:
    return traverse_util.unflatten_dict(layers, sep="/")


def some(names: Iterable[str]) -> str:
    """The first few of them."""
    first = list(itertools.islice(names, 6))
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")
