"""Notices to stop: SIGTERM, which comes before a machine is taken away, and Ctrl-C."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from mixgrpo_jax.runtime import distributed

SIGNALS = signal.SIGTERM, signal.SIGINT
POLL = 0.02  # seconds between looks at arrays that are waited for
LOOK = 0.5  # and at what other processes say


class Stopped(SystemExit):
    """A run that was told to stop. The status is 128 + the signal's number, as of a process that it ends.

    `together` says that all of the run's processes stop at this place.
    """

    def __init__(self, number: int, together: bool):
        super().__init__(128 + number)
        self.name, self.together = signal.Signals(number).name, together


class Notice:
    """Whether a run was told to stop. It stops at once, unless it holds what must not be left half done.

    Of several processes, one that is told tells the others, and all stop at the same call of `agree`; outside `wait`,
    a notice lasts until then.
    """

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0
        self._held, self._turn, self._agrees = 0, 0, False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Take SIGTERM and Ctrl-C for notices; a second Ctrl-C is an ordinary one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: Any) -> None:
        del frame
        if self.number:
            return
        self.number, self.since = number, time.monotonic()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._held and not self._agrees:
            raise Stopped(number, together=False)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A notice in this block is taken where it ends."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.number and not self._held and not self._agrees:
            raise Stopped(self.number, together=False)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A block in which several processes stop together."""
        self._agrees = jax.process_count() > 1
        try:
            yield
        finally:
            self._agrees = False

    def wait(self, tree: Any) -> None:
        """Return when arrays are ready. A notice, to any process, ends it."""
        leaves, looked = jax.tree.leaves(tree), time.monotonic()
        while not all(leaf.is_ready() for leaf in leaves):
            time.sleep(POLL)  # and not inside the runtime, where Python takes no signal
            if self._agrees and time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                self.number = self.number or self._told()
            if self.number:
                self.agree()
        jax.block_until_ready(tree)

    def agree(self) -> None:
        """Raise `Stopped` where this process was told to stop, or another one: all at the same call."""
        number = self.number
        if self._agrees:
            if number:
                distributed.tell(self._key, str(number))
            distributed.meet(self._key)
            number, self._turn = self._told(), self._turn + 1
        if number:
            self.number, self.since = number, self.since or time.monotonic()
            raise Stopped(number, together=self._agrees)

    @property
    def _key(self) -> str:
        return f"mixgrpo_jax/stop/{self._turn}"

    def _told(self) -> int:
        return int(distributed.told(self._key) or 0)
