"""A transformer's weights: folders in diffusers' layout, Orbax checkpoints of our own, and an original single file."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mixgrpo_jax.models.io import orbax_io, weights
from mixgrpo_jax.models.io.safetensors_io import SHARD_SIZE, Progress
from mixgrpo_jax.models.io.weights import Params, Rule

FILE_STEM = "diffusion_pytorch_model"
CHECKPOINT = "orbax"


class Release(Protocol):
    """A module that reads the single file in which a model was first released."""

    def table(self, config: Any) -> Sequence[Rule]:
        """The rules of its tensors."""

    def recognises(self, file: str | os.PathLike) -> bool:
        """Whether the file's tensors have the names of such a release."""

    def read_file(self, file: str | os.PathLike) -> tuple[Any, Mapping[str, np.ndarray]]:
        """The config and the tensors, named as in `table`. Raises ValueError for another model's file."""


def _accept(folder: Path, config: Any, fields: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Transformer:
    """How a model's transformer is stored.

    class_name: diffusers' class, as config.json has it under _class_name.
    config: the dataclass of its sizes, whose fields are named as in config.json.
    init: (config, key) -> fresh parameters.
    table: config -> the rules of the tensors in diffusers' layout.
    fields: what config.json says besides the sizes.
    check: (folder, config, config.json's fields) -> None; raises ValueError for what the model cannot run.
    release: of the original single file, if there is one.
    """

    class_name: str
    config: type
    init: Callable[[Any, jax.Array], Params]
    table: Callable[[Any], Sequence[Rule]]
    fields: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Path, Any, Mapping[str, Any]], None] = _accept
    release: Release | None = None

    def rules(self, config: Any) -> list[Rule]:
        """The rules of its tensors by all their names: those of diffusers, and those of the original release."""
        return [*self.table(config), *(self.release.table(config) if self.release else ())]

    def skeleton(self, config: Any) -> Params:
        """Shapes of the parameters."""
        return _skeleton(self.init, config)

    def open_source(self, path: str | os.PathLike, dtype: Any = None) -> "Source":
        """Opens a transformer: everything is checked, and no data are read yet.

        `path` is a folder that diffusers saved, one that `save_checkpoint` wrote, or the original single file. The
        parameters come in `dtype`, or else as stored. Raises ValueError for anything else, an unsupported config, or
        tensors that do not fit the config.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f"there is no {path}: give a transformer's folder, or an original .safetensors file")
        if path.is_file():
            config, tensors = self._release(path).read_file(path)
            table = self._release(path).table(config)
            params = weights.lazy_load(table, self.skeleton(config), tensors, dtype=dtype)
            return Source(self, config, self._fields(config), params)
        config, fields = self._read_config(path)
        if (path / CHECKPOINT).is_dir():
            params = orbax_io.lazy_restore(path / CHECKPOINT, dtype=dtype)
            weights.check_shapes(self.skeleton(config), params, str(path / CHECKPOINT))
            params = weights.reordered(self.table(config), params, weights.halves)
            return Source(self, config, fields, params, path / CHECKPOINT)
        tensors = weights.read_safetensors(path)
        params = weights.lazy_load(self.table(config), self.skeleton(config), tensors, dtype=dtype)
        return Source(self, config, fields, params)

    def read_config(self, path: str | os.PathLike) -> Any:
        """The sizes of what `open_source` opens, without its tensors. Raises ValueError as it does."""
        path = Path(path)
        return self._release(path).read_file(path)[0] if path.is_file() else self._read_config(path)[0]

    def load_folder(
        self, path: str | os.PathLike, dtype: Any = None, shardings: Callable[[Params], Any] | None = None
    ) -> tuple[Any, Params]:
        """Reads what `open_source` opens.

        Args:
          path: a folder as diffusers saves it or as `mixgrpo_jax.convert` writes it, or the original single file.
          dtype: of the parameters; the files' own by default.
          shardings: shapes of the parameters -> their shardings. Each process then reads what its devices hold.

        Returns:
          The config and the parameters, on the host or as sharded.

        Raises:
          ValueError: another model, an unsupported config, or tensors that do not fit the config.
        """
        source = self.open_source(path, dtype)
        places = None if shardings is None else shardings(self.skeleton(source.config))
        if source.checkpoint is None or places is None:
            return source.config, weights.place(source.params, places)

        def struct(leaf, sharding):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        params = orbax_io.restore(source.checkpoint, jax.tree.map(struct, source.params, places))
        return source.config, weights.reordered(self.table(source.config), params, weights.halves)

    def save_folder(
        self,
        folder: str | os.PathLike,
        config: Any,
        params: Params,
        *,
        fields: Mapping[str, Any] | None = None,
        shard_size: int = SHARD_SIZE,
        progress: Progress = lambda num_bytes: None,
    ) -> None:
        """Writes a folder that `load_folder` and diffusers' from_pretrained open.

        Args:
          folder: where to; it is made if need be.
          config: sizes of `params`.
          params: arrays, or `weights.Lazy`, of which one block's tensor is held at a time.
          fields: config.json's; made from `config` by default.
          shard_size: bytes above which the tensors are cut into several files with an index.
          progress: called with the bytes of each tensor that was written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = weights.lazy_export(self.table(config), params)
        weights.write_shards(folder, FILE_STEM, tensors, shard_size=shard_size, progress=progress)
        weights.write_config(folder, self._fields(config) if fields is None else fields)

    def save_checkpoint(
        self,
        folder: str | os.PathLike,
        config: Any,
        params: Params,
        *,
        fields: Mapping[str, Any] | None = None,
        progress: Progress = lambda num_bytes: None,
    ) -> None:
        """As `save_folder`, with an Orbax checkpoint of our parameters: `Lazy`, of which one is held at a time.

        The channels of heads are in the release's order there, so that no file depends on how rotary positions turn.
        """
        params = weights.reordered(self.table(config), params, weights.neighbours)
        orbax_io.save(Path(folder) / CHECKPOINT, params, progress)
        weights.write_config(folder, self._fields(config) if fields is None else fields)

    def _read_config(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        fields = weights.read_config(folder, {"_class_name": self.class_name})
        config = weights.sized(self.config, folder, fields)
        self.check(folder, config, fields)
        return config, fields

    def _fields(self, config: Any) -> dict[str, Any]:
        return {"_class_name": self.class_name, **self.fields, **dataclasses.asdict(config)}

    def _release(self, file: Path) -> Release:
        if self.release is None:
            raise ValueError(f"{file} is a file: a {self.class_name} is opened by the folder that holds config.json")
        return self.release


class Source(NamedTuple):
    """A transformer that can be read: config.json's fields as found, and parameters as a tree of `weights.Lazy`.

    `checkpoint` is the folder of an Orbax checkpoint that holds them, None where they are in safetensors.
    """

    transformer: Transformer
    config: Any
    fields: dict[str, Any]
    params: Params
    checkpoint: Path | None = None


@functools.cache
def _skeleton(init: Callable[[Any, jax.Array], Params], config: Any) -> Params:
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))
