"""Files of a workdir: written whole or not at all, and locked by one run."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def replaced(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, which takes the place of `path` when the block ends without an error."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(workdir: str | pathlib.Path) -> Iterator[None]:
    """A workdir that no other process has locked. The lock dies with its process, however that ends.

    Raises BlockingIOError, which names the holder. On file systems without locks there is none.
    """
    path = pathlib.Path(workdir) / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise BlockingIOError(
                    f"workdir={str(workdir)!r} is in use by {holder}: wait for its end, or give another"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
