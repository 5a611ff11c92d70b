import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax.rewards import transport
from mixgrpo_jax.rewards.chat import RUBRICS, TOKEN, Rubric, chat
from mixgrpo_jax.rewards.scoring import score_all

ANSWERS = {
    "score": "1. a red house: yes\n2. snow: no\n\nFinal Score: {}",
    "semantic": "red: 4\nhouse: 5\nAlignment Score (1-5): {}\nCoherence Score (1-5): 2.1\nStyle Score (1-5): 1",
}


@pytest.fixture
def stub(monkeypatch):
    """A chat server: its url, the (path, headers, body) it was sent, and `answer(body) -> str or status` to be set."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transport, "FIRST_DELAY", 0.01)

    class Stub(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.sent.append((self.path, self.headers, body))
            said = Stub.answer(body)
            self.send_response(said if isinstance(said, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *args):
            pass

    Stub.sent = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    Stub.url = f"http://127.0.0.1:{server.server_port}"
    yield Stub
    server.shutdown()
    server.server_close()


def question(body):
    return body["messages"][0]["content"][1]["text"]


def picture(body):
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


PICTURES = np.stack([np.full((16, 24, 3), value, np.uint8) for value in range(0, 250, 10)])
PROMPTS = [f"a {{red}} house number {i}" for i in range(len(PICTURES))]


@pytest.mark.parametrize("rubric", RUBRICS)
def test_each_picture_gets_the_score_of_its_answer(stub, rubric):
    def answer(body):
        return ANSWERS[rubric].format(f"{np.asarray(picture(body)).mean() / 50:.2f}")

    stub.answer = answer
    scores = chat(urls=[stub.url], rubric=rubric).score(PICTURES, PROMPTS, [{}] * len(PROMPTS))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, PICTURES.mean((1, 2, 3)) / 250, atol=0.005)
    assert len(stub.sent) == len(PROMPTS)


def test_what_is_asked(stub):
    stub.answer = lambda body: ANSWERS["semantic"].format(4)
    noise = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3)).astype(np.uint8)
    chat(urls=[f"{stub.url}/v1/"], model="vlm", token="key").score(noise, PROMPTS[:1], [{}])
    path, headers, body = stub.sent[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer key"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("vlm", 0, 4096)
    assert PROMPTS[0] in question(body) and "{prompt}" not in question(body)
    file = io.BytesIO()
    Image.fromarray(noise[0]).save(file, "JPEG", quality=95)
    np.testing.assert_array_equal(np.asarray(picture(body)), np.asarray(Image.open(file)))


def test_the_key_comes_from_the_environment(stub, monkeypatch):
    monkeypatch.setenv(TOKEN, "key")
    stub.answer = lambda body: ANSWERS["semantic"].format(4)
    chat(urls=[stub.url]).score(PICTURES[:1], PROMPTS[:1], [{}])
    assert stub.sent[0][1]["Authorization"] == "Bearer key"


def test_a_rubric_of_one_s_own(stub):
    stub.answer = lambda body: f"<Score>{len(question(body))}</Score>"
    rubric = {"template": "Rate: {prompt}", "pattern": r"<Score>(\d+)</Score>", "scale": 100}
    scores = chat(urls=[stub.url], rubric=rubric).score(PICTURES, PROMPTS, [{}] * len(PROMPTS))
    np.testing.assert_allclose(scores, [len("Rate: " + prompt) / 100 for prompt in PROMPTS])


@pytest.mark.parametrize(
    "bad", ["I cannot see it.", ANSWERS["semantic"].format("high"), ANSWERS["semantic"].format(45)]
)
def test_an_answer_without_a_score_names_the_sample_and_is_shown(stub, bad):
    stub.answer = lambda body: bad if PROMPTS[7] in question(body) else ANSWERS["semantic"].format(4)
    with pytest.raises(ValueError, match=r"'chat', sample 7 \('a {red} house number 7'\)") as error:
        chat(urls=[stub.url]).score(PICTURES[:8], PROMPTS[:8], [{}] * 8)
    assert bad in str(error.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_three_tries(stub, status):
    tries = iter([status, status, ANSWERS["semantic"].format(3)])
    stub.answer = lambda body: next(tries)
    assert chat(urls=[stub.url]).score(PICTURES[:1], PROMPTS[:1], [{}]) == pytest.approx(0.6)
    stub.answer = lambda body: status
    with pytest.raises(ConnectionError, match=f"3 tries.*{status}"):
        score_all([chat(urls=[stub.url])], PICTURES[:1], PROMPTS[:1], [{}])
    assert len(stub.sent) == 6


def test_a_picture_that_no_server_can_read_is_missing_alone(stub):
    stub.answer = lambda body: 500 if "number 2" in question(body) else ANSWERS["semantic"].format(3)
    given = chat(urls=[stub.url]).score(PICTURES[:5], PROMPTS[:5], [{}] * 5)
    assert list(given.missing) == [2] and given.value[[0, 1, 3, 4]] == pytest.approx(0.6) and np.isnan(given.value[2])


def test_an_answer_too_deep_to_read_is_refused(stub, monkeypatch):
    monkeypatch.setattr("mixgrpo_jax.rewards.chat.fetch", lambda *args: b"[" * 100_000)
    with pytest.raises(ValueError, match=rf"{stub.url}/v1/chat/completions is no chat server"):
        chat(urls=[stub.url]).score(PICTURES[:1], PROMPTS[:1], [{}])


def test_a_refusal_is_not_tried_again(stub):
    stub.answer = lambda body: 401
    with pytest.raises(ValueError, match="401"):
        chat(urls=[stub.url]).score(PICTURES[:1], PROMPTS[:1], [{}])
    assert len(stub.sent) == 1


def test_an_answer_of_another_form_is_shown(stub):
    stub.answer = lambda body: None
    with pytest.raises(ValueError, match=rf"{stub.url}/v1/chat/completions is no chat server: it answered .*null"):
        chat(urls=[stub.url]).score(PICTURES[:1], PROMPTS[:1], [{}])


@pytest.mark.parametrize(
    ("rubric", "answer", "score"),
    [
        ("score", "Final Score: 4", 0.8),
        ("score", "Final Score: 4.5/5", 0.9),
        ("score", "Final Score:\n3.", 0.6),
        ("semantic", "Alignment Score (1-5): 5", 1.0),
    ],
)
def test_numbers_are_read(rubric, answer, score):
    assert RUBRICS[rubric].read(answer) == pytest.approx(score)


@pytest.mark.parametrize("answer", ["", "Final Score: 7", "Final Score: 45", "Final Score: 4.5.1", "Final Score: 5.9"])
def test_other_numbers_are_not(answer):
    with pytest.raises(ValueError, match=r"nothing matches|not in 0"):
        RUBRICS["score"].read(answer)


@pytest.mark.parametrize("rubric", ["aesthetic", {"template": "", "pattern": "("}, {"template": "", "pattern": "x"}])
def test_rubrics_are_checked(rubric):
    with pytest.raises(ValueError, match="rubric"):
        chat(urls=["http://a:1"], rubric=rubric)
    with pytest.raises(ValueError, match="scale"):
        Rubric("", "(x)", 0)
