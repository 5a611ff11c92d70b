"""A reward that a vision-language model gives, behind an OpenAI-style chat endpoint such as vLLM's or SGLang's."""

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from PIL import Image

from mixgrpo_jax.rewards.contract import Incomplete, Reward
from mixgrpo_jax.rewards.remote import collected
from mixgrpo_jax.rewards.transport import Rejected, Servers, fetch

TOKEN = "MIXGRPO_JAX_CHAT_TOKEN"  # the environment's variable
NUMBER = r"([0-5](?:\.\d+)?)(?!\.?\d)"  # not the 4 of 45, nor of 4.x.y


@dataclass(frozen=True)
class Rubric:
    """What a model is asked of a picture, and how its answer is read.

    Attributes:
        template: the question; `{prompt}` stands for the prompt.
        pattern: a regular expression, whose first group is the number. The first match in the answer counts.
        scale: the largest number; scores are number / scale, in [0, 1]. A number outside of [0, scale] is an error.
    """

    template: str
    pattern: str
    scale: float = 5.0

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"rubric.pattern={self.pattern!r} is no regular expression: {error}") from None
        if groups < 1 or not self.scale > 0:
            raise ValueError(f"rubric: pattern={self.pattern!r} needs a group, and scale={self.scale} must be positive")

    def ask(self, prompt: str) -> str:
        """The question for a prompt."""
        return self.template.replace("{prompt}", prompt)

    def read(self, answer: str) -> float:
        """The score in an answer; ValueError if there is none."""
        found = re.search(self.pattern, answer)
        if found is None:
            raise ValueError(f"nothing matches {self.pattern!r}")
        number = float(found.group(1))
        if not 0 <= number <= self.scale:
            raise ValueError(f"{number:g} is not in 0..{self.scale:g}")
        return number / self.scale


# UnifiedReward's two questions. They ask for what its own ask for, and their answers are read as its are, but the
# wording is this project's: a model that was trained on one wording should be given that one, as a rubric.
RUBRICS = {
    "score": Rubric(
        "You see a picture that was generated from a caption. List the caption's elements (objects, attributes, "
        "relations, style), and say of each one whether the picture shows it. Then rate from 1 to 5 how well the "
        "picture fits the caption and how well it is made: 1 is a poor picture that misses most of the caption, 5 an "
        "excellent one that has all of it.\n\nCaption: {prompt}\n\n"
        "End with one line of this form, and nothing after it:\nFinal Score: <number from 1 to 5>",
        rf"Final Score:\s*{NUMBER}",
    ),
    "semantic": Rubric(
        "You see a picture that was generated from a caption. First rate each word of the caption by how well the "
        "picture shows it, one word a line. Then rate the picture as a whole, each from 1 (worst) to 5 (best): how "
        "well it agrees with the caption, how coherent it is (no broken shapes, nothing impossible), and its style.\n\n"
        "Caption: {prompt}\n\nEnd with three lines of this form, and nothing after them:\n"
        "Alignment Score (1-5): <number>\nCoherence Score (1-5): <number>\nStyle Score (1-5): <number>",
        rf"Alignment Score \(1-5\):\s*{NUMBER}",
    ),
}


def chat(
    name: str = "chat",
    *,
    urls: Sequence[str],
    rubric: str | Mapping = "semantic",
    model: str = "UnifiedReward",
    token: str = "",
    timeout: float = 60.0,
    tries: int = 3,
    in_flight: int = 16,
) -> Reward:
    """What a chat model says of each picture: score = number in its answer / the rubric's scale.

    A picture is one request, as JPEG of quality 95, at temperature 0. Requests that get no answer are tried again, at
    another server if there is one, and then are missing; an answer without a score stops the run, and is shown.

    Args:
        name: how logs call the reward.
        urls: of servers that all have the model; "/v1/chat/completions" is added.
        rubric: "score" or "semantic", or a `Rubric`'s fields {"template", "pattern", "scale"}.
        model: as the servers call it.
        token: their API key; "" takes the environment's MIXGRPO_JAX_CHAT_TOKEN, which no log shows.
        timeout: seconds for one request, from the first look at the server's name to the answer's last byte.
        tries: failures in a row of every server (0.5 to 10 s apart) after which a call's other images have no score.
        in_flight: requests at a time to each server, which batches them.

    Raises:
        ValueError: an unknown rubric, or one that cannot be used.
    """
    if not timeout > 0:
        raise ValueError(f"timeout={timeout} must be positive: seconds for one request")
    asks = _rubric(rubric)
    servers = Servers(urls, tries, in_flight)
    token = token or os.environ.get(TOKEN, "")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def send(url: str, sample: tuple[int, np.ndarray, str]) -> np.ndarray:
        i, image, prompt = sample
        url = url.removesuffix("/v1") + "/v1/chat/completions"
        answer = _content(url, fetch(url, headers, timeout, _body(model, image, asks.ask(prompt))))
        try:
            return np.array([asks.read(answer)], np.float32)
        except ValueError as error:
            raise ValueError(
                f"reward {name!r}, sample {i} ({prompt!r}): {error} in the answer of {model} at {url}:\n{answer}"
            ) from None

    def score(images: np.ndarray | jax.Array, prompts: list[str], metadata: list[dict]) -> np.ndarray | Incomplete:
        del metadata
        samples = list(zip(range(len(prompts)), np.asarray(images), prompts, strict=True))
        return collected(servers.map(send, samples), [1] * len(samples))

    return Reward(name, "host", score)


def _rubric(rubric: str | Mapping) -> Rubric:
    if not isinstance(rubric, str):
        return Rubric(**rubric)
    if rubric not in RUBRICS:
        raise ValueError(f"rubric={rubric!r} is unknown; choose from {', '.join(RUBRICS)}, or give its template")
    return RUBRICS[rubric]


def _body(model: str, image: np.ndarray, question: str) -> bytes:
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=95)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": model, "messages": messages, "temperature": 0, "max_tokens": 4096}).encode()


def _content(url: str, answer: bytes) -> str:
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise Rejected(f"{url} is no chat server: it answered {answer[:500]!r}")
    return text
