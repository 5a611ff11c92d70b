"""Tensors from files of torch.save, read without torch, and without running any code that they might hold.

Such a file is a zip archive of a pickle (`data.pkl`) and of raw storages (`data/0`, `data/1`, ...), uncompressed. A
pickle may name any function to be called when it is opened. Here it may only name those that rebuild tensors, which
stand for nothing but a place in the file: all other names end the reading.
"""

import collections
import functools
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mixgrpo_jax.models.io import hub
from mixgrpo_jax.models.io.safetensors_io import PICKLED, read_safetensors

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
STATE_DICT = "state_dict"
LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name and its extra field


class _Storage(NamedTuple):
    dtype: np.dtype
    offset: int  # in the file
    nbytes: int


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers, not bytes
    offset: int
    nbytes: int  # from the first to the last number


class _Tensors(Mapping):
    """Tensors by name, each mapped from the file while it is in use: pages are read where it is indexed."""

    def __init__(self, file: Path, entries: Mapping[str, _Entry]):
        self._file, self._entries = file, entries

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, strides, offset, nbytes = self._entries[name]
        if 0 in shape:
            return np.empty(shape, dtype)
        mapped = np.memmap(self._file, np.uint8, "r", offset, (nbytes,))
        return np.ndarray(shape, dtype, mapped, strides=[stride * dtype.itemsize for stride in strides])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read(path: str | os.PathLike) -> Mapping[str, np.ndarray]:
    """Tensors by name, each read where it is indexed, from a file of torch.save (.pt, .pth, .bin, .ckpt).

    They are the file's, or those of its entry "state_dict" where it has one; what is not a tensor is left out. bf16
    tensors come as ml_dtypes.bfloat16. Nothing in the file is executed.

    Raises:
        ValueError: no such file, one of before torch 1.6 (not a zip archive), cut short, or no checkpoint; one that
            names anything but tensors' parts; or one without tensors. The message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the path of a file that torch.save wrote")
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            content = _Unpickler(path, archive, file).load()
    except zipfile.BadZipFile:
        raise ValueError(_not_a_zip(path)) from None
    except _DAMAGED as error:
        raise ValueError(f"the pickle in {path} is damaged ({error!r}): download it again") from None
    return _Tensors(path, _tensors(path, content))


def read_weights(path: str | os.PathLike, field: str = "weights") -> Mapping[str, np.ndarray]:
    """Tensors by name of a model, lazily: of a safetensors or torch.save file, or of a folder that holds one of them.

    They may be on the hub, see `hub.local`. A folder's safetensors are taken before its pickled weights. Raises
    ValueError as `read` and `read_safetensors` do, for a folder that holds several, and, naming the field, for nothing.
    """
    path = hub.local(path, field, *hub.WEIGHTS)
    if path.is_dir() and not list(path.glob("*.safetensors*")):
        pickled = [file for file in sorted(path.iterdir()) if file.suffix in PICKLED]
        if len(pickled) > 1:
            raise ValueError(f"{path} holds {', '.join(file.name for file in pickled)}: give the path of one")
        path = pickled[0] if pickled else path
    return read(path) if path.suffix in PICKLED else read_safetensors(path)


def _not_a_zip(path: Path) -> str:
    return (
        f"{path} is no zip archive: it is cut short, or was saved before torch 1.6, in a format that cannot be read "
        "without running it. Where it is trusted, save it anew: torch.save(torch.load(path, weights_only=True), new)"
    )


def _tensors(path: Path, content: Any) -> dict[str, _Entry]:
    if isinstance(content, dict) and isinstance(content.get(STATE_DICT), dict):
        content = content[STATE_DICT]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: save a model's state_dict()")
    tensors = {name: entry for name, entry in content.items() if isinstance(entry, _Entry)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name, but {sorted(map(str, content))[:5]}: save a state_dict()")
    return tensors


class _Unpickler(pickle.Unpickler):
    """Reads an archive's pickle, with an `_Entry` for each tensor."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, file: Any):
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a zip archive without a data.pkl: it is no file of torch.save")
        super().__init__(archive.open(pickles[0]), encoding="utf-8")
        self._path, self._archive, self._file = path, archive, file
        self._root = pickles[0].removesuffix("data.pkl")
        self._check_byte_order()

    def _check_byte_order(self) -> None:
        name = f"{self._root}byteorder"
        if name in self._archive.namelist() and (order := self._archive.read(name)) != b"little":
            raise ValueError(f"{self._path} is in byte order {order!r}: save it on a little-endian machine")

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the pickle; raises ValueError for one that is no part of a tensor."""
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) not in _GLOBALS:
            raise ValueError(
                f"{self._path} names {module}.{name}, which is no part of a tensor: it is not read, since it may run "
                "code. Where it is trusted, save only its tensors anew: torch.save(model.state_dict(), new)"
            )
        # A pickle may set attributes of what it is given: of nothing that outlives it.
        return functools.partial(_GLOBALS[module, name])

    def persistent_load(self, pid: Any) -> _Storage:
        """The place of a storage, from ("storage", dtype, key, device, number of elements)."""
        _, name, key, _, count = pid
        dtype = DTYPES[name]
        try:
            member = self._archive.getinfo(f"{self._root}data/{key}")
        except KeyError:
            raise ValueError(f"{self._path} lacks the storage {key}: download it again") from None
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{self._path} is compressed: store its members as torch.save does, uncompressed")
        if count * dtype.itemsize > member.file_size:
            raise ValueError(f"{self._path}: storage {key} has {member.file_size} bytes for {count} numbers of {dtype}")
        return _Storage(dtype, self._data_offset(member), member.file_size)

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        """Where a member's data begin; its own header may differ in length from that of the archive's directory."""
        self._file.seek(member.header_offset)
        header = self._file.read(LOCAL_HEADER)
        return member.header_offset + LOCAL_HEADER + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Entry:
    """Stands for torch's function of these arguments, and of more that only autograd needs."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    start, nbytes = offset * storage.dtype.itemsize, (last + 1) * storage.dtype.itemsize
    if min((offset, *shape, *strides)) < 0 or (0 not in shape and start + nbytes > storage.nbytes):
        raise ValueError(f"a tensor of shape {shape} and strides {strides} at {offset} leaves its storage")
    return _Entry(storage.dtype, tuple(shape), tuple(strides), storage.offset + start, nbytes)


def _typed_tensor(storage: _Storage, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str, *_: Any):
    return _tensor(storage._replace(dtype=DTYPES[dtype]), offset, shape, strides)


def _parameter(tensor: _Entry, *_: Any) -> _Entry:
    return tensor


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
# What reading a pickle that is not well-formed may raise.
_DAMAGED = (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError)
