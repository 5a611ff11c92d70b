"""Low-rank adapters over a frozen base: y = x W + (alpha/r) (x A) B, with A [d_in, r] and B [r, d_out] in fp32.

An adapted kernel stands where the kernel stood, so that a model's functions take adapted parameters as they are:
`apply(config, lora.attach(params, adapters, scale), ...)`. The base alone is the policy before training.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from safetensors import safe_open

from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.weights import Params, Rule
from mixgrpo_jax.models.lora_config import BASES, LoraConfig
from mixgrpo_jax.models.nn import products

FILE_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."  # names a pipeline's part in a file that may hold adapters of several
PEFT_CONFIG = "lora_adapter_metadata"
FOLDED_SCALE = "folded_scale"


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
    kernels = _kernels(params)
    targets = [layer for layer in kernels if re.fullmatch(config.targets, layer)]
    if not targets:
        raise ValueError(f"model.lora.targets={config.targets!r} matches no layer; there are {_some(kernels)}")

    def adapter(layer: str) -> dict[str, Array]:
        a, b = _factors(kernels[layer].shape, config.rank).values()
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


def to_peft(table: Sequence[Rule], adapters: Params, scale: float) -> dict[str, np.ndarray]:
    """Tensors of a diffusers LoRA file: `transformer.{layer}.lora_A.weight` (r, in) and `.lora_B.weight` (out, r).

    `table` is the model's weights table. The scale is folded into lora_B: a file that says nothing of alpha means
    alpha = r to every reader, and not every reader looks for more.
    """
    return weights.export(rules(table), _scaled(adapters, scale))


def from_peft(table: Sequence[Rule], params: Params, tensors: Mapping[str, np.ndarray]) -> tuple[Params, float]:
    """Adapters (fp32, on the host) and scale from the tensors of a LoRA file; names may lack "transformer.".

    The scale is alpha/r with alpha from the tensors `{layer}.alpha`, and 1 without them. `params` are the model's, or
    their shapes.

    Raises:
      ValueError: a tensor is not of an adapter of this model, is missing (a lora_A without lora_B, a block), or has
        another rank or shape than the others; or alphas differ. The message names it.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    rank = next((tensors[name].shape[0] for name in tensors if name.endswith(".lora_A.weight")), 0)
    factors = rules(table, prefix)
    skeleton, alphas = {}, dict[str, float]()
    for layer, kernel in _kernels(params).items():
        names = {rule.ours[-1]: rule.names(kernel.shape) for rule in factors if rule.ours[:-2] == layer}
        if any(name in tensors for name in (*names["a"], *names["b"])):
            skeleton[layer] = _factors(kernel.shape, rank)
            alphas |= {name.replace(".lora_A.weight", ".alpha"): float(rank) for name in names["a"]}
    if not (rank and skeleton):
        raise ValueError(f"no adapters of this model's layers among the tensors {_some(sorted(tensors))}")
    adapters = weights.load(factors, _unflatten(skeleton), tensors, dtype=np.float32, ignore=alphas)
    alphas |= {name: tensors[name].item() for name in alphas if name in tensors}
    low, high = min(alphas, key=alphas.__getitem__), max(alphas, key=alphas.__getitem__)
    if alphas[low] != alphas[high]:
        raise ValueError(f"{low} is {alphas[low]:g} and {high} {alphas[high]:g}: one alpha for all layers is supported")
    return adapters, alphas[low] / rank


def save(folder: str | os.PathLike, table: Sequence[Rule], adapters: Params, scale: float) -> None:
    """Writes pytorch_lora_weights.safetensors, which diffusers' load_lora_weights and load_lora_adapter open.

    The scale is folded into lora_B (see `to_peft`), and noted in the file for `load` to take out again.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", FOLDED_SCALE: str(float(scale))}
    weights.write_safetensors(Path(folder) / FILE_NAME, to_peft(table, adapters, scale), metadata)


def load(path: str | os.PathLike, table: Sequence[Rule], params: Params) -> tuple[Params, float]:
    """Adapters and scale, as `attach` takes them, from a LoRA file or its folder, ours or as diffusers saves it.

    What `save` wrote comes back bit-identical if the scale is a power of two, and up to B's last bits otherwise. In
    other files alpha is the metadata's or the tensors', and r without either. Raises ValueError where `from_peft` does,
    and for metadata that contradict the tensors or ask for more than one rank and one alpha.
    """
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    tensors = weights.read_safetensors(file)
    adapters, scale = from_peft(table, params, tensors)
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata() or {}
    if PEFT_CONFIG in metadata:
        if any(name.endswith(".alpha") for name in tensors):
            raise ValueError(f"{file} gives alpha twice: remove its tensors .alpha or its metadata {PEFT_CONFIG}")
        scale = _peft_scale(file, json.loads(metadata[PEFT_CONFIG]), rank=jax.tree.leaves(adapters)[0].shape[-1])
    folded = float(metadata.get(FOLDED_SCALE, 1))
    return _scaled(adapters, 1 / folded), scale * folded


def _peft_scale(file: Path, config: dict[str, Any], rank: int) -> float:
    config = {name.removeprefix(PREFIX): value for name, value in config.items()}
    for field in ("alpha_pattern", "rank_pattern", "use_dora"):
        if config.get(field):
            raise ValueError(f"{file} has {field}={config[field]!r}, which is not supported: merge it with diffusers")
    if config["r"] != rank:
        raise ValueError(f"{file} has r={config['r']} in its metadata {PEFT_CONFIG}, and tensors of rank {rank}")
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def rules(table: Sequence[Rule], prefix: str = PREFIX) -> list[Rule]:
    """The rules of adapters' factors in a LoRA file, from the model's."""
    return [
        Rule(
            f"{prefix}{rule.theirs.removesuffix('.weight')}.lora_{factor.upper()}.weight",
            rule.ours.removesuffix("kernel") + factor,
            (1, 0),
            rotary=rule.rotary if factor == "b" else 0,
        )
        for rule in table
        if rule.ours.endswith("/kernel")
        for factor in "ab"
    ]


def _kernels(params: Params) -> dict[str, Any]:
    """The kernels of linear layers, one or stacked, by the layer's path."""
    leaves = traverse_util.flatten_dict(params, sep="/").items()
    return {path[: -len("/kernel")]: k for path, k in leaves if path.endswith("/kernel") and len(k.shape) in (2, 3)}


def _factors(kernel: tuple[int, ...], rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    *blocks, d_in, d_out = kernel
    shapes = {"a": (*blocks, d_in, rank), "b": (*blocks, rank, d_out)}
    return {factor: jax.ShapeDtypeStruct(shape, jnp.float32) for factor, shape in shapes.items()}


def _pairs(adapters: Params) -> dict[str, tuple[Any, Any]]:
    leaves = traverse_util.flatten_dict(adapters, sep="/")
    return {path[:-2]: (leaf, leaves[f"{path[:-2]}/b"]) for path, leaf in leaves.items() if path.endswith("/a")}


def _scaled(adapters: Params, scale: float) -> Params:
    """Adapters on the host with B times scale."""
    return _unflatten(
        {layer: {"a": a, "b": np.asarray(b) * np.float32(scale)} for layer, (a, b) in _pairs(adapters).items()}
    )


def _replace(params: Params, adapters: Params, make: Callable[[Any, Any, Any], Any]) -> Params:
    leaves = traverse_util.flatten_dict(params, sep="/")
    for layer, (a, b) in _pairs(adapters).items():
        if f"{layer}/kernel" not in leaves:
            raise ValueError(f"adapters of {layer} are of another model: this one has no such layer")
        leaves[f"{layer}/kernel"] = make(leaves[f"{layer}/kernel"], a, b)
    return _unflatten(leaves)


def _unflatten(layers: Mapping[str, Any]) -> Params:
    return traverse_util.unflatten_dict(layers, sep="/")


def _some(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, 6))
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")
