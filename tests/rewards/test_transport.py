import collections
import threading
import time

import pytest

from mixgrpo_jax.rewards import transport
from mixgrpo_jax.rewards.transport import Servers, Unavailable

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


def test_when_all_fail_the_error_has_what_each_said_last():
    said = collections.Counter()

    def send(url, item):
        said[url] += 1
        raise Unavailable(f"{url[7]} said no for the {said[url]}th time")

    with pytest.raises(ConnectionError, match=r"3 tries.*http://a:1: a said no.*http://b:1: b said no"):
        Servers([A, B], tries=3, in_flight=1).map(send, range(9))
    assert min(said.values()) >= 3


def test_work_that_no_server_can_do_stops_the_call():
    asked = collections.Counter()

    def send(url, item):
        asked[item] += 1
        if item == 7:
            raise Unavailable("out of memory")
        return item

    with pytest.raises(ConnectionError, match="out of memory"):
        Servers([A, B], tries=3, in_flight=1).map(send, range(500))
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
