"""Several processes as one run: how they find each other, and what lies on one of them and is needed on all."""

import contextlib
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from mixgrpo_jax.runtime import app, progress
from mixgrpo_jax.runtime.mesh import make_mesh

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
FAILED, POLL = "mixgrpo_jax/failed", 1.0  # where a process leaves why it failed; seconds between looks at it
HEARTBEAT = 30  # seconds of silence after which a process that could not say so counts as failed
PATIENCE = 24 * 3600  # seconds for which processes that live are waited for


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """A command among the run's other processes, see `initialize`: when one fails, all end, and say which and why.

    Without it they would wait in a collective for the one that is gone, and it for them as it leaves.
    """
    initialize()
    progress.speaks(jax_distributed.global_state.process_id == 0)
    if not _finds_tpu():  # where its library is installed, it says at length that there is none
        with app.without("TPU|tpu|InitGoogle|Source Location Trace"):
            jax.devices()
    if jax.process_count() == 1:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(done,), daemon=True).start()
    try:
        yield
    except BaseException as error:
        done.set()
        if isinstance(error, SystemExit) and (not error.code or getattr(error, "together", False)):
            raise
        _fail(error)
    finally:
        done.set()


def _client() -> Any:
    """Of the store that JAX's processes share, which has no public name."""
    return jax_distributed.global_state.client


def _watch(done: threading.Event) -> None:
    """End this process when another one has failed."""
    while not done.wait(POLL):
        with contextlib.suppress(Exception):  # nothing is there, or nobody who would have it
            why = _client().key_value_try_get(FAILED)
            if not done.is_set():
                _end(f"process {jax.process_index()} ends: {why}")


def _fail(error: BaseException) -> NoReturn:
    """Tell the other processes, and end; the first to fail is the one that is named."""
    line = app.describe(error)
    what = line or "; ".join("".join(traceback.format_exception_only(error)).split("\n")).strip("; ")
    why = f"process {jax.process_index()} of {jax.process_count()} failed: {what}"
    if not isinstance(error, SystemExit) and (line is None or app.debugs()):
        traceback.print_exception(error)
    try:
        _client().key_value_set(FAILED, why)
    except Exception:  # another one was first, or process 0 is gone
        with contextlib.suppress(Exception):
            why = _client().key_value_try_get(FAILED)
    if is_first():  # the store is here: let the others look at it
        time.sleep(3 * POLL)
    _end(why)


def _end(why: str) -> NoReturn:
    """Leave at once: JAX's own way out waits for the other processes."""
    print(why, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def tell(key: str, value: str) -> None:
    """Leave a value for all of the run's processes."""
    _client().key_value_set(key, value, allow_overwrite=True)


def told(key: str) -> str | None:
    """What a process has left, if one has."""
    with contextlib.suppress(Exception):  # nothing is there
        return _client().key_value_try_get(key)
    return None


def meet(key: str) -> None:
    """Wait for the run's other processes to call this with the same key, once for each key. Devices may be at work."""
    _client().wait_at_barrier(key, timeout_in_ms=PATIENCE * 1000)


def anywhere(here: bool) -> bool:
    """Whether it is so on any of the run's processes, all of which must ask."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(here)).any())


def initialize() -> None:
    """Join the run's other processes where the environment tells of some; must come before JAX sees its devices.

    Told by, in this order: `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` and `JAX_COORDINATOR_ADDRESS` (host:port of process
    0); a step of SLURM or Open MPI with several tasks; a Cloud TPU slice, on GKE or as TPU VMs. Otherwise, and with
    `JAX_NUM_PROCESSES=1`, the process is on its own.

    Raises:
        ValueError: the environment tells half of it; the message names the variable and the remedy.
    """
    told = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    if told.get(COUNT) == "1":
        return
    if COUNT in told or INDEX in told:
        jax.distributed.initialize(**_explicit(told), heartbeat_timeout_seconds=HEARTBEAT)
    elif _scheduled():
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT
        )  # which takes the address from the environment, if it is there
    elif told:
        raise ValueError(f"{ADDRESS}={told[ADDRESS]}, but {_set_or_unset([COUNT, INDEX])}")


def on_loopback(processes: int) -> list[dict[str, str]]:
    """Environment variables by which so many processes on this machine find each other, of each one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [{ADDRESS: address, COUNT: str(processes), INDEX: str(index)} for index in range(processes)]


def _explicit(told: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize`, which reads no more than the address from the environment."""
    if missing := [name for name in (ADDRESS, COUNT, INDEX) if name not in told]:
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in told.items())}, but {_set_or_unset(missing)}")
    for name, form, example in (
        (ADDRESS, r".+:\d+", "10.0.0.1:1234"),
        (COUNT, r"[1-9]\d*", "2"),
        (INDEX, r"\d+", "0"),
    ):
        if not re.fullmatch(form, told[name]):
            raise ValueError(f"{name}={told[name]!r} cannot be read: it should look like {example}")
    count, index = int(told[COUNT]), int(told[INDEX])
    if index >= count:
        raise ValueError(f"{INDEX}={index} with {COUNT}={count}: processes are counted from 0 to {count - 1}")
    return dict(coordinator_address=told[ADDRESS], num_processes=count, process_id=index)


def _set_or_unset(missing: Sequence[str]) -> str:
    return (
        f"{' and '.join(missing)} not set: set them on every process ({ADDRESS}=host:port of process 0, {COUNT}, "
        f"{INDEX} from 0), or unset all for a run of one process"
    )


def _scheduled() -> bool:
    """Whether a scheduler that JAX knows has started this process as one of several."""
    env = os.environ
    if int(env.get("SLURM_NTASKS") or 1) > 1:
        if "SLURM_STEP_NODELIST" not in env:
            raise ValueError(
                f"SLURM_NTASKS={env['SLURM_NTASKS']}, but SLURM_STEP_NODELIST is not set, so that this is one process "
                f"and no step: start it with srun, or set {COUNT}=1 for a run of one process"
            )
        return True
    if int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return True
    if not _finds_tpu():
        return False
    if hosts := env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES"):  # as GKE sets them
        return "," in hosts or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return "TPU_SKIP_MDS_QUERY" not in env  # a TPU VM: its metadata server knows, and one host is welcome too


def _finds_tpu() -> bool:
    """Whether this host has a TPU that is to be used: JAX looks at its import, and then puts it before the CPU."""
    return (getattr(jax.config, "jax_platforms", None) or "").startswith("tpu")


def is_first() -> bool:
    """Whether this is process 0, which alone writes logs and pictures."""
    return jax.process_index() == 0


def gather(array: jax.Array) -> np.ndarray:
    """An array whose rows may lie on several processes, as a host array on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def map_rows(
    score: Callable[[Iterable[tuple]], dict[str, Any]],
    chunks: Sequence[jax.Array | np.ndarray],
    rows: Sequence[np.ndarray],
    *columns: Sequence,
) -> dict[str, Any]:
    """`score` of images that come in chunks, for all B rows on every process, where each scores a part of them.

    Processes wait for each other once, when all have their scores.

    Args:
        score: `(iterable of (images, *columns)) -> {name: tree}`, row by row: a tree's arrays are [rows, ...], and its
            structure and their other axes are the same on every process. An item of several processes is there when
            its images are.
        chunks: images, [b, ...] each. Of an array that is sharded over processes, each takes the rows that it holds;
            one that all hold is dealt out.
        rows: which of the columns' entries each chunk is for, [b] positions each; every entry has one row.
        columns: lists of B entries, the same on every process.

    Returns:
        The trees, with fp32 arrays [B, ...].
    """
    own = [_own_rows(images) for images in chunks]
    index = np.concatenate([of[positions] for of, positions in zip(rows, own)])
    items = (
        (_take(images, positions), *([column[i] for i in of[positions]] for column in columns))
        for images, of, positions in zip(chunks, rows, own)
    )
    with _own_devices():  # for the programs of rewards: other processes have other rows
        scores = score(items)
    held = np.zeros(sum(map(len, rows)), bool)
    held[index] = True

    def spread(own: np.ndarray) -> np.ndarray:
        whole = np.full((len(held), *np.shape(own)[1:]), np.nan, np.float32)
        whole[index] = own
        return whole

    trees = [jax.tree.map(spread, tree) for tree in scores.values()]
    if jax.process_count() > 1:
        by_process, held = multihost_utils.process_allgather((trees, held))  # [N, B, ...], [N, B]
        first = held.argmax(0), np.arange(held.shape[1])  # of the first process that has the row
        trees = jax.tree.map(lambda array: array[first], by_process)
    return dict(zip(scores, trees))


def _own_devices() -> contextlib.AbstractContextManager:
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh({"data": -1}, jax.local_devices()))


def _own_rows(images: jax.Array | np.ndarray) -> np.ndarray:
    """Positions of the rows that this process scores, at least one."""
    if jax.process_count() == 1:
        return np.arange(len(images))
    if _is_spread(images):
        return np.concatenate([np.arange(*rows) for rows in _parts(images)])
    index = np.arange(len(images))[jax.process_index() :: jax.process_count()]
    return index if index.size else np.zeros(1, int)


def _take(images: jax.Array | np.ndarray, positions: np.ndarray) -> jax.Array | np.ndarray:
    """The rows at these positions, which are this process's own."""
    if jax.process_count() == 1:
        return images
    if _is_spread(images):
        return np.concatenate([np.asarray(part) for part in _parts(images).values()])
    return np.asarray(images)[positions]


def _is_spread(images: jax.Array | np.ndarray) -> TypeGuard[jax.Array]:
    return isinstance(images, jax.Array) and not images.is_fully_replicated


def _parts(images: jax.Array) -> dict[tuple[int, int, int], jax.Array]:
    """What this process holds of an array that is sharded by rows, by their range."""
    return {shard.index[0].indices(len(images)): shard.data for shard in images.addressable_shards}
