"""Requests that arrive together are scored together, and an answer is kept for whoever asks again."""

import asyncio
import collections
import json
import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np

from mixgrpo_jax.rewards.contract import Reward, as_incomplete
from mixgrpo_jax.rewards.serving.wire import BadRequest, Request

PREFIX = "mixgrpo_jax_reward_"
COUNTERS = {
    "requests_total": "Requests to /score, by status.",
    "failures_total": "Requests that got no scores, by reason.",
    "repeats_total": "Requests answered from memory, or by the scoring of an earlier one with the same id.",
    "images_total": "Images scored, by reward.",
    "batches_total": "Batches scored, by reward.",
    "seconds_total": "Seconds spent scoring, by reward.",
}

Scores = dict[str, np.ndarray]


class ScoreError(RuntimeError):
    """No scores for a request. `code` is "not_finite", for good, or "reward_failed"; with the sample, where known."""

    def __init__(self, code: str, reward: str, message: str, sample: int | None = None):
        super().__init__(message)
        self.code, self.reward, self.sample = code, reward, sample


class Counters:
    """Monotonic counts with labels, as Prometheus reads them; for any thread."""

    def __init__(self) -> None:
        self._values: collections.defaultdict[tuple[str, str], float] = collections.defaultdict(float)
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Count `value` more of a name in COUNTERS."""
        with self._lock:
            self._values[name, ",".join(f"{k}={json.dumps(v)}" for k, v in labels.items())] += value

    def text(self, queue_length: int) -> str:
        """All counts and the queue's length, in Prometheus's text format."""
        with self._lock:
            values = sorted(self._values.items())
        lines = []
        for name, help_text in COUNTERS.items():
            lines += [f"# HELP {PREFIX}{name} {help_text}", f"# TYPE {PREFIX}{name} counter"]
            lines += [f"{PREFIX}{key}{{{labels}}} {value:.9g}" for (key, labels), value in values if key == name]
        queue = f"{PREFIX}queue_length"
        lines += [f"# HELP {queue} Requests in hand.", f"# TYPE {queue} gauge", f"{queue} {queue_length}"]
        return "\n".join(lines) + "\n"


class Batcher:
    """Scores requests with `rewards`, in batches of `max_batch` images at most, one batch at a time.

    Args:
        rewards: by the names under which requests ask for them.
        max_batch: images a batch; no request may hold more.
        remember: answers that are kept for requests that come again by the same id.
        linger: seconds to wait for company while a batch is not full.
    """

    def __init__(self, rewards: Mapping[str, Reward], max_batch: int, remember: int = 4096, linger: float = 0.005):
        self.rewards, self.max_batch, self.remember, self.linger = rewards, max_batch, remember, linger
        self.counters = Counters()
        self._waiting: list[tuple[Request, asyncio.Future[Scores]]] = []
        self._answers: dict[str, tuple[bytes, asyncio.Future[Scores]]] = {}  # by id, the oldest first
        self._arrived = asyncio.Event()

    async def score(self, request: Request, digest: bytes) -> Scores:
        """Scores [B] by reward; `digest` is the request's. Needs `run` to be running.

        Raises:
            BadRequest: a reward that is not there, or an id that was another request's.
            ScoreError: a reward raised, or gave something else than B finite numbers.
        """
        if unknown := set(request.rewards) - set(self.rewards):
            raise BadRequest("rewards", f"{min(unknown)!r} is not served here; there are {', '.join(self.rewards)}")
        if request.id in self._answers:
            earlier, answer = self._answers[request.id]
            if earlier != digest:
                raise BadRequest("id", f"{request.id!r} was another request's; give each its own")
            self.counters.add("repeats_total")
        else:
            answer = asyncio.get_running_loop().create_future()
            self._answers[request.id] = digest, answer
            self._waiting.append((request, answer))
            self._arrived.set()
        return await asyncio.shield(answer)  # a caller that hangs up leaves the answer to its next try

    async def run(self) -> None:
        """Score what arrives, forever."""
        while True:
            await self._arrived.wait()
            if sum(len(request.images) for request, _ in self._waiting) < self.max_batch:
                await asyncio.sleep(self.linger)
            batch = self._take()
            outcomes = await asyncio.to_thread(self._outcomes, [request for request, _ in batch])
            for (request, answer), outcome in zip(batch, outcomes, strict=True):
                self._settle(request, answer, outcome)

    def _take(self) -> list[tuple[Request, asyncio.Future[Scores]]]:
        """The oldest request, and those after it that ask the same of images of the same size, while there is room."""
        taken, left, room = [], [], self.max_batch
        first = self._waiting[0][0]
        for entry in self._waiting:
            request = entry[0]
            alike = request.rewards == first.rewards and request.images.shape[1:] == first.images.shape[1:]
            if alike and len(request.images) <= room:
                taken.append(entry)
                room -= len(request.images)
            else:
                left.append(entry)
        self._waiting = left
        if not left:
            self._arrived.clear()
        return taken

    def _settle(self, request: Request, answer: asyncio.Future[Scores], outcome: Scores | ScoreError) -> None:
        if isinstance(outcome, ScoreError):
            self._answers.pop(request.id, None)  # it may be scored next time
            answer.set_exception(outcome)
            answer.exception()  # seen, even if the caller is gone
        else:
            answer.set_result(outcome)
        while len(self._answers) > self.remember:
            del self._answers[next(iter(self._answers))]

    def _outcomes(self, requests: Sequence[Request]) -> list[Scores | ScoreError]:
        """What becomes of each request; where one makes a reward fail, the others are scored without it."""
        try:
            return self._score_together(requests)
        except Exception as error:
            if len(requests) > 1:
                return [outcome for request in requests for outcome in self._outcomes([request])]
            if isinstance(error, ScoreError):
                return [error]
            return [ScoreError("reward_failed", ", ".join(self._names(requests[0])), repr(error))]

    def _names(self, request: Request) -> tuple[str, ...]:
        return request.rewards or tuple(self.rewards)

    def _score_together(self, requests: Sequence[Request]) -> list[Scores | ScoreError]:
        images = np.concatenate([request.images for request in requests])
        prompts = [prompt for request in requests for prompt in request.prompts]
        metadata = [entry for request in requests for entry in request.metadata]
        names = self._names(requests[0])
        scores = {name: self._score(name, images, prompts, metadata) for name in names}
        ends = np.cumsum([len(request.images) for request in requests])[:-1]
        parts = {name: np.split(values, ends) for name, values in scores.items()}
        return [_finite({name: parts[name][i] for name in names}, requests[i].prompts) for i in range(len(requests))]

    def _score(self, name: str, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        reward, count, started = self.rewards[name], len(images), time.perf_counter()
        index = np.arange(count)
        if reward.where == "device":  # a program is compiled for each size of batch: let there be few sizes
            padded = min(1 << (count - 1).bit_length(), self.max_batch)
            index = np.minimum(np.arange(padded), count - 1)
        try:
            given = reward.score(images[index], [prompts[i] for i in index], [metadata[i] for i in index])
            found = as_incomplete(given)
            scores, missing = np.asarray(found.value, np.float32), found.missing
        except (Exception, SystemExit) as error:
            raise ScoreError("reward_failed", name, f"reward {name!r} failed: {error!r}") from error
        if missing:
            why = next(iter(missing.values())).why
            raise ScoreError("reward_failed", name, f"reward {name!r} has no score of {len(missing)} images: {why}")
        if scores.shape != index.shape:
            raise ScoreError(
                "reward_failed", name, f"reward {name!r} gave shape {scores.shape} for {len(index)} images"
            )
        self.counters.add("images_total", count, reward=name)
        self.counters.add("batches_total", reward=name)
        self.counters.add("seconds_total", time.perf_counter() - started, reward=name)
        return scores[:count]


def _finite(scores: Scores, prompts: Sequence[str]) -> Scores | ScoreError:
    for name, values in scores.items():
        if bad := np.flatnonzero(~np.isfinite(values)).tolist():
            i = bad[0]
            message = f"reward {name!r} gave {values[i]} for sample {i} ({prompts[i]!r}): look at that image"
            return ScoreError("not_finite", name, message, i)
    return scores
