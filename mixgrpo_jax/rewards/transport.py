"""Requests to several servers that may be slow, busy, restarted or gone."""

import collections
import contextlib
import functools
import http.client
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mixgrpo_jax.rewards.contract import Missing

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds that a server is left alone after its first, and after many failures
LONGEST_ANSWER = 16 << 20  # bytes; scores and what chat models say are thousands of times shorter
PASSING = {408, 425, 429, 502, 503, 504}  # statuses that say "later", or that nobody is there


class Unavailable(Exception):
    """A server did not answer, or not now; another one may, or the same one later.

    `away` says that the server may not be there at all; otherwise it is, and failed at this request.
    """

    def __init__(self, message: str, retry_after: float = 0.0, body: bytes = b"", away: bool = True):
        super().__init__(message)
        self.retry_after, self.body, self.away = retry_after, body, away


class Rejected(ValueError):
    """A server refused a request, and would again."""


class _Sockets:
    """The sockets of a request, by which another thread ends it."""

    def __init__(self) -> None:
        self._open: list[socket.socket] = []
        self._is_cut = False

    def connection(self, kind: Callable[..., Any], host: str, **options: Any) -> Any:
        """A connection that leaves its socket here."""
        made = kind(host, **options)
        connect = made.connect

        def keep() -> None:
            connect()
            self._open.append(made.sock)
            if self._is_cut:
                self.cut()

        made.connect = keep
        return made

    def keeping(self, handler: Any) -> Any:
        """The handler of urllib, which leaves the sockets that it opens here."""
        open_, handler.do_open = (
            handler.do_open,
            lambda kind, *args, **options: open_(functools.partial(self.connection, kind), *args, **options),
        )
        return handler

    def cut(self) -> None:
        """End the request, wherever it is."""
        self._is_cut = True
        for each in self._open:
            with contextlib.suppress(OSError):  # it was closed
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # under TLS too, which would say goodbye first


class _Here(urllib.request.HTTPRedirectHandler):
    """No redirection is followed: it would take the token elsewhere, and leave the body behind."""

    def redirect_request(self, *args: Any) -> None:
        return None


def fetch(url: str, headers: Mapping[str, str], timeout: float, body: bytes | None = None) -> bytes:
    """The answer to a POST of `body`, or without one to a GET; `http_proxy` and `no_proxy` are heeded.

    Raises:
        Unavailable: no connection, no whole answer within `timeout` seconds, or one of status 408, 425, 429 or 5xx.
        Rejected: any other status that is no success, or an answer of more than LONGEST_ANSWER bytes.
    """
    sockets, answer = _Sockets(), Future[bytes]()

    def work() -> None:  # a socket's timeout starts again with each byte, and a name's look-up has none
        try:
            answer.set_result(_fetch(url, headers, timeout, body, sockets))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout)
    except TimeoutError:
        sockets.cut()
        raise Unavailable(f"no whole answer within {timeout:g} s{_proxy(url)}") from None


def _fetch(url: str, headers: Mapping[str, str], timeout: float, body: bytes | None, sockets: _Sockets) -> bytes:
    request = urllib.request.Request(url, body, dict(headers))
    handlers = sockets.keeping(urllib.request.HTTPHandler()), sockets.keeping(urllib.request.HTTPSHandler())
    opener = urllib.request.build_opener(*handlers, _Here())
    try:
        try:
            with opener.open(request, timeout=timeout) as answer:
                return _read(url, answer)
        except urllib.error.HTTPError as error:
            raise _failure(url, error, timeout) from None
    except (OSError, http.client.HTTPException) as error:
        said = str(getattr(error, "reason", "")) or repr(error)
        raise Unavailable(said + _proxy(url)) from None


def _read(url: str, answer: http.client.HTTPResponse) -> bytes:
    said = bytearray()
    while piece := answer.read(1 << 16):
        said += piece
        if len(said) > LONGEST_ANSWER:
            raise Rejected(f"{url} answered with more than {LONGEST_ANSWER} bytes: it is no server of scores")
    if answer.length:
        raise http.client.IncompleteRead(bytes(said[:100]), answer.length)
    return bytes(said)


def _failure(url: str, error: urllib.error.HTTPError, timeout: float) -> Unavailable | Rejected:
    said = error.read(1 << 16)
    message = f"{error.code} {error.reason}: {said[:500].decode(errors='replace')}{_proxy(url)}"
    if 300 <= error.code < 400:
        to = error.headers.get("Location", "")
        return Rejected(f"{url} answered {error.code}, go to {to[:200]!r}: write the address that answers itself")
    if error.code < 500 and error.code not in PASSING:
        return Rejected(f"{url} answered {message}")
    after = error.headers.get("Retry-After") or ""
    wait = min(float(after), timeout) if after.isdecimal() else 0.0
    return Unavailable(message, wait, said, away=error.code in PASSING)


def _proxy(url: str) -> str:
    """Which proxy stands between, and how to do without; "" if there is none."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    name = proxy.rpartition("@")[2]  # without its password
    return f" (through the proxy {name} of {parts.scheme}_proxy; to do without, set NO_PROXY={parts.hostname})"


@dataclass
class _Server:
    url: str
    failures: int = 0  # since its last answer
    failed_at: float = 0.0
    ready_at: float = 0.0
    error: str = "was not asked"
    away: bool = False  # by its last error


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

    def map(self, send: Callable[[str, Item], Result], items: Sequence[Item]) -> list[Result | Missing]:
        """`send(url, item)` of every item, in the items' order, each at one of the servers.

        `send` raises Unavailable where a server fails. When every server has failed `tries` times at the same item,
        that item is `Missing`, with the last error; when every one has failed `tries` times in a row, so is all that
        is left, with each server's last error. It may come later if a server is away. Another exception that `send`
        raises, the first one, is raised.
        """
        call = _Call(items, collections.deque(range(len(items))))
        with self._changed:
            for server in self.servers:  # each is asked, whatever became of it in an earlier call
                server.failures = min(server.failures, self.tries - 1)
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
                if not (error.away and server.failures):  # of a server that was away before, it is not the item's fault
                    call.failures[index, server.url] += 1
                self._leave_alone(server, started, error)
                if all(call.failures[index, each.url] >= self.tries for each in self.servers):
                    call.results[index] = Missing(f"{self._tried()}: {error}", passing=False)
                else:
                    call.pending.append(index)  # behind the others, which it must not hold up
                if all(each.failures >= self.tries for each in self.servers):
                    self._give_up(call)
            else:
                call.error = error
            self._changed.notify_all()

    def _leave_alone(self, server: _Server, started: float, error: Unavailable) -> None:
        server.error, server.away = str(error), error.away
        if started >= server.failed_at:  # otherwise the same outage, met by another request
            delay = min(FIRST_DELAY * 2.0 ** min(server.failures, 30), LONGEST_DELAY)
            server.failures += 1
            server.failed_at = time.monotonic()
            server.ready_at = server.failed_at + max(delay, error.retry_after)

    def _give_up(self, call: _Call) -> None:
        said = "; ".join(f"{server.url}: {server.error}" for server in self.servers)
        missing = Missing(f"{self._tried()}. The last errors: {said}", any(server.away for server in self.servers))
        call.results = dict.fromkeys(range(len(call.items)), missing) | call.results

    def _tried(self) -> str:
        return f"no server answered in {self.tries} tries each"
