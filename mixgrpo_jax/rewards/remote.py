"""A reward that other machines compute: the client of `python -m mixgrpo_jax.serve_rewards`."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixgrpo_jax.rewards.contract import Incomplete, Missing, Reward
from mixgrpo_jax.rewards.serving import wire
from mixgrpo_jax.rewards.transport import Rejected, Servers, Unavailable, fetch

TOKEN = "MIXGRPO_JAX_TOKEN"  # the environment's variable
LARGEST = float(np.finfo(np.float32).max)


def remote(
    name: str,
    *,
    urls: Sequence[str],
    token: str = "",
    timeout: float = 60.0,
    batch: int = 16,
    tries: int = 8,
    in_flight: int = 2,
) -> Reward:
    """The reward that servers know as `name`, spread over them.

    A call's images are cut into requests of `batch`, and go to whichever server is free. A request that a server does
    not answer goes to another one; it keeps its id, so that a server which has scored it before says the same again.

    Args:
        name: of the reward in the servers' config.
        urls: such as "http://10.0.0.2:8100".
        token: the servers' bearer token; "" takes the environment's MIXGRPO_JAX_TOKEN, which no log shows.
        timeout: seconds for one request, from the first look at the server's name to the answer's last byte.
        batch: images a request, at most the servers' `--max_batch`.
        tries: failures in a row of every server (0.5 to 10 s apart) after which a call's other images have no score.
        in_flight: requests at a time to each server.

    Raises:
        ValueError: a server that answers has no such reward, takes fewer images a request, or refuses the token.
        ConnectionError: no server answers.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout} must be positive: seconds for one request")
    servers = Servers(urls, tries, in_flight)
    headers = _authorization(token or os.environ.get(TOKEN, ""))
    _look_around([server.url for server in servers.servers], headers, name, batch)

    def send(url: str, work: tuple[int, wire.Request]) -> np.ndarray:
        start, request = work
        typed = {**headers, "Content-Type": wire.ARCHIVE}
        try:
            answer = fetch(f"{url}/score", typed, timeout, wire.encode(request))
        except Unavailable as error:
            _raise_if_final(error, url, start, request.prompts)
            raise
        return _scores(url, answer, name, request)

    def score(images: np.ndarray | jax.Array, prompts: list[str], metadata: list[dict]) -> np.ndarray | Incomplete:
        images = np.asarray(images)
        cuts = [slice(start, start + batch) for start in range(0, len(images), batch)]
        work = [
            (cut.start, wire.Request(uuid.uuid4().hex, (name,), images[cut], prompts[cut], metadata[cut]))
            for cut in cuts
        ]
        return collected(servers.map(send, work), [len(request.prompts) for _, request in work])

    return Reward(name, "host", score)


def collected(answers: Sequence[np.ndarray | Missing], sizes: Sequence[int]) -> np.ndarray | Incomplete:
    """Scores of all images, from those of requests for so many each; what a request failed at is missing."""
    missing: dict[int, Missing] = {}
    values: list[np.ndarray] = []
    for answer, size in zip(answers, sizes):
        if isinstance(answer, Missing):
            start = sum(map(len, values))
            missing |= dict.fromkeys(range(start, start + size), answer)
            answer = np.full(size, np.nan, np.float32)
        values.append(answer)
    return Incomplete(np.concatenate(values), missing) if missing else np.concatenate(values)


def _authorization(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _look_around(urls: Sequence[str], headers: Mapping[str, str], name: str, batch: int) -> None:
    """Find what is wrong before the first rollout. A server that is down may come later, if there is another one."""
    errors = {}
    for url in urls:
        try:
            health = _load(url, fetch(f"{url}/health", headers, timeout=10.0))
        except Unavailable as error:
            errors[url] = error
            continue
        if health.keys() == {"status"}:
            raise ValueError(f"{url} wants a token: set {TOKEN}, or the option token")
        served, most = health.get("rewards"), health.get("max_batch")
        if not isinstance(served, list) or not isinstance(most, int):
            raise Rejected(f"{url} is no reward server: it says of itself {str(health)[:200]}")
        if name not in served:
            raise ValueError(f"{url} has no reward {name!r}, but {', '.join(map(str, served))}: check its config")
        if batch > most:
            raise ValueError(f"batch={batch}, but {url} takes {most} images a request: lower it")
    if len(errors) == len(urls):
        raise ConnectionError("no reward server answers: " + "; ".join(f"{url}: {e}" for url, e in errors.items()))


def _raise_if_final(error: Unavailable, url: str, start: int, prompts: list[str]) -> None:
    """A score that is not finite is so on every server."""
    try:
        said = json.loads(error.body)["error"]
        if said["code"] != "not_finite":
            return
        sample, message = int(said["sample"]), said["message"]
        prompt = prompts[sample]
    except (ValueError, LookupError, TypeError, RecursionError):
        return
    raise ValueError(f"sample {start + sample} ({prompt!r}): {message} ({url})")


def _scores(url: str, answer: bytes, name: str, request: wire.Request) -> np.ndarray:
    """The scores in an answer. Raises Rejected, with the server, for anything else."""
    said, count = _load(url, answer), len(request.prompts)
    if said.get("id", request.id) != request.id:
        raise Rejected(f"{url} answered another request: id {str(said['id'])[:80]!r}, not {request.id!r}")
    scores = said.get("scores")
    values = scores.get(name) if isinstance(scores, dict) else None
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise Rejected(f"{url} answered without scores of {name!r}, a list of numbers: {answer[:200]!r}")
    if len(values) != count:
        raise Rejected(f"{url} gave {len(values)} scores of {name!r} for {count} images")
    for value, prompt in zip(values, request.prompts):
        if not abs(value) <= LARGEST:
            raise Rejected(f"{url} gave the score {value!r:.40} of {name!r} for {prompt!r}: it must be finite")
    return np.array(values, np.float32)


def _load(url: str, answer: bytes) -> dict[str, Any]:
    try:
        loaded = json.loads(answer)
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        raise Rejected(f"{url} is no reward server: it answered {answer[:200]!r}")
    return loaded
