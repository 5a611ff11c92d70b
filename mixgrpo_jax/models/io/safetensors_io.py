"""Safetensors files, one or in shards: headers are checked when opened, data are read and written tensor by tensor.

A file is the header's length (8 bytes, little-endian), the header (JSON: dtype, shape and offsets of each tensor by
name), and the data, without gaps. Pickled weights are never opened: they can run code.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD_SIZE = 10_000_000_000  # bytes, as diffusers cuts
VARIANTS = ("", "fp32", "bf16", "fp16")  # in the order in which they are taken
_VARIANT, _SHARD = r"(?:\.(fp32|bf16|fp16))?", r"(?:-\d+-of-\d+)?"
_STORED = re.compile(rf"(.+?){_SHARD}{_VARIANT}{_SHARD}\.safetensors(?:\.index{_VARIANT}\.json)?")

Progress = Callable[[int], Any]


class Tensor(Protocol):
    """What is written: an array, or what gives one when indexed by ()."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> Any: ...  # noqa: D102

    def __getitem__(self, index: Any) -> Any: ...


class _Entry(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class _Tensors(Mapping):
    """Tensors by name, each mapped from its file while it is in use: pages are read where it is indexed."""

    def __init__(self, entries: Mapping[str, _Entry]):
        self._entries = entries

    def __getitem__(self, name: str) -> np.ndarray:
        file, dtype, shape, offset = self._entries[name]
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", offset, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_safetensors(path: str | os.PathLike, prefix: str = "") -> Mapping[str, np.ndarray]:
    """Tensors by name, each read where it is indexed; all headers are read and checked first.

    `path` is a .safetensors file, an index of shards (.safetensors.index.json), or a folder that holds exactly one of
    these; beside it, variants in another precision may lie, or one in its place, see `preferred`. With a prefix, only
    the tensors whose names have it, and without it. bf16 tensors come as ml_dtypes.bfloat16.

    Raises:
      ValueError: a folder holds none or several of these, or pickled weights only; a file is missing, cut short, or not
        what its header or index says. The message names the file.
    """
    path = Path(path)
    file = _only_weights(path) if path.is_dir() else path
    if file.suffix in PICKLED:
        raise ValueError(_pickled(file))
    entries = _read_index(file) if file.suffix == ".json" else _read_header(file)
    return _Tensors({name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)})


def _only_weights(folder: Path) -> Path:
    kept = [folder / name for name in preferred(sorted(file.name for file in folder.glob("*.safetensors*")))]
    indices = [file for file in kept if file.suffix == ".json"]
    shards = {shard for index in indices for shard in _shards(index).values()}
    found = indices + [file for file in kept if file.suffix == ".safetensors" and file.name not in shards]
    if not found and (pickled := [file for file in sorted(folder.iterdir()) if file.suffix in PICKLED]):
        raise ValueError(_pickled(pickled[0]))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{folder} must hold one .safetensors file or index, found {names}: give the path of one")
    return found[0]


def preferred(names: Sequence[str]) -> list[str]:
    """The names of weights' files without those of variants that need not be read.

    Of a model in several precisions, the files without a variant's name are taken, or else those of fp32, bf16 or fp16.

    >>> preferred(["vae.fp16.safetensors", "vae.safetensors", "t5.fp16-00001-of-00002.safetensors"])
    ['vae.safetensors', 't5.fp16-00001-of-00002.safetensors']
    """
    stored = {name: found for name in names if (found := _STORED.fullmatch(name))}
    rank = {name: VARIANTS.index(found[2] or found[3] or "") for name, found in stored.items()}
    best = {found[1]: min(rank[n] for n in stored if stored[n][1] == found[1]) for found in stored.values()}
    return [name for name in stored if rank[name] == best[stored[name][1]]]


def _pickled(file: Path) -> str:
    return (
        f"{file} is pickled, and opening it could run any code: it is not read. Take the model's .safetensors, or save "
        "it anew with save_pretrained(..., safe_serialization=True)"
    )


def _shards(index: Path) -> dict[str, str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index} has no weight_map of its tensors' files: download it again")
    return shards


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError, which names the file, where it holds no such thing."""
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): mend it, or fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__} and no object of fields: mend it, or fetch it again")
    return value


def _read_index(index: Path) -> dict[str, _Entry]:
    shards = _shards(index)
    entries: dict[str, _Entry] = {}
    for shard in sorted(set(shards.values())):
        if not (file := index.parent / shard).is_file():
            raise ValueError(f"{index} names {shard}, which is not there: download the folder again")
        entries |= _read_header(file)
    if absent := sorted(shards.keys() - entries.keys()):
        raise ValueError(f"{index} says that {shards[absent[0]]} holds {absent[0]}, which it does not")
    return {name: entries[name] for name in shards}


def _read_header(file: Path) -> dict[str, _Entry]:
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give the path of a .safetensors file")
    size = file.stat().st_size
    with open(file, "rb") as opened:
        data = 8 + int.from_bytes(opened.read(8), "little")
        if not 8 < data <= size:
            raise ValueError(f"{file} ({size} bytes) is cut short or no safetensors file: download it again")
        try:
            header = json.loads(opened.read(data - 8))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON ({error})") from None
    header.pop("__metadata__", None)
    ends = [data]
    entries = {}
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        entry = entries[name] = _entry(file, name, fields, data)
        if entry.offset != ends[-1] or data + fields["data_offsets"][1] != entry.offset + _num_bytes(entry):
            raise ValueError(f"{file}: the header gives {name} other bytes than its shape needs: download it again")
        ends.append(entry.offset + _num_bytes(entry))
    if size != ends[-1]:
        raise ValueError(f"{file} has {size} bytes, and its header says {ends[-1]}: download it again")
    return entries


def _entry(file: Path, name: str, fields: Mapping[str, Any], data: int) -> _Entry:
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"{file}: {name} is {fields['dtype']}, which is not supported: use weights in bf16 or fp32")
    return _Entry(file, DTYPES[fields["dtype"]], tuple(fields["shape"]), data + fields["data_offsets"][0])


def _num_bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Progress = lambda num_bytes: None,
) -> None:
    """Writes tensors to one file, whole or not at all, holding one tensor in memory at a time.

    `metadata` defaults to {"format": "pt"}, as readers expect; `progress` is called with the bytes of each tensor.
    Raises ValueError for a dtype that the format lacks.
    """
    # Wider dtypes come first, so that all tensors are aligned.
    names = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        if np.dtype(tensor.dtype) not in NAMES:
            raise ValueError(f"tensor {name} is {tensor.dtype}, which a safetensors file cannot hold")
        end += _num_bytes(tensor)
        entry = {"dtype": NAMES[np.dtype(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = entry
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            # Bytes, since bf16 arrays have no buffer protocol.
            file.write(np.ascontiguousarray(tensors[name][()]).reshape(-1).view(np.uint8).data)
            progress(_num_bytes(tensors[name]))
    os.replace(partial, path)


def write_shards(
    folder: str | os.PathLike,
    stem: str,
    tensors: Mapping[str, Tensor],
    *,
    shard_size: int = SHARD_SIZE,
    progress: Progress = lambda num_bytes: None,
) -> None:
    """Writes `stem`.safetensors, or shards of at most `shard_size` bytes and, last of all, their index.

    A tensor that is larger than a shard has one of its own.
    """
    folder = Path(folder)
    shards: list[dict[str, Tensor]] = [{}]
    total = room = 0
    for name, tensor in tensors.items():
        size = _num_bytes(tensor)
        if room + size > shard_size and shards[-1]:
            shards.append({})
            room = 0
        shards[-1][name] = tensor
        total, room = total + size, room + size
    if len(shards) == 1:
        return write_safetensors(folder / f"{stem}.safetensors", tensors, progress=progress)
    files = [f"{stem}-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        write_safetensors(folder / file, shard, progress=progress)
    weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / f"{stem}.safetensors.index.json").write_text(index + "\n")
