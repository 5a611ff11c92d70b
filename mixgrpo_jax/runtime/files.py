"""Where runs live, in folders or buckets: files are written whole or not at all, and a workdir is one run's.

A bucket holds objects, which appear whole, are never appended to, and have no folders but their names.
"""

import contextlib
import errno
import fcntl
import importlib
import json
import os
import pathlib
import re
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from etils import epath

Path: TypeAlias = pathlib.Path | epath.Path

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
CLIENTS = {"gs": ("gcsfs", "google.cloud.storage", "tensorstore")}  # by scheme, the modules that reach its buckets
LOCK = ".lock"
LEASE = 60.0  # seconds for which a lock in a bucket outlives its process; it is renewed three times as often


def place(where: str | os.PathLike) -> Path:
    """A path in a folder, or by a URL (gs://bucket/runs/flux) in a bucket, where it has the same methods.

    Raises ValueError for a URL of no kind that is known, ImportError where its clients are not installed.
    """
    text = os.fspath(where)
    url = re.match(r"([a-z]\w*):/+", text)  # pathlib makes gs:/ of gs://
    if not url:
        return pathlib.Path(where)
    if url[1] not in CLIENTS:
        known = ", ".join(f"{scheme}://" for scheme in CLIENTS)
        raise ValueError(f"{text!r} is no URL that is known here: give a folder, or a bucket's ({known})")
    try:
        for client in CLIENTS[url[1]]:
            importlib.import_module(client)
    except ImportError as error:
        raise ImportError(f"{text!r} needs the extra gcs ({error}): pip install 'mixgrpo_jax[gcs]'") from None
    import fsspec  # comes with the clients

    # What other clients and processes write is seen at once.
    fsspec.config.conf.setdefault(url[1], {}).setdefault("use_listings_cache", False)
    return epath.Path(f"{url[1]}://{text[url.end() :]}")


def absolute(where: str | os.PathLike) -> Path:
    """As `place`, from the root."""
    path = place(where)
    return path.absolute() if isinstance(path, pathlib.Path) else path


def in_bucket(path: Path) -> bool:
    """Whether a path that `place` gave is in a bucket."""
    return not isinstance(path, pathlib.Path)


def size(path: Path) -> int:
    """Bytes of a file."""
    about: Any = path.stat()
    return about.length if in_bucket(path) else about.st_size


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A file on this machine to write to, which takes the place of `path` when the block ends without an error."""
    path = place(path)
    if not isinstance(path, pathlib.Path):
        with tempfile.TemporaryDirectory() as folder:
            draft = pathlib.Path(folder, path.name)
            yield draft
            _upload(draft, path)
        return
    temporary = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _upload(file: pathlib.Path, path: epath.Path) -> None:
    """Not by epath, with whose files what an error or a signal interrupts becomes an object too."""
    import fsspec

    system, name = fsspec.url_to_fs(os.fspath(path), finalize_on_close=True)  # epath's own client
    system.put_file(str(file), name)


def append(path: str | os.PathLike, line: str) -> None:
    """Add a line to a file."""
    path = place(path)
    if isinstance(path, pathlib.Path):
        with path.open("a") as file:
            file.write(f"{line}\n")
        return
    before = path.read_text() if path.exists() else ""
    with replaced(path) as draft:
        draft.write_text(f"{before}{line}\n")


def upload(folder: pathlib.Path, target: str | os.PathLike, last: str = "") -> None:
    """Copy a folder on this machine into a bucket, the file of this name after all others."""
    for file in sorted(folder.rglob("*"), key=lambda file: (file == folder / last, file)):
        if file.is_file():
            _upload(file, place(target) / file.relative_to(folder).as_posix())


@contextlib.contextmanager
def fetched(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder or file on this machine: that one, or a copy of a bucket's, which stays for the block.

    Raises ValueError where a bucket has nothing there.
    """
    path = place(path)
    if isinstance(path, pathlib.Path):
        yield path
        return
    import fsspec

    system, name = fsspec.url_to_fs(os.fspath(path), finalize_on_close=True)
    if not (objects := system.find(name)):
        raise ValueError(f"there is nothing at {path}")
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, path.name)
        for found in objects:
            file = copy / found.removeprefix(name).lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(found, str(file))
        yield copy


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[Callable[[], None]]:
    """A workdir that no other process has locked; gives a function that raises RuntimeError once the lock is lost.

    In a folder the lock dies with its process, however that ends; on file systems without locks there is none. In a
    bucket it is a lease, which ends `LEASE` seconds after its process died: this waits for that, unless it is renewed.

    Raises BlockingIOError, which names the holder; OSError where the bucket does not let itself be written to.
    """
    path = place(workdir) / LOCK
    if not isinstance(path, pathlib.Path):
        with _Lease(path).held() as check:
            yield check
        return
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise BlockingIOError(_in_use(workdir, holder)) from None
        file.truncate(0)
        file.write(f"{_holder()}\n")
        file.flush()
        yield lambda: None


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _in_use(workdir: Any, holder: str) -> str:
    return f"workdir={str(workdir)!r} is in use by {holder}: wait for its end, or give another"


class _Lease:
    """An object that is made where there is none, and replaced only by who has read it: its generation says so."""

    def __init__(self, path: epath.Path):
        import tensorstore

        self._workdir, self._name = path.parent, path.name
        self._store = tensorstore.KvStore.open(f"{path.parent}/").result()
        self._id, self._generation = uuid.uuid4().hex, b""
        self._ends, self._lost_to = 0.0, ""
        self._done = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        try:
            self._acquire()
        except BlockingIOError:
            raise
        except Exception as error:  # what TensorStore raises has no type of its own
            why = (str(error) or "no answer").splitlines()[0]
            raise OSError(f"workdir={str(self._workdir)!r} cannot be locked: {why}") from error
        thread = threading.Thread(target=self._renew, daemon=True)
        thread.start()
        try:
            yield self._check
        finally:
            self._done.set()
            thread.join()
            with contextlib.suppress(Exception):  # it ends by itself
                self._store.write(self._name, None, if_equal=self._generation).result(timeout=LEASE / 3)

    def _acquire(self) -> None:
        seen = b""
        while True:
            generation, lease = self._read()
            left = lease["until"] - time.time()
            if left <= 0 or lease["id"] == self._id:
                if self._write(generation):
                    return
                continue
            until = time.strftime("%H:%M:%S", time.localtime(lease["until"]))
            if seen and seen != generation:
                raise BlockingIOError(_in_use(self._workdir, f"{lease['holder']}, whose lease now lasts to {until}"))
            if not seen:
                print(
                    f"{self._workdir}: waiting for the end of {lease['holder']}, whose lease lasts to {until}",
                    file=sys.stderr,
                    flush=True,
                )
            seen = generation
            time.sleep(min(left, LEASE / 12))

    def _read(self) -> tuple[bytes, dict[str, Any]]:
        """The generation of what is there, and the lease."""
        found = self._store.read(self._name).result(timeout=LEASE / 3)
        lease = json.loads(found.value) if found.state == "value" else {}
        return found.stamp.generation, {"holder": "nobody", "until": 0.0, "id": ""} | lease

    def _write(self, generation: bytes) -> bool:
        """Put the lease in the place of what has this generation. False where something else is there."""
        begun = time.monotonic()
        lease = {"holder": _holder(), "until": time.time() + LEASE, "id": self._id}
        written = self._store.write(self._name, json.dumps(lease).encode(), if_equal=generation)
        if found := written.result(timeout=LEASE / 3).generation:
            self._generation, self._ends = found, begun + LEASE
        return bool(found)

    def _renew(self) -> None:
        while not self._lost_to and not self._done.wait(LEASE / 3):
            with contextlib.suppress(Exception):  # of the network: there is time left
                if not self._write(self._generation):
                    generation, lease = self._read()
                    if lease["id"] == self._id:  # the answer to a write was lost
                        self._generation = generation
                    else:
                        self._lost_to = lease["holder"]

    def _check(self) -> None:
        if self._lost_to or time.monotonic() > self._ends:
            why = f"to {self._lost_to}" if self._lost_to else "as it could not be renewed"
            raise RuntimeError(
                f"workdir={str(self._workdir)!r}: the lock was lost {why}, and nothing more is written. Start the run "
                "again when no other is in this workdir"
            )
