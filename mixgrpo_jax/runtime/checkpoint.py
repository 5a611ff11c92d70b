"""Save and resume a run: the train state and the host's state, in one Orbax checkpoint."""

import functools
import gc
import json
import logging
import math
import operator
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mixgrpo_jax.runtime.files import Path, absolute

AWAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED")  # in a store's words
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, FileNotFoundError, NotADirectoryError)
SUMS, CHECKSUM = "sums", "checksum"  # of what is saved, in the host's item


class Damaged(ValueError):
    """A checkpoint that is incomplete, or not what was saved."""


class Finished(NamedTuple):
    """What can be saved after an iteration.

    Attributes:
        iteration: how many are finished.
        state: the train state.
        host: a dict that JSON can hold.
        samples: a tree of arrays, what is drawn of the next iteration already.
        sums: of the leaves by path, see `sums`; on their way.
        metrics: of the iteration, by name.
    """

    iteration: int
    state: Any
    host: dict
    samples: Any
    sums: dict[str, jax.Array]
    metrics: Mapping[str, Any]


def finished(
    iteration: int, state: Any, host: dict, samples: Any = None, metrics: Mapping[str, Any] | None = None
) -> Finished:
    """What can be saved. Sums are asked for now, so that a save need not wait for what the devices are given next."""
    tree = {"state": state} | ({} if samples is None else {"samples": samples})
    return Finished(iteration, state, host, samples, sums(tree), metrics or {})


PIECE = 1 << 24  # numbers of a host array that are summed at a time


def host_sum(leaf: np.ndarray) -> int:
    """As `sums`, of one array on the host, where it stays."""
    flat, total = np.ravel(leaf), 0
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for start in range(0, flat.size, PIECE):
            total += int(_piece(flat[start : start + PIECE], np.uint32(start % 2**32)))
    return total % 2**32


def sums(tree: Any) -> dict[str, jax.Array]:
    """A uint32 of each leaf's bits, by path: sum_p h(p, bits_p) mod 2^32 over positions p in the leaf.

    h is a bijection of the bits, so that no change of one element leaves the sum, and a swap does once in 2^32. It does
    not depend on how a leaf is sharded.

    >>> a, b, c = (int(sums(np.array(x, np.float32))[""]) for x in ([1, 2], [2, 1], [1, 2]))
    >>> a == c, a == b
    (True, False)
    """
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return dict(zip(leaves, _sums(list(leaves.values()))))


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(jnp.asarray(leaf)) for leaf in leaves]


@jax.jit
def _piece(flat: jax.Array, first: jax.Array) -> jax.Array:
    return _sum(flat, first)


def _sum(leaf: jax.Array, first: Any = 0) -> jax.Array:
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    bits = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    position = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        position = position * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    position = position + jnp.asarray(first, jnp.uint32)
    x = bits ^ (position * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
    for multiplier, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):  # murmur3's finaliser
        x = (x ^ (x >> (29 - shift))) * np.uint32(multiplier)
        x = x ^ (x >> shift)
    return x.sum(dtype=jnp.uint32)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _checksum(host: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(host, sort_keys=True).encode())


class Checkpoints:
    """The checkpoints of a run, in `workdir`/checkpoints, by the number of finished iterations.

    Saves are asynchronous: `save` returns once the state is copied, and `close` waits for the last one.

    Args:
        workdir: of the run; with `every` of 0 it is only read, and stays as it is.
        every: iterations between saves. The first that is finished is saved too.
        keep: the last so many stay; None keeps all.
        keep_every: and each whose iteration is a multiple of it, if it is not 0.
        best: and the one with the largest of this metric, if it is not "".
        minutes: after which an iteration is saved out of turn, if it is not 0.
        step: the one that is read in place of the newest. Raises ValueError, which names those that are there.

    `before` are called before a checkpoint is written: it is not, where one raises.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        every: int = 0,
        keep: int | None = None,
        keep_every: int = 0,
        best: str = "",
        minutes: float = 0.0,
        step: int | None = None,
    ):
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        policies += [checkpoint_managers.EveryNSteps(keep_every)] if keep_every else []
        policies += [checkpoint_managers.BestN(get_metric_fn=_best, n=1)] if best else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_best if best else None,
            create=every > 0,
        )
        self._every, self._best, self._seconds, self._saved_at = every, best, 60 * minutes, time.monotonic()
        self.before: list[Callable[[], None]] = []
        self.directory: Path = absolute(workdir) / "checkpoints"
        if not every and not self.directory.is_dir():
            self._manager: Any = None
        else:
            _quiet()
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._saving, self._step = 0, step
        there = self._manager.all_steps() if self._manager else ()
        if step is not None and step not in there:
            raise ValueError(f"{self.directory} has no checkpoint of iteration {step}: it holds {_these(there)}")
        self._read: tuple[int | None, dict] = (None, {})  # of the checkpoint whose host state this is

    @property
    def latest(self) -> int | None:
        """Iterations finished at the newest checkpoint, or at the one that is read; None without one."""
        return self._step if self._step is not None else self._manager and self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Iterations finished at each checkpoint."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def save(self, last: Finished, force: bool = False) -> bool:
        """Save what is finished where it is due, or now. True where it was.

        Raises OSError where it could not be written, or the one before it.
        """
        self.check()
        if last.iteration == self.latest or not (force or self._due(last.iteration)):
            return False
        for prepare in self.before:
            prepare()
        host = last.host | {SUMS: {path: int(value) for path, value in jax.device_get(last.sums).items()}}
        host |= {CHECKSUM: _checksum(host)}
        items = dict(state=ocp.args.StandardSave(last.state), host=ocp.args.JsonSave(host))
        if last.samples is not None:
            items["samples"] = ocp.args.StandardSave(last.samples)
        metrics = {"best": float(last.metrics.get(self._best, -math.inf))} if self._best else None
        self.wait()
        self._saving, self._saved_at = last.iteration, time.monotonic()
        with self._writing():
            return self._manager.save(last.iteration, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def _due(self, iteration: int) -> bool:
        late = bool(self._seconds) and time.monotonic() - self._saved_at >= self._seconds
        if self._seconds and jax.process_count() > 1:  # by the first one's clock
            late = bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))
        return self.latest is None or iteration % self._every == 0 or late

    def check(self) -> None:
        """Raise OSError where the last save has failed; one that is under way is not waited for."""
        if not self._manager.is_saving_in_progress():  # `check_for_errors` is empty once the save's own thread looked
            self.wait()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = (str(error) or repr(error)).strip().splitlines()[0]
        else:
            return
        gc.collect()  # what waits to write tells of itself at the program's end, where it can no longer be silenced
        raise OSError(
            f"the checkpoint of iteration {self._saving} could not be written to {self.directory}, which keeps "
            f"{_these(self._manager.all_steps())}: {why}"
        )

    def restore_host(self) -> dict:
        """The host state of the newest checkpoint. Raises `Damaged`."""
        host = self._host
        return {key: value for key, value in host.items() if key not in (SUMS, CHECKSUM)}

    @property
    def _host(self) -> dict:
        if self._read[0] != self.latest:
            self._read = self.latest, self._read_host()
        return self._read[1]

    def _read_host(self) -> dict:
        with self._reading():
            args = ocp.args.Composite(host=ocp.args.JsonRestore())
            host = dict(self._manager.restore(self.latest, args=args)["host"])
        if SUMS in host and host.pop(CHECKSUM, None) != _checksum(host):
            raise Damaged(f"{self.folder} is damaged: its host state is not what was saved")
        return host

    @property
    def sums(self) -> dict[str, int]:
        """Those of the newest checkpoint's leaves by path; of an earlier version's there are none. Raises `Damaged`."""
        return self._host.get(SUMS, {})

    def restore(self, like: Any) -> Any:
        """The newest state, laid out as `like`: a tree of arrays, or of shapes with shardings.

        Raises `Damaged`, or ValueError where another state is stored than is asked for.
        """
        return self._restore("state", like)

    def has_samples(self) -> bool:
        """Whether the newest checkpoint has samples of the next iteration."""
        return (self.folder / "samples").exists() or any(path.startswith("samples/") for path in self.sums)

    def restore_samples(self, like: Any) -> Any:
        """Samples of the newest checkpoint, laid out as `like`; raises as `restore`."""
        return self._restore("samples", like)

    def restore_part(self, path: Sequence[str], like: Any) -> Any:
        """A part of the newest state by its path (its parameters, or an average of them), laid out as `like`.

        It is in the dtypes of `like`, whatever is stored; raises as `restore`.
        """
        return self._restore("state", like, path)

    def _restore(self, item: str, like: Any, within: Sequence[str] | None = None) -> Any:
        prefix = "/".join([item, *(within or ())])
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        stored = self._expect(item, prefix, abstract, whole=within is None)
        # What is stored is checked before it is cast.
        abstract = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.update(dtype=stored[f"{prefix}/{_name(path)}"].dtype), abstract
        )
        for name in reversed(within or ()):
            abstract = {name: abstract}
        restore = ocp.args.StandardRestore(abstract)
        if within is not None:
            places = ocp.checkpoint_utils.construct_restore_args(abstract)
            restore = ocp.args.PyTreeRestore(abstract, restore_args=places, partial_restore=True)
        with self._reading():
            tree = self._manager.restore(self.latest, args=ocp.args.Composite(**{item: restore}))[item]
        tree = functools.reduce(operator.getitem, within or (), tree)
        self.verify({f"{prefix}/{path}": value for path, value in jax.device_get(sums(tree)).items()})
        return jax.tree.map(_cast, tree, like)

    def _expect(self, item: str, prefix: str, abstract: Any, whole: bool) -> dict[str, Any]:
        """The stored leaves by path. Raises ValueError where they are not those that are asked for."""
        with self._reading():
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self.folder / item)).tree
            leaves = jax.tree_util.tree_leaves_with_path({item: tree})
            stored = {_name(path): leaf for path, leaf in leaves if hasattr(leaf, "shape")}
        saved = self.sums
        asked = {f"{prefix}/{_name(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        if saved and stored.keys() != {path for path in saved if path.startswith(f"{item}/")}:
            raise Damaged(f"{self.folder} is damaged: what it holds is not what was saved")
        here = {path for path in stored if path.startswith(f"{prefix}/")}
        where = f"{self.folder} is of another config"
        for what, paths in (("lacks", asked.keys() - here), ("has", here - asked.keys())):
            if paths:
                raise ValueError(f"{where}: it {what} {sorted(paths)[0]} ({len(paths)} such). Take the run's own")
        for path, leaf in asked.items():
            found = stored[path]
            if tuple(found.shape) != leaf.shape or (whole and found.dtype != leaf.dtype):
                raise ValueError(
                    f"{where}: its {path} is {found.dtype} {tuple(found.shape)}, and this config's {leaf.dtype} "
                    f"{leaf.shape}. Take the run's own"
                )
        return stored

    def verify(self, found: Mapping[str, Any]) -> None:
        """Raises `Damaged` where the sums of some leaves of the newest checkpoint are not those that were saved."""
        saved = self.sums
        wrong = [path for path, value in found.items() if saved and saved.get(path) != int(value)]
        if wrong:
            raise Damaged(
                f"{self.folder} is damaged: {wrong[0]} is not what was saved ({len(wrong)} of {len(found)} arrays)"
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            why = (str(error) or repr(error)).strip().splitlines()[0]
            if any(status in str(error) for status in AWAY):
                raise OSError(f"{self.folder} cannot be reached: {why}") from error
            raise Damaged(f"{self.folder} is damaged or incomplete: {why}") from error

    @property
    def folder(self) -> Path:
        """Of the newest checkpoint."""
        return self.directory / str(self.latest)

    def set_aside(self, why: str) -> None:
        """Rename the newest checkpoint, which is damaged, so that the one before it is the newest.

        Raises `Damaged` where there is none.
        """
        aside = self.folder.with_name(f"{self.folder.name}.damaged")
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder.with_name(f"{self.folder.name}.damaged.{number}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        if jax.process_index() == 0:
            self.folder.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("is aside")
        self._manager.reload()
        why = f"{why}. It is set aside as {aside.name}"
        if self.latest is None:
            raise Damaged(
                f"{why}, and there is none before it: put a copy in its place, or begin anew in a new workdir"
            )
        if jax.process_index() == 0:
            print(f"WARNING: {why}, and the run goes on from iteration {self.latest}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Wait for the save under way. Raises OSError where it failed."""
        if self._manager:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save under way, and let go; raises as `wait`."""
        self.wait()
        if self._manager:
            self._manager.close()


def _best(metrics: Mapping[str, float]) -> float:
    return metrics["best"]


def _quiet() -> None:
    """Keep from the terminal what Orbax and TensorStore say in hundreds of lines of a failed save, beside its error."""
    logger = logging.getLogger("absl")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
        before = sys.unraisablehook
        sys.unraisablehook = lambda raised: _echoes(raised.exc_value) or before(raised)


def _is_news(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno < logging.ERROR


def _echoes(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _these(steps: Sequence[int]) -> str:
    return f"those of {', '.join(map(str, sorted(steps)))}" if steps else "none"


def _cast(leaf: jax.Array, like: Any) -> jax.Array:
    if leaf.dtype == like.dtype:
        return leaf
    return jax.jit(lambda leaf: leaf.astype(like.dtype), donate_argnums=0)(leaf)
