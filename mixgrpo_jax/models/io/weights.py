"""Released weights: one table per model maps tensors to parameters and back, and nothing may be left over.

A `Rule` pairs the name of a released tensor with the path of a parameter. `{i}` in the tensor's name is the index of a
block, which is row i - `first` of the stacked parameter. The same table serves `load` and `export`.

Nothing here holds a whole model unless it is asked to: parameters and tensors are `Lazy`, read where they are indexed.
"""

import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from mixgrpo_jax.models.io.lazy import Lazy, contiguous, copy, place
from mixgrpo_jax.models.io.safetensors_io import read_json as read_json
from mixgrpo_jax.models.io.safetensors_io import read_safetensors as read_safetensors
from mixgrpo_jax.models.io.safetensors_io import write_safetensors as write_safetensors
from mixgrpo_jax.models.io.safetensors_io import write_shards as write_shards

Params = dict[str, Any]

FLOATS = tuple(np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Rule:
    """Tensor `theirs`, transposed by `axes`, is the parameter at `ours` ("a/b/c"), or its row i - first for each `{i}`.

    Where a release fuses several layers into one tensor, its rows are cut into `of` equal parts, and the parameter is
    made of those that the slice `parts` picks, in its order. Such rules only serve to load.

    Where a release's rotary positions turn neighbours in heads of size `rotary`, our last axis is in `halves`: of the
    first `turned` channels, or of all.
    """

    theirs: str
    ours: str
    axes: tuple[int, ...] | None = None
    parts: slice | None = None
    of: int = 1
    rotary: int = 0
    turned: int = 0
    first: int = 0

    @property
    def heads(self) -> tuple[int, int]:
        """What `halves` is told."""
        return self.rotary, self.turned

    @property
    def stacked(self) -> bool:
        """Whether one tensor per block is stacked in the parameter."""
        return "{i}" in self.theirs

    def names(self, shape: Sequence[int]) -> list[str]:
        """Names of the tensors that make up a parameter of this shape."""
        if not self.stacked:
            return [self.theirs]
        return [self.theirs.replace("{i}", str(self.first + row)) for row in range(shape[0])]

    def to_ours(self, tensor: np.ndarray, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A released tensor in our layout, or the part of it at `index`."""
        if self.parts:
            parts = tensor.reshape(self.of, -1, *tensor.shape[1:])[self.parts]
            tensor = parts.reshape(-1, *tensor.shape[1:])
        ours = tensor if self.axes is None else tensor.transpose(self.axes)
        return _channels(ours, index, halves, *self.heads) if self.rotary else ours[index]

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_ours`. Raises ValueError for a part of a fused tensor."""
        if self.parts:
            raise ValueError(f"{self.ours} is a part of {self.theirs}: write with a table of whole tensors")
        array = _channels(array, (), neighbours, *self.heads) if self.rotary else array
        return array if self.axes is None else array.transpose(np.argsort(self.axes))

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a released tensor that feeds a parameter (or its row) of this shape."""
        theirs = tuple(shape) if self.axes is None else tuple(shape[axis] for axis in np.argsort(self.axes))
        return (theirs[0] * self.of // len(range(self.of)[self.parts]), *theirs[1:]) if self.parts else theirs


def linear(theirs: str, ours: str, *, bias: bool = True, **options: Any) -> list[Rule]:
    """Rules of a linear layer: `weight` (out, in) is the transpose of `kernel` [in, out]; `bias` is `bias`."""
    weight = Rule(f"{theirs}.weight", f"{ours}/kernel", (1, 0), **options)
    return [weight, Rule(f"{theirs}.bias", f"{ours}/bias", **options)] if bias else [weight]


def halves(x: Any, head: int, turned: int = 0) -> Any:
    """[..., H d] with each head's pairs (x_2j, x_2j+1), which rotary positions turn, at (x_j, x_j+d/2); d is `head`.

    Where given, the first `turned` channels alone are of such heads.

    >>> halves(np.arange(8), 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return _swapped(x, (head // 2, 2), turned)


def neighbours(x: Any, head: int, turned: int = 0) -> Any:
    """Inverse of `halves`."""
    return _swapped(x, (2, head // 2), turned)


def _swapped(x: Any, pairs: tuple[int, int], turned: int) -> Any:
    if turned:
        concatenate = jnp.concatenate if isinstance(x, jax.Array) else np.concatenate
        return concatenate([_swapped(x[..., :turned], pairs, 0), x[..., turned:]], axis=-1)
    return x.reshape(*x.shape[:-1], -1, *pairs).swapaxes(-1, -2).reshape(x.shape)


def reordered(table: Sequence[Rule], params: Params, order: Callable[..., Any]) -> Params:
    """Parameters of the table, with `order`, `halves` or `neighbours`, of those that rotary positions ask for.

    Arrays on devices stay where they are, and their buffers are taken over; `Lazy` stays so.
    """
    heads = {rule.ours: rule.heads for rule in table}
    leaves = traverse_util.flatten_dict(params, sep="/")
    leaves = {path: reorder(leaf, order, *heads[path]) if heads[path][0] else leaf for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


def reorder(leaf: Any, order: Callable[..., Any], head: int, turned: int = 0) -> Any:
    """As `reordered`, of one array or `Lazy`."""
    if isinstance(leaf, Lazy):
        return Lazy(leaf.shape, leaf.dtype, lambda index: _channels(leaf, index, order, head, turned))
    if isinstance(leaf, jax.Array):
        program = jax.jit(order, static_argnums=(1, 2), donate_argnums=0, out_shardings=leaf.sharding)
        return program(leaf, head, turned)
    return order(leaf, head, turned)


def _channels(x: Any, index: tuple[slice, ...], order: Callable[..., Any], head: int, turned: int) -> np.ndarray:
    """order(x, head, turned)[index], of which only that part is made."""
    last = len(x.shape) - 1
    rows, channels = x[index[:last]], order(np.arange(x.shape[-1]), head, turned)[index[last:]]
    # NumPy gathers along rows fast by the one, along columns of a transposed matrix by the other.
    return np.take(rows, channels, axis=-1) if rows.flags.c_contiguous else rows[..., channels]


def load(
    table: Sequence[Rule],
    skeleton: Params,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: Any = None,
    ignore: Collection[str] = (),
    shardings: Any = None,
) -> Params:
    """Parameters from released tensors.

    Args:
      table: the model's rules; rules for parameters that `skeleton` lacks are skipped.
      skeleton: parameters or their shapes, as `jax.eval_shape` of `init` returns them.
      tensors: released tensors by name.
      dtype: dtype of the result; the tensors' own by default.
      ignore: names of tensors that may be there and are not read.
      shardings: one for all parameters or a tree of them, for parameters that go straight onto a mesh: each process
        reads what its devices hold, one parameter at a time.

    Returns:
      Arrays in the skeleton's structure: on the host, or on the devices that `shardings` name.

    Raises:
      ValueError: a tensor is missing, not expected, or of another shape or kind than expected; the message names it.
        Everything is checked before any data are read.
    """
    return place(lazy_load(table, skeleton, tensors, dtype=dtype, ignore=ignore), shardings)


def lazy_load(
    table: Sequence[Rule],
    skeleton: Params,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: Any = None,
    ignore: Collection[str] = (),
) -> Params:
    """As `load`, with a `Lazy` for each parameter. All checks are made now."""
    leaves = traverse_util.flatten_dict(skeleton, sep="/")
    rules = _rules(table, leaves)
    expected = {name for path, rule in rules.items() for name in rule.names(leaves[path].shape)}
    check_dtypes(expected & tensors.keys(), tensors)
    _check_names(expected, tensors, ignore)
    params = {path: _lazy_parameter(rule, leaves[path].shape, tensors, dtype) for path, rule in rules.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def export(table: Sequence[Rule], params: Params) -> dict[str, np.ndarray]:
    """Released tensors from parameters, the inverse of `load`: contiguous host arrays by name, in the params' dtype."""
    return {name: tensor[()] for name, tensor in lazy_export(table, params).items()}


def lazy_export(table: Sequence[Rule], params: Params) -> dict[str, Lazy]:
    """As `export`, with a `Lazy` for each tensor; parameters may be arrays or `Lazy`, and are read block by block."""
    leaves = traverse_util.flatten_dict(params, sep="/")

    @functools.lru_cache(maxsize=1)
    def source(path):
        return leaves[path] if isinstance(leaves[path], Lazy) else np.asarray(leaves[path])

    def lazy_tensor(rule, path, block):
        def read(index):
            array = source(path)[block : block + 1][0] if rule.stacked else source(path)[()]
            return contiguous(rule.to_theirs(array)[index])

        shape = leaves[path].shape[1:] if rule.stacked else leaves[path].shape
        return Lazy(rule.their_shape(shape), np.dtype(leaves[path].dtype), read)

    return {
        name: lazy_tensor(rule, path, block)
        for path, rule in _rules(table, leaves).items()
        for block, name in enumerate(rule.names(leaves[path].shape))
    }


def check_shapes(skeleton: Params, found: Params, what: str) -> None:
    """Raises ValueError, naming a parameter, where `found` has other parameters or shapes than the skeleton."""
    expected, actual = (traverse_util.flatten_dict(tree, sep="/") for tree in (skeleton, found))
    if missing := sorted(expected.keys() - actual.keys()):
        raise ValueError(f"{what} lacks {_listed(missing)}: it is of another model, or of another config")
    if extra := sorted(actual.keys() - expected.keys()):
        raise ValueError(f"{what} has {_listed(extra)}, which the config does not: it is of another model")
    for path, leaf in expected.items():
        if tuple(leaf.shape) != (shape := tuple(actual[path].shape)):
            raise ValueError(f"{what} has {path} of shape {shape}, and the config expects {tuple(leaf.shape)}")


def _rules(table: Sequence[Rule], leaves: Mapping[str, Any]) -> dict[str, Rule]:
    rules = {rule.ours: rule for rule in table if rule.ours in leaves}
    if uncovered := sorted(leaves.keys() - rules.keys()):
        raise ValueError(f"no rule for {_listed(uncovered)}: add one to the model's table")
    return rules


def check_dtypes(names: Collection[str], tensors: Mapping[str, Any]) -> None:
    """Raises ValueError for the first of these tensors that is of no float type."""
    for name in sorted(names):
        if (dtype := np.dtype(tensors[name].dtype)) not in FLOATS:
            file = getattr(tensors[name], "filename", None)
            where = f" of {file}" if file else ""
            raise ValueError(
                f"tensor {name}{where} is {dtype}: quantised weights are not read, take bf16, fp16 or fp32"
            )


def _check_names(expected: set[str], tensors: Mapping[str, Any], ignore: Collection[str]) -> None:
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"missing tensors: {_listed(missing)}; the config expects {len(expected)} in all")
    if extra := sorted(tensors.keys() - expected - set(ignore)):
        raise ValueError(f"unexpected tensors: {_listed(extra)}; the config expects {len(expected)} in all")


def _lazy_parameter(rule: Rule, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray], dtype: Any) -> Lazy:
    names = rule.names(shape)
    for name in names:
        expected = rule.their_shape(shape[1:] if rule.stacked else shape)
        if tensors[name].shape != expected:
            raise ValueError(f"tensor {name} has shape {tensors[name].shape}, and the config expects {expected}")
        if dtype is None and tensors[name].dtype != (first := tensors[names[0]].dtype):
            raise ValueError(f"tensor {name} is {tensors[name].dtype}, and {names[0]} is {first}: give a dtype for all")
    own = tensors[names[0]].dtype if names else np.float32
    dtype = np.dtype(own if dtype is None else dtype)

    def read(index):
        if not rule.stacked:
            return contiguous(rule.to_ours(tensors[names[0]], index), dtype)
        blocks, *rest = index or (slice(None),)
        sizes = [len(range(size)[axis]) for size, axis in zip(shape[1:], rest)] + [*shape[1 + len(rest) :]]
        result = np.empty((len(names[blocks]), *sizes), dtype)
        for block, name in enumerate(names[blocks]):
            copy(rule.to_ours(tensors[name], tuple(rest)), result[block, ...])
        return result

    return Lazy(tuple(shape), dtype, read)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_config(folder: str | os.PathLike, expected: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model folder. Raises ValueError when a field is absent or differs from what `expected` says."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}: give a model's folder as diffusers or transformers saves it")
    config = read_json(file)
    for field, value in expected.items():
        if config.get(field) != value:
            raise ValueError(f"{file} has {field}={config.get(field)!r}, and this model needs {value!r}")
    return config


def sized(config_class: type, folder: str | os.PathLike, config: Mapping[str, Any]) -> Any:
    """Our dataclass, of those entries of a folder's config.json that are its fields; lists are tuples.

    Raises ValueError, which names the file and the field, for a value of another type or a negative size.
    """
    file, known = Path(folder) / "config.json", {}
    for field in fields(config_class):
        if field.name not in config:
            continue
        value = tuple(config[field.name]) if isinstance(config[field.name], list) else config[field.name]
        sizes = value if isinstance(value, tuple) else (value,)
        kind = type(field.default)
        kinds = (int, float) if kind is float else kind
        right = field.default is None or (isinstance(value, kinds) and isinstance(value, bool) == (kind is bool))
        if isinstance(value, tuple):
            right = isinstance(field.default, tuple) and all(
                type(size) is type((*field.default, 0)[0]) for size in value
            )
        if not right or any(isinstance(size, int) and size < 0 for size in sizes):
            what = "none below 0" if right else f"as {field.default!r} is"
            raise ValueError(f"{file} has {field.name}={value!r}, which should be {what}: mend it, or fetch it again")
        known[field.name] = value
    try:
        return config_class(**known)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: {error}") from None


def write_config(folder: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes config.json into the folder, which is made if need be; whole or not at all."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / "config.json"
    partial = _partial(file)
    Path(partial).write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, file)


def _partial(path: str | os.PathLike) -> str:
    return f"{os.fspath(path)}.partial"
