"""What a person sees of a command at work: lines that stay, and a sign of life between them.

On a terminal the sign of life is one line, written over every second. Elsewhere, as in a pod's log, it is a line of its
own, once nothing was said for `SILENCE` seconds. Process 0 alone speaks. Nothing but Python's own is imported, so that
a command can speak before JAX is there.
"""

import atexit
import contextlib
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import mixgrpo_jax

COLUMNS = 100  # that a line should fit
SILENCE, LONG, SLOW = 3.5, 30.0, 180.0  # seconds without a line before a sign of life, of what takes over SLOW: LONG
RANKS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")  # where a process may be counted
HELP = {"-h", "--h", "-help", "--help", "--helpshort"}
ERASE = "\r\x1b[K"
Item = TypeVar("Item")


@dataclass(eq=False)
class _Task:
    what: str
    begun: float = field(default_factory=lambda: time.monotonic())


class _Screen:
    """Standard output, which the command and the thread that gives signs of life share."""

    def __init__(self) -> None:
        self.speaks = all(os.environ.get(name, "") in ("", "0") for name in RANKS)
        self.tasks: list[_Task] = []  # the last is inside the others
        self.compiling: _Task | None = None
        self.lock = threading.RLock()
        self._said, self._shown = time.monotonic(), False
        self._thread, self._ended = threading.Thread(target=self._tick, daemon=True), threading.Event()

    def write(self, text: str) -> None:
        if self.speaks:
            with self.lock, contextlib.suppress(OSError, ValueError):  # a run outlives its terminal
                sys.stdout.write((ERASE if self._shown else "") + text)
                sys.stdout.flush()
                self._said, self._shown = time.monotonic(), False

    def sign(self) -> None:
        """Say what is being done, and for how long it has been."""
        with self.lock:
            if not self.tasks or not self.speaks:
                return
            tasks = [*self.tasks, *filter(None, [self.compiling])]
            took = time.monotonic() - tasks[-1].begun
            text = f"{': '.join(task.what for task in tasks)}, {took:.0f} s"
            if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
                self._shown = True
                self.write(f"{text[: shutil.get_terminal_size().columns - 1]}\r")
                self._shown = True
            elif time.monotonic() - self._said >= (SILENCE if took < SLOW else LONG):
                self.write(f"  {text}\n")

    def watch(self) -> None:
        """Give signs of life from now on."""
        if self._thread.ident is None:
            self._thread.start()
            atexit.register(self._end)

    def _tick(self) -> None:
        while not self._ended.wait(0.5):
            with contextlib.suppress(OSError, ValueError):  # standard output is closed
                self.sign()

    def _end(self) -> None:
        """End the thread before Python does: it could be holding the lock, and what waits for it would never end."""
        self._ended.set()
        self._thread.join()

    def erase(self) -> None:
        if self._shown:
            self.write("")


_screen, _beginning = _Screen(), contextlib.ExitStack()


def begin() -> None:
    """Say that a command has begun; until `ready`, it imports its libraries. Asked for help, it says nothing."""
    if not HELP & set(sys.argv):
        say(f"mixgrpo_jax {mixgrpo_jax.__version__}: {pathlib.Path(sys.argv[0]).stem}")
        _beginning.enter_context(doing("importing JAX and other libraries"))


def ready() -> None:
    """The libraries are imported."""
    _beginning.close()


def speaks(first: bool) -> None:
    """Whether this process is the one that speaks. Before this is called, the environment tells."""
    _screen.speaks = first


def say(text: str) -> None:
    """Write lines that stay."""
    _screen.write(f"{text}\n")


@contextlib.contextmanager
def doing(what: str) -> Iterator[_Task]:
    """Name what a block does, for signs of life; within another, after its name."""
    task = _Task(what)
    _screen.watch()
    with _screen.lock:
        _screen.tasks.append(task)
    try:
        yield task
    finally:
        with _screen.lock:
            _screen.tasks.remove(task)
            _screen.erase()


def over(items: Iterable[Item], what: str, total: int, start: int = 0) -> Iterator[Item]:
    """The items, each while its number is shown: from `start` + 1, of `total`."""
    with doing(what) as task:
        for number, item in enumerate(items, start + 1):
            task.what = f"{what} {number}/{total}"
            yield item


def compiling(program: str | None) -> None:
    """A program begins to be compiled (its name), or is (None)."""
    _screen.compiling = _Task(f"compiling {program}") if program else None
