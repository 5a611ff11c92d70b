import base64
import io
import json
import math
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from mixgrpo_jax.rewards.contract import Incomplete, Missing
from mixgrpo_jax.rewards.serving import app, wire
from mixgrpo_jax.rewards.serving.app import make_app
from tests.rewards.conftest import brightness


def ask(url, body=None, **headers):
    """(status, answer, headers) of a POST to /score, or without a body of a GET."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, {"Content-Type": wire.ARCHIVE} | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"], error.headers


def body(pictures, name="", **changes):
    fields = dict(id=name, rewards=(), images=pictures, prompts=["x"] * len(pictures), metadata=[{}] * len(pictures))
    return wire.encode(wire.Request(**(fields | changes)))


def metrics(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(f"{url}/metrics", headers=headers)) as answer:
        lines = answer.read().decode().splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_scores_come_by_name(serve, pictures):
    status, answer, _ = ask(f"{serve()}/score", body(pictures, "mine"))
    assert status == 200 and answer["id"] == "mine" and list(answer["scores"]) == ["bright"]
    np.testing.assert_array_equal(np.float32(answer["scores"]["bright"]), brightness(pictures, [], []))


@pytest.mark.parametrize(
    ("bad", "headers", "field"),
    [
        (b"{", {"Content_Type": wire.JSON}, "body"),
        (b"{}", {"Content_Type": wire.JSON}, "images"),
        (b"no archive", {}, "body"),
        (b"x", {"Content_Type": "text/plain"}, "Content-Type"),
        ("prompts", {}, "prompts"),
        ("rewards", {}, "rewards"),
    ],
)
def test_bad_bodies_are_400_and_name_the_field(serve, pictures, bad, headers, field):
    changes = {"prompts": {"prompts": []}, "rewards": {"rewards": ("hps",)}}
    bad = body(pictures, **changes[bad]) if isinstance(bad, str) else bad
    status, error, _ = ask(f"{serve()}/score", bad, **headers)
    assert (status, error["code"], error["field"]) == (400, "bad_request", field)
    assert field in error["message"]


def test_only_the_token_lets_in(serve, pictures):
    url, sent = serve(token="s3cret"), body(pictures)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer é"}):
        status, error, answered = ask(f"{url}/score", sent, **headers)
        assert (status, error["code"], answered["WWW-Authenticate"]) == (401, "unauthorized", "Bearer")
    right = {"Authorization": "Bearer s3cret"}
    assert ask(f"{url}/score", sent, **right)[0] == 200
    assert ask(f"{url}/metrics")[0] == 401
    assert metrics(url, **right)['mixgrpo_jax_reward_failures_total{reason="unauthorized"}'] == 4
    assert ask(f"{url}/health")[:2] == (200, {"status": "ok"})
    assert ask(f"{url}/health", Authorization="Bearer wrong")[0] == 401
    assert ask(f"{url}/health", **right)[1]["rewards"] == ["bright"]


def test_oversized_requests_are_413(serve, pictures):
    for limits in ({"max_batch": 39}, {"max_bytes": 1000}):
        status, error, _ = ask(f"{serve(**limits)}/score", body(pictures))
        assert (status, error["code"]) == (413, "too_large") and "limit is" in error["message"]


def test_a_long_body_is_heard_out_before_it_is_refused(serve):
    status, error, _ = ask(f"{serve(max_bytes=1000)}/score", bytes(20_000_000))
    assert (status, error["message"]) == (413, "the body has 20000000 bytes; the limit is 1000")


def test_a_score_that_is_not_finite_is_a_500_that_names_it(serve, pictures):
    pictures[17] = 0
    status, error, _ = ask(f"{serve()}/score", body(pictures))
    assert (status, error["code"], error["reward"], error["sample"]) == (500, "not_finite", "bright", 17)


def test_a_reward_that_raises_is_a_500(serve, pictures):
    def broken(images, prompts, metadata):
        raise KeyError("number")

    status, error, _ = ask(f"{serve(broken)}/score", body(pictures))
    assert (status, error["code"], error["reward"]) == (500, "reward_failed", "bright")


def test_a_busy_server_says_when_to_come_again(serve, pictures):
    arrived, go = threading.Event(), threading.Event()

    def slow(images, prompts, metadata):
        arrived.set()
        go.wait(60)
        return brightness(images, prompts, metadata)

    url, first = serve(slow, max_queue=1), []
    thread = threading.Thread(target=lambda: first.append(ask(f"{url}/score", body(pictures))[0]))
    thread.start()
    assert arrived.wait(60)
    status, error, headers = ask(f"{url}/score", body(pictures))
    assert (status, error["code"], headers["Retry-After"]) == (503, "busy", "1")
    assert metrics(url)["mixgrpo_jax_reward_queue_length"] == 1
    go.set()
    thread.join()
    assert first == [200]


def test_metrics_count(serve, pictures):
    url = serve()
    for _ in range(3):
        assert ask(f"{url}/score", body(pictures[:5], "same"))[0] == 200
    ask(f"{url}/score", body(pictures[:7]))
    ask(f"{url}/score", b"x")
    counts = {key.removeprefix("mixgrpo_jax_reward_"): value for key, value in metrics(url).items()}
    assert counts.pop('seconds_total{reward="bright"}') > 0
    assert counts == {
        'requests_total{status="200"}': 4,
        'requests_total{status="400"}': 1,
        'failures_total{reason="bad_request"}': 1,
        "repeats_total{}": 2,
        'images_total{reward="bright"}': 12,
        'batches_total{reward="bright"}': 2,
        "queue_length": 0,
    }


def connect(url):
    return socket.create_connection(url.removeprefix("http://").split(":"), timeout=60)


HEAD = f"POST /score HTTP/1.1\r\nHost: here\r\nContent-Type: {wire.ARCHIVE}\r\n"


@pytest.mark.parametrize("token", ["", "s3cret"])
def test_a_body_that_does_not_end_is_cut(serve, monkeypatch, token):
    monkeypatch.setattr(app, "HEARD", 1 << 20)
    with connect(serve(token=token, max_bytes=1000)) as connection:
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        with pytest.raises(OSError):
            while True:
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")


@pytest.mark.parametrize("token", ["", "s3cret"])
def test_a_body_that_is_late_is_a_408(serve, token):
    with connect(serve(token=token, max_seconds=1)) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\nabc".encode())
        said = b"".join(iter(lambda: connection.recv(4096), b""))  # to the end: the connection is closed
    assert said.startswith(b"HTTP/1.1 408") and b"the body did not come within 1 s, but 3 bytes of it" in said


def test_a_caller_who_hangs_up_leaves_no_traceback(serve, capfd, pictures):
    url = serve()
    with connect(url) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100000\r\n\r\nabc".encode())
    deadline = time.monotonic() + 60
    while not metrics(url).get('mixgrpo_jax_reward_failures_total{reason="hung_up"}') and time.monotonic() < deadline:
        time.sleep(0.01)
    counts = metrics(url)
    assert counts['mixgrpo_jax_reward_failures_total{reason="hung_up"}'] == 1
    assert counts["mixgrpo_jax_reward_queue_length"] == 0
    assert ask(f"{url}/score", body(pictures))[0] == 200
    assert capfd.readouterr().err == ""


def test_an_error_may_repeat_what_utf8_cannot_write(serve, pictures):
    odd = b'{"images": [""], "prompts": ["a"], "\\ud83d": 1}'
    status, error, _ = ask(f"{serve()}/score", odd, Content_Type=wire.JSON)
    assert (status, error["code"]) == (400, "bad_request")
    image = base64.b64encode(npy(pictures[0])).decode()
    odd = json.dumps({"images": [image], "prompts": ["a"], "\ud83d": 1}).encode()
    assert ask(f"{serve()}/score", odd, Content_Type=wire.JSON)[1]["field"] == "\ud83d"


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("reward", ["leaves", "misses"])
def test_a_reward_without_a_score_is_a_500_that_says_so(serve, pictures, reward):
    def leaves(images, prompts, metadata):
        raise SystemExit(3)

    def misses(images, prompts, metadata):
        return Incomplete(np.ones(len(images)), {1: Missing("http://b: refused", passing=True)})

    status, error, _ = ask(f"{serve(locals()[reward])}/score", body(pictures))
    assert (status, error["code"]) == (500, "reward_failed")
    assert {"leaves": "SystemExit(3)", "misses": "no score of 1 images: http://b: refused"}[reward] in error["message"]


LIMITS = [{"max_batch": 0}, {"max_queue": 0}, {"max_bytes": 0}, {"max_seconds": 0}, {"max_seconds": math.nan}]


@pytest.mark.parametrize("limits", [*LIMITS, {"rewards": {}}])
def test_limits_that_let_nothing_in_are_refused(limits):
    with pytest.raises(ValueError, match="at least 1"):
        make_app(**({"rewards": {"bright": None}} | limits))
