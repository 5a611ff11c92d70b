import http.server
import json
import threading

import numpy as np
import pytest

from mixgrpo_jax.rewards import transport
from mixgrpo_jax.rewards.remote import TOKEN, remote
from mixgrpo_jax.rewards.scoring import score_all
from mixgrpo_jax.rewards.serving import wire
from tests.rewards.conftest import brightness

CLOSED = "http://127.0.0.1:9"  # the discard port, where nothing listens


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(transport, "LONGEST_DELAY", 0.05)


def score(reward, pictures):
    return reward.score(
        pictures, [f"prompt {i}" for i in range(len(pictures))], [{"i": i} for i in range(len(pictures))]
    )


def test_is_a_reward_like_the_others(serve, pictures):
    reward = remote("bright", urls=[serve(), serve()], batch=3)
    scores = score_all([reward], pictures, ["x"] * 40, [{}] * 40)
    assert list(scores) == ["bright"] and scores["bright"].value.dtype == np.float32
    np.testing.assert_array_equal(scores["bright"].value, brightness(pictures, [], []))


def test_prompts_and_metadata_travel_with_their_image(serve, pictures):
    def told(images, prompts, metadata):
        assert [m["rgb"] for m in metadata] == [[1, 2, 3]] * len(images)
        return [float(prompt.split()[1]) for prompt in prompts]

    reward = remote("bright", urls=[serve(told)], batch=7)
    metadata = [{"rgb": np.uint8([1, 2, 3])}] * 40
    assert reward.score(pictures, [f"n {i}" for i in range(40)], metadata).tolist() == list(range(40))


def test_requests_are_cut_to_size_and_few_at_a_time(serve, pictures):
    sizes, threads = [], []

    def counting(images, prompts, metadata):
        sizes.append(len(images))
        threads.append(threading.active_count())
        return brightness(images, prompts, metadata)

    score(remote("bright", urls=[serve(counting, max_batch=16)], batch=16, in_flight=3), pictures)
    assert sum(sizes) == 40 and max(sizes) <= 16 and len(sizes) >= 3


def test_the_token_comes_from_the_environment(serve, pictures, monkeypatch):
    url = serve(token="s3cret")
    with pytest.raises(ValueError, match=f"wants a token: set {TOKEN}"):
        remote("bright", urls=[url])
    with pytest.raises(ValueError, match="401"):
        remote("bright", urls=[url], token="wrong")
    monkeypatch.setenv(TOKEN, "s3cret")
    assert len(score(remote("bright", urls=[url]), pictures)) == 40


def test_what_is_wrong_is_found_before_the_first_rollout(serve):
    url = serve(max_batch=8)
    with pytest.raises(ValueError, match="no reward 'hps', but bright"):
        remote("hps", urls=[url])
    with pytest.raises(ValueError, match="takes 8 images a request"):
        remote("bright", urls=[url], batch=16)
    with pytest.raises(ConnectionError, match=f"{CLOSED}: .*refused"):
        remote("bright", urls=[CLOSED])
    with pytest.raises(ValueError, match="batch=0"):
        remote("bright", urls=[url], batch=0)


def test_a_server_that_is_down_is_done_without(serve, pictures):
    reward = remote("bright", urls=[CLOSED, serve()], batch=2)
    np.testing.assert_array_equal(score(reward, pictures), brightness(pictures, [], []))


def test_a_score_that_is_not_finite_stops_the_call(serve, pictures):
    pictures[17] = 0
    reward = remote("bright", urls=[serve()], batch=5)
    with pytest.raises(ValueError, match=r"sample 17 \('prompt 17'\): reward 'bright' gave nan"):
        score(reward, pictures)


def test_when_all_servers_fail_the_error_has_each_one_s_last(serve, pictures):
    def broken(images, prompts, metadata):
        raise KeyError("number")

    url = serve(broken)
    reward = remote("bright", urls=[CLOSED, url], tries=2)
    with pytest.raises(ConnectionError, match=f"40 images.*2 tries each.*{CLOSED}: .*refused.*{url}: 500.*KeyError"):
        score_all([reward], pictures, ["x"] * 40, [{}] * 40)


def test_pictures_that_no_server_can_score_are_missing_and_no_others(serve, pictures):
    def picky(images, prompts, metadata):
        if "prompt 17" in prompts:
            raise KeyError("number")
        return brightness(images, prompts, metadata)

    url = serve(picky)
    given = score(remote("bright", urls=[url], batch=4, tries=2), pictures)
    assert sorted(given.missing) == [16, 17, 18, 19] and np.isnan(given.value[16:20]).all()
    others = np.r_[:16, 20:40]
    np.testing.assert_array_equal(given.value[others], brightness(pictures, [], [])[others])
    why = given.missing[17]
    assert "KeyError" in why.why and not why.passing


@pytest.fixture
def stub(monkeypatch):
    """A server of "bright" whose answers to /score are `answer(request's id)`: its address, and the answer to set."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Stub(http.server.BaseHTTPRequestHandler):
        def say(self, body):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.say(json.dumps(Stub.health).encode())

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = wire.decode(body, wire.ARCHIVE, wire.Limits(64, 1 << 20))
            self.say(Stub.answer(asked.id))

        def log_message(self, *args):
            pass

    Stub.health = {"status": "ok", "rewards": ["bright"], "max_batch": 64}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    Stub.url = f"http://127.0.0.1:{server.server_port}"
    yield Stub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>log in</html>", "is no reward server: it answered b'<html>log in"),
        (b"[" * 100_000, "is no reward server"),
        (b'{"scores": ' + b'{"bright":' * 50_000, "is no reward server"),
        (b"\xff\xfe", "is no reward server"),
        (b"[1, 1, 1]", "is no reward server"),
        (b"{}", "answered without scores of 'bright'"),
        (b'{"scores": null}', "answered without scores of 'bright'"),
        (b'{"scores": [1, 1, 1]}', "answered without scores of 'bright'"),
        (b'{"scores": {"bright": 1}}', "answered without scores of 'bright'"),
        (b'{"scores": {"bright": [null, 1, 1]}}', "answered without scores of 'bright'"),
        (b'{"scores": {"bright": ["1", "1", "1"]}}', "answered without scores of 'bright'"),
        (b'{"scores": {"bright": [true, 1, 1]}}', "answered without scores of 'bright'"),
        (b'{"scores": {"bright": [[1], 1, 1]}}', "answered without scores of 'bright'"),
        (b'{"scores": {"bright": [NaN, 1, 1]}}', "gave the score nan of 'bright' for 'prompt 0'"),
        (b'{"scores": {"bright": [1, 1e999, 1]}}', "gave the score inf of 'bright' for 'prompt 1'"),
        (b'{"scores": {"bright": [1, 1, 1' + b"0" * 400 + b"]}}", "gave the score 100.* of 'bright' for 'prompt 2'"),
        (b'{"scores": {"bright": [1, 1]}}', "gave 2 scores of 'bright' for 3 images"),
        (b'{"id": "another", "scores": {"bright": [1, 1, 1]}}', "answered another request: id 'another'"),
    ],
)
def test_odd_answers_are_one_error_that_names_the_server(stub, pictures, answer, message):
    stub.answer = lambda _: answer
    with pytest.raises(ValueError, match=f"{stub.url} {message}"):
        score(remote("bright", urls=[stub.url]), pictures[:3])


@pytest.mark.parametrize("health", [{}, {"rewards": None, "max_batch": 4}, {"rewards": ["bright"]}, [1]])
def test_what_is_no_reward_server_is_found_before_the_first_rollout(stub, health):
    stub.health = health
    with pytest.raises(ValueError, match=f"{stub.url} is no reward server"):
        remote("bright", urls=[stub.url])


def test_a_deadline_is_positive():
    with pytest.raises(ValueError, match="timeout=0"):
        remote("bright", urls=[CLOSED], timeout=0)


def test_a_retry_after_a_lost_answer_is_not_scored_again(serve, pictures, monkeypatch):
    calls, answers = [], []

    def counting(images, prompts, metadata):
        calls.append(len(images))
        return brightness(images, prompts, metadata)

    reward, fetch = remote("bright", urls=[serve(counting)], batch=40), transport.fetch

    def losing(*args):
        answers.append(fetch(*args))
        if len(answers) == 1:
            raise transport.Unavailable("the answer was lost")
        return answers[-1]

    monkeypatch.setattr("mixgrpo_jax.rewards.remote.fetch", losing)
    np.testing.assert_array_equal(score(reward, pictures), brightness(pictures, [], []))
    assert calls == [40] and len(answers) == 2 and json.loads(answers[0]) == json.loads(answers[1])
