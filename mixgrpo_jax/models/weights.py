"""Released weights: one table per model maps tensors to parameters and back, and nothing may be left over.

A `Rule` pairs the name of a released tensor with the path of a parameter. `{i}` in the tensor's name is the index of a
block, which is row i of the stacked parameter. The same table serves `load` and `export`.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

Params = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """Tensor `theirs`, transposed by `axes`, is the parameter at `ours` ("a/b/c"), or its row i for each `{i}`."""

    theirs: str
    ours: str
    axes: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        """Whether one tensor per block is stacked in the parameter."""
        return "{i}" in self.theirs

    def names(self, shape: Sequence[int]) -> list[str]:
        """Names of the tensors that make up a parameter of this shape."""
        return [self.theirs.replace("{i}", str(i)) for i in range(shape[0])] if self.stacked else [self.theirs]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A released tensor in our layout."""
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_ours`."""
        return array if self.axes is None else array.transpose(np.argsort(self.axes))


def linear(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """Rules of a linear layer: `weight` (out, in) is the transpose of `kernel` [in, out]; `bias` is `bias`."""
    weight = Rule(f"{theirs}.weight", f"{ours}/kernel", (1, 0))
    return [weight, Rule(f"{theirs}.bias", f"{ours}/bias")] if bias else [weight]


def load(
    table: Sequence[Rule],
    skeleton: Params,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: Any = None,
    ignore: Collection[str] = (),
) -> Params:
    """Parameters from released tensors.

    Args:
      table: the model's rules; rules for parameters that `skeleton` lacks are skipped.
      skeleton: parameters or their shapes, as `jax.eval_shape` of `init` returns them.
      tensors: released tensors by name.
      dtype: dtype of the result; the tensors' own by default.
      ignore: names of tensors that may be there and are not read.

    Returns:
      Host arrays in the skeleton's structure, for `jax.device_put` to place.

    Raises:
      ValueError: a tensor is missing, not expected, or of another shape than expected; the message names it.
    """
    leaves = traverse_util.flatten_dict(skeleton, sep="/")
    rules = _rules(table, leaves)
    _check_names({name for path, rule in rules.items() for name in rule.names(leaves[path].shape)}, tensors, ignore)
    params = {path: _load_leaf(rule, leaves[path].shape, tensors, dtype) for path, rule in rules.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def export(table: Sequence[Rule], params: Params) -> dict[str, np.ndarray]:
    """Released tensors from parameters, the inverse of `load`: contiguous host arrays by name, in the params' dtype."""
    leaves = traverse_util.flatten_dict(params, sep="/")
    tensors: dict[str, np.ndarray] = {}
    for path, rule in _rules(table, leaves).items():
        array = np.asarray(leaves[path])
        rows = array if rule.stacked else [array]
        tensors |= {n: np.ascontiguousarray(rule.to_theirs(row)) for n, row in zip(rule.names(array.shape), rows)}
    return tensors


def _rules(table: Sequence[Rule], leaves: Mapping[str, Any]) -> dict[str, Rule]:
    rules = {rule.ours: rule for rule in table if rule.ours in leaves}
    if uncovered := sorted(leaves.keys() - rules.keys()):
        raise ValueError(f"no rule for {_listed(uncovered)}: add one to the model's table")
    return rules


def _check_names(expected: set[str], tensors: Mapping[str, Any], ignore: Collection[str]) -> None:
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"missing tensors: {_listed(missing)}; the config expects {len(expected)} in all")
    if extra := sorted(tensors.keys() - expected - set(ignore)):
        raise ValueError(f"unexpected tensors: {_listed(extra)}; the config expects {len(expected)} in all")


def _load_leaf(rule: Rule, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray], dtype: Any) -> np.ndarray:
    # One row at a time into the result, so that a large model is never held twice.
    leaf = np.empty(shape, dtype or np.float32)
    for i, name in enumerate(rule.names(shape)):
        tensor = rule.to_ours(_checked(name, tensors[name], rule, shape[1:] if rule.stacked else shape))
        if i == 0 and dtype is None:
            leaf = np.empty(shape, tensor.dtype)
        leaf[i if rule.stacked else ...] = tensor
    return leaf


def _checked(name: str, tensor: np.ndarray, rule: Rule, ours: tuple[int, ...]) -> np.ndarray:
    expected = rule.to_theirs(np.broadcast_to(0, ours)).shape
    if tensor.shape != expected:
        raise ValueError(f"tensor {name} has shape {tensor.shape}, and the config expects {expected}")
    return tensor


def _listed(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class _SafetensorsFiles(Mapping):
    """Tensors of one or more safetensors files, each read when it is asked for."""

    def __init__(self, files: Mapping[str, Path]):
        self._files = files
        self._handles = {file: safe_open(file, framework="numpy") for file in set(files.values())}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._handles[self._files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_safetensors(path: str | os.PathLike) -> Mapping[str, np.ndarray]:
    """Tensors by name, each read when it is asked for.

    `path` is a .safetensors file, an index of shards (.safetensors.index.json), or a folder that holds exactly one of
    these. bf16 tensors come as ml_dtypes.bfloat16. Raises ValueError when a folder holds none or several.
    """
    path = Path(path)
    file = _only_weights(path) if path.is_dir() else path
    if file.suffix == ".json":
        return _SafetensorsFiles({name: file.parent / shard for name, shard in _shards(file).items()})
    with safe_open(file, framework="numpy") as tensors:
        return _SafetensorsFiles(dict.fromkeys(tensors.keys(), file))


def _only_weights(folder: Path) -> Path:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    shards = {shard for index in indices for shard in _shards(index).values()}
    found = indices + [file for file in sorted(folder.glob("*.safetensors")) if file.name not in shards]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{folder} must hold one .safetensors file or index, found {names}: give the path of one")
    return found[0]


def _shards(index: Path) -> dict[str, str]:
    return json.loads(index.read_text())["weight_map"]


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to one file, whole or not at all. `metadata` defaults to {"format": "pt"}, as readers expect."""
    partial = _partial(path)
    save_file(dict(tensors), partial, metadata=dict(metadata or {"format": "pt"}))
    os.replace(partial, path)


def read_config(folder: str | os.PathLike, expected: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model folder. Raises ValueError when a field is absent or differs from what `expected` says."""
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    for field, value in expected.items():
        if config.get(field) != value:
            raise ValueError(f"{file} has {field}={config.get(field)!r}, and this model needs {value!r}")
    return config


def known_fields(config_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a released config that are fields of our dataclass, lists as tuples."""
    names = [field.name for field in fields(config_class) if field.name in config]
    return {name: tuple(config[name]) if isinstance(config[name], list) else config[name] for name in names}


def write_config(folder: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes config.json into the folder, which is made if need be; whole or not at all."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / "config.json"
    partial = _partial(file)
    Path(partial).write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, file)


def _partial(path: str | os.PathLike) -> str:
    return f"{os.fspath(path)}.partial"
