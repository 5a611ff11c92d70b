"""Requests to several servers that may be slow, busy, restarted or gone."""

import collections
import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds that a server is left alone after its first, and after many failures
PASSING = {408, 425, 429}  # statuses below 500 that say "later"


class Unavailable(Exception):
    """A server did not answer, or not now; another one may, or the same one later."""

    def __init__(self, message: str, retry_after: float = 0.0, body: bytes = b""):
        super().__init__(message)
        self.retry_after, self.body = retry_after, body


class Rejected(ValueError):
    """A server refused a request, and would again."""


def fetch(url: str, headers: Mapping[str, str], timeout: float, body: bytes | None = None) -> bytes:
    """The answer to a POST of `body`, or without one to a GET; `http_proxy` and `no_proxy` are heeded.

    Raises:
        Unavailable: no connection, no answer within `timeout` seconds, or one of status 408, 425, 429 or 5xx.
        Rejected: any other status that is no success.
    """
    request = urllib.request.Request(url, body, dict(headers))
    try:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise _failure(url, error) from None
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(str(getattr(error, "reason", "")) or repr(error)) from None


def _failure(url: str, error: urllib.error.HTTPError) -> Unavailable | Rejected:
    said = error.read()
    message = f"{error.code} {error.reason}: {said[:500].decode(errors='replace')}"
    if error.code < 500 and error.code not in PASSING:
        return Rejected(f"{url} answered {message}")
    after = error.headers.get("Retry-After") or ""
    return Unavailable(message, float(after) if after.isdecimal() else 0.0, said)


@dataclass
class _Server:
    url: str
    failures: int = 0  # since its last answer
    failed_at: float = 0.0
    ready_at: float = 0.0
    error: str = "was not asked"


@dataclass
class _Call:
    items: Sequence[Any]
    pending: collections.deque[int]
    results: dict[int, Any] = field(default_factory=dict)
    failures: collections.Counter[tuple[int, str]] = field(default_factory=collections.Counter)  # by item and server
    error: Exception | None = None

    def is_over(self) -> bool:
        return self.error is not None or len(self.results) == len(self.items)


class Servers:
    """Servers that can do the same work, and what is known of their health.

    Work goes to whichever server is free, `in_flight` requests at most to each. One that fails is left alone for 0.5 s,
    then 1, 2, 4, 8 and 10 s, or for as long as it asks, until it answers; what it failed at goes to another one.
    """

    def __init__(self, urls: Sequence[str], tries: int, in_flight: int):
        """`urls` start with http:// or https://; `tries` and `in_flight` are positive."""
        if isinstance(urls, str) or not urls:
            raise ValueError(f"urls={urls!r}: give a list of servers, such as ['http://10.0.0.2:8100']")
        for url in urls:
            if not str(url).startswith(("http://", "https://")):
                raise ValueError(f"urls: {url!r} is no address; write http://host:port")
        if tries < 1 or in_flight < 1:
            raise ValueError(f"tries={tries} and in_flight={in_flight} must be at least 1")
        self.servers = [_Server(str(url).rstrip("/")) for url in urls]
        self.tries, self.in_flight = tries, in_flight
        self._changed = threading.Condition()

    def map(self, send: Callable[[str, Item], Result], items: Sequence[Item]) -> list[Result]:
        """`send(url, item)` of every item, in the items' order, each at one of the servers.

        Raises:
            ConnectionError: every server failed `tries` times, in a row or at the same item, by raising Unavailable;
                the message has each server's last error.
            Exception: the first other one that `send` raised.
        """
        call = _Call(items, collections.deque(range(len(items))))
        for server in self.servers:
            for _ in range(min(self.in_flight, len(items))):
                threading.Thread(target=self._work, args=(server, call, send), daemon=True).start()
        with self._changed:
            self._changed.wait_for(call.is_over)
        if call.error is not None:
            raise call.error
        return [call.results[i] for i in range(len(items))]

    def _work(self, server: _Server, call: _Call, send: Callable) -> None:
        while (index := self._next(server, call)) is not None:
            started = time.monotonic()
            try:
                result = send(server.url, call.items[index])
            except Exception as error:
                self._failed(server, call, index, started, error)
            else:
                self._done(server, call, index, result)

    def _next(self, server: _Server, call: _Call) -> int | None:
        with self._changed:
            while not call.is_over():
                wait = server.ready_at - time.monotonic()
                if wait <= 0 and call.pending:
                    return call.pending.popleft()
                self._changed.wait(wait if wait > 0 else None)
        return None

    def _done(self, server: _Server, call: _Call, index: int, result: Any) -> None:
        with self._changed:
            server.failures, server.ready_at = 0, 0.0
            call.results[index] = result
            self._changed.notify_all()

    def _failed(self, server: _Server, call: _Call, index: int, started: float, error: Exception) -> None:
        with self._changed:
            if isinstance(error, Unavailable):
                self._leave_alone(server, started, error)
                call.failures[index, server.url] += 1
                call.pending.appendleft(index)
                if self._is_hopeless(call, index):
                    call.error = ConnectionError(self._last_errors())
            else:
                call.error = error
            self._changed.notify_all()

    def _leave_alone(self, server: _Server, started: float, error: Unavailable) -> None:
        server.error = str(error)
        if started >= server.failed_at:  # otherwise the same outage, met by another request
            delay = min(FIRST_DELAY * 2.0 ** min(server.failures, 30), LONGEST_DELAY)
            server.failures += 1
            server.failed_at = time.monotonic()
            server.ready_at = server.failed_at + max(delay, error.retry_after)

    def _is_hopeless(self, call: _Call, index: int) -> bool:
        at_all = all(server.failures >= self.tries for server in self.servers)
        return at_all or all(call.failures[index, server.url] >= self.tries for server in self.servers)

    def _last_errors(self) -> str:
        said = "; ".join(f"{server.url}: {server.error}" for server in self.servers)
        return f"no server answered in {self.tries} tries each. The last errors: {said}"
