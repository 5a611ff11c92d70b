"""Parameters as Orbax checkpoints, written and read leaf by leaf, or straight onto a mesh."""

import functools
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from mixgrpo_jax.models.io.lazy import Lazy

CHUNK = 16 << 20  # bytes of a stored piece: a device's part of a large array is read without the rest
SMALL = 1 << 20  # numbers up to which leaves are read together: each read has its cost


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Saves arrays one after the other, each read when its turn comes."""

    def __init__(self, progress: Callable[[int], Any]):
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress

    async def serialize(self, values: Sequence[Lazy], infos: Any, args: Any = None) -> list:
        for leaf, info, arg in zip(values, infos, args):
            for written in await super().serialize([leaf[()]], [info], [arg]):
                written.result()
            self._progress(leaf.nbytes)
        return []


def save(folder: str | os.PathLike, params: Any, progress: Callable[[int], Any] = lambda num_bytes: None) -> None:
    """Writes a tree of `Lazy` as an Orbax checkpoint, holding one leaf at a time.

    `progress` is called with the bytes of each leaf. `ocp.StandardCheckpointer().restore(folder)` opens the result.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Lazy, _OneByOne(progress)))
    # Weights hardly compress, and a store of many arrays in one (OCDBT) would buffer what it merges.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False, use_ocdbt=False)
    chunks = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=CHUNK), params)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(_absolute(folder), args=ocp.args.PyTreeSave(params, save_args=chunks))


def _absolute(folder: str | os.PathLike) -> Any:
    """From the root, as Orbax asks; a bucket's path is."""
    return Path(folder).absolute() if isinstance(folder, str | Path) else folder


def restore(folder: str | os.PathLike, like: Any) -> Any:
    """Reads those leaves of a checkpoint that `like` has, in its dtypes.

    `like` is a tree of `jax.ShapeDtypeStruct`. A leaf with a sharding goes straight onto its devices, each process
    reading what its own hold; one without comes as a host array.
    """
    restore_args = jax.tree.map(_restore_args, like)
    args = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(_absolute(folder), args=args)


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def stored(folder: str | os.PathLike) -> Any:
    """What a checkpoint holds, as a tree of shapes and dtypes. Raises ValueError for a folder that is no checkpoint."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(_absolute(folder)).item_metadata
    if metadata is None:
        raise ValueError(f"{folder} is no Orbax checkpoint: give a folder that was written whole")
    return metadata.tree


def lazy_restore(folder: str | os.PathLike, within: Sequence[str] = (), dtype: Any = None) -> Any:
    """A tree of `Lazy` over a checkpoint, or over the part of it at the path `within`, in `dtype` or else as stored.

    Of large leaves, the one last indexed stays in memory. Raises ValueError for a folder that is no checkpoint.
    """
    prefix = tuple(within)
    held_there = traverse_util.flatten_dict(functools.reduce(operator.getitem, prefix, stored(folder)))
    structs = {path: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype) for path, leaf in held_there.items()}

    def read(paths):
        tree = traverse_util.unflatten_dict({(*prefix, *path): structs[path] for path in paths})
        return traverse_util.flatten_dict(functools.reduce(operator.getitem, prefix, restore(folder, tree)))

    @functools.cache
    def small():
        return read([path for path, struct in structs.items() if struct.size <= SMALL])

    held: dict[tuple, Any] = {}

    def large(path):
        if path not in held:
            held.clear()  # before the next one is read: the two would be in memory at once
            held[path] = read([path])[path]
        return held[path]

    def lazy_leaf(path, struct):
        whole = functools.partial(large, path) if struct.size > SMALL else lambda: small()[path]
        return Lazy(tuple(struct.shape), np.dtype(struct.dtype), lambda index: whole()[index])

    return traverse_util.unflatten_dict({path: lazy_leaf(path, struct) for path, struct in structs.items()})
