import collections
import contextlib
import socket
import threading
import time

import pytest

from mixgrpo_jax.rewards import transport
from mixgrpo_jax.rewards.contract import Missing
from mixgrpo_jax.rewards.transport import Rejected, Servers, Unavailable, fetch

A, B = "http://a:1", "http://b:1"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(transport, "LONGEST_DELAY", 0.02)


def test_results_are_in_order_and_each_server_works_on_a_few_at_a_time():
    busy, most, lock = collections.Counter(), collections.Counter(), threading.Lock()

    def send(url, item):
        with lock:
            busy[url] += 1
            most[url] = max(most[url], busy[url])
        time.sleep(0.002 * (item % 3))
        with lock:
            busy[url] -= 1
        return item**2

    assert Servers([A, B], 3, in_flight=2).map(send, range(60)) == [i**2 for i in range(60)]
    assert set(most) == {A, B} and max(most.values()) == 2


def test_what_one_server_fails_at_another_does():
    done = collections.Counter()

    def send(url, item):
        if url == A:
            raise Unavailable("down")
        time.sleep(0.005)
        done[item] += 1
        return item

    assert Servers([A, B], 3, in_flight=2).map(send, range(50)) == list(range(50))
    assert set(done.values()) == {1} and len(done) == 50


def test_a_server_that_comes_back_is_used_again():
    back = time.monotonic() + 0.1
    answered = collections.Counter()

    def send(url, item):
        time.sleep(0.01)
        if url == A and time.monotonic() < back:
            raise Unavailable("down")
        answered[url] += 1
        return item

    servers = Servers([A, B], 3, in_flight=1)
    assert servers.map(send, range(60)) == list(range(60))
    assert answered[A] > 5 and answered[B] > 5


def test_when_all_fail_what_is_left_is_missing_with_what_each_said_last():
    said = collections.Counter()

    def send(url, item):
        if not item:
            return "done"
        said[url] += 1
        raise Unavailable(f"{url[7]} said no for the {said[url]}th time")

    done, *missing = Servers([A, B], tries=3, in_flight=1).map(send, range(9))
    assert done == "done" and len(set(missing)) == 1 and missing[0].passing
    for part in ("in 3 tries each", "http://a:1: a said no for the ", "http://b:1: b said no for the "):
        assert part in missing[0].why
    assert min(said.values()) >= 3


def test_each_server_is_asked_again_in_the_next_call():
    asked = collections.Counter()

    def send(url, item):
        asked[url] += 1
        raise Unavailable("down")

    servers = Servers([A, B], tries=3, in_flight=1)
    servers.map(send, [0])
    before = dict(asked)
    assert isinstance(servers.map(send, [0])[0], Missing)
    assert all(asked[url] > before[url] for url in (A, B))


@pytest.mark.parametrize("away", [False, True])
def test_work_that_no_server_can_do_is_missing_alone(away):
    asked = collections.Counter()

    def send(url, item):
        asked[item] += 1
        if item == 7:
            raise Unavailable("out of memory", away=away)
        return item

    results = Servers([A, B], tries=3, in_flight=1).map(send, range(500))
    assert results[:7] + results[8:] == [*range(7), *range(8, 500)]
    assert "out of memory" in results[7].why and results[7].passing <= away
    assert asked[7] >= 6


def test_a_server_that_is_gone_does_not_give_up_what_the_others_are_slow_at():
    def send(url, item):
        if url == A:
            raise Unavailable("down")
        time.sleep(0.2)  # many of the other's failures long
        return item

    assert Servers([A, B], tries=2, in_flight=1).map(send, range(4)) == list(range(4))


def test_other_errors_are_raised_at_once():
    asked = []

    def send(url, item):
        asked.append(item)
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        Servers([A], tries=5, in_flight=1).map(send, range(9))
    assert asked == [0]


def test_a_server_is_left_alone_for_as_long_as_it_asks():
    times = []

    def send(url, item):
        times.append(time.monotonic())
        if len(times) == 1:
            raise Unavailable("busy", retry_after=0.2)
        return item

    assert Servers([A], tries=3, in_flight=1).map(send, [5]) == [5]
    assert times[1] - times[0] >= 0.2


@pytest.mark.parametrize("urls", ["http://a:1", [], ["None"], ["a:1"]])
def test_addresses_are_checked(urls):
    with pytest.raises(ValueError, match="urls"):
        Servers(urls, 1, 1)


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_numbers_are_checked(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        Servers([A], *numbers)


@contextlib.contextmanager
def answering(script):
    """The address of a server that reads a request's head, and then does what `script(connection)` does."""
    stop = threading.Event()

    def work(listener):
        while not stop.is_set():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    script(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        thread = threading.Thread(target=work, args=(listener,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/score"
        finally:
            stop.set()
            thread.join()


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", HEAD], ids=["status", "headers", "body"])
def test_one_deadline_holds_for_the_whole_answer(direct, start):
    cut = []

    def drip(connection):
        connection.sendall(start)
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b" ")
                time.sleep(0.01)
        cut.append(True)

    with answering(drip) as url, pytest.raises(Unavailable, match=r"no whole answer within 0\.15 s$") as error:
        fetch(url, {}, timeout=0.15, body=b"x")
    assert error.value.away and cut == [True]  # the connection is not left behind


def test_a_server_that_says_nothing_is_not_waited_for(direct):
    heard = threading.Event()
    with answering(lambda connection: heard.wait(60)) as url:
        with pytest.raises(Unavailable, match=r"no whole answer within|timed out"):
            fetch(url, {}, timeout=0.1)
        heard.set()


def test_an_answer_that_is_cut_is_none(direct):
    cut = answering(lambda connection: connection.sendall(HEAD + b"{"))
    with cut as url, pytest.raises(Unavailable, match="IncompleteRead"):
        fetch(url, {}, timeout=30)


def test_an_answer_without_an_end_is_refused_as_it_is_read(direct, monkeypatch):
    monkeypatch.setattr(transport, "LONGEST_ANSWER", 100_000)

    def endless(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(bytes(10_000))

    with answering(endless) as url, pytest.raises(Rejected, match=f"{url} answered with more than 100000 bytes"):
        fetch(url, {}, timeout=30)


def answer(status, headers=""):
    return lambda connection: connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n{headers}\r\n".encode())


def test_a_wait_that_a_server_asks_for_is_capped_by_the_deadline(direct):
    with answering(answer("503 Busy", "Retry-After: 100000\r\n")) as url, pytest.raises(Unavailable) as error:
        fetch(url, {}, timeout=7)
    assert error.value.retry_after == 7


@pytest.mark.parametrize(("status", "away"), [(500, False), (501, False), (502, True), (503, True), (429, True)])
def test_a_server_that_fails_is_told_from_one_that_is_away(direct, status, away):
    with answering(answer(f"{status} No")) as url, pytest.raises(Unavailable, match=f"^{status} No") as error:
        fetch(url, {}, timeout=30)
    assert error.value.away is away


def test_a_token_is_not_taken_elsewhere(direct):
    asked, bearer = [], {"Authorization": "Bearer s3cret"}
    with answering(asked.append) as other, answering(answer("302 Found", f"Location: {other}\r\n")) as url:
        message = f"{url} answered 302, go to '{other}'"
        with pytest.raises(Rejected, match=message):
            fetch(url, bearer, timeout=30)
    assert not asked


def test_a_dead_proxy_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:s3cret@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Unavailable, match=r"proxy 127.0.0.1:9 of http_proxy.* set NO_PROXY=10.0.0.2\)$") as error:
        fetch("http://10.0.0.2:8100/score", {}, timeout=30)
    assert "s3cret" not in str(error.value)
