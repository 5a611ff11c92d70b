"""A reward that other machines compute: the client of `python -m mixgrpo_jax.serve_rewards`."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.serving import wire
from mixgrpo_jax.rewards.transport import Rejected, Servers, Unavailable, fetch

TOKEN = "MIXGRPO_JAX_TOKEN"  # the environment's variable


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
        timeout: seconds for one request.
        batch: images a request, at most the servers' `--max_batch`.
        tries: failures in a row of every server (0.5 to 10 s apart) after which a call gives up.
        in_flight: requests at a time to each server.

    Raises:
        ValueError: a server that answers has no such reward, takes fewer images a request, or refuses the token.
        ConnectionError: no server answers.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    servers = Servers(urls, tries, in_flight)
    headers = _authorization(token or os.environ.get(TOKEN, ""))
    _look_around([server.url for server in servers.servers], headers, name, batch)

    def send(url: str, work: tuple[int, wire.Request]) -> np.ndarray:
        start, request = work
        typed = {**headers, "Content-Type": wire.ARCHIVE}
        try:
            answer = fetch(f"{url}/score", typed, timeout, wire.encode(request))
        except Unavailable as error:
            _raise_if_final(error, start, request.prompts)
            raise
        return _scores(url, answer, name, len(request.prompts))

    def score(images: np.ndarray | jax.Array, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        images = np.asarray(images)
        cuts = [slice(start, start + batch) for start in range(0, len(images), batch)]
        work = [
            (cut.start, wire.Request(uuid.uuid4().hex, (name,), images[cut], prompts[cut], metadata[cut]))
            for cut in cuts
        ]
        return np.concatenate(servers.map(send, work))

    return Reward(name, "host", score)


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
        if "rewards" not in health:
            raise ValueError(f"{url} wants a token: set {TOKEN}, or the option token")
        if name not in health["rewards"]:
            raise ValueError(f"{url} has no reward {name!r}, but {', '.join(health['rewards'])}: check its config")
        if batch > health["max_batch"]:
            raise ValueError(f"batch={batch}, but {url} takes {health['max_batch']} images a request: lower it")
    if len(errors) == len(urls):
        raise ConnectionError("no reward server answers: " + "; ".join(f"{url}: {e}" for url, e in errors.items()))


def _raise_if_final(error: Unavailable, start: int, prompts: list[str]) -> None:
    """A score that is not finite is so on every server."""
    try:
        said = json.loads(error.body)["error"]
        final, sample = said["code"] == "not_finite", said.get("sample")
    except (ValueError, KeyError, TypeError):
        return
    if final:
        raise ValueError(f"sample {start + sample} ({prompts[sample]!r}): {said['message']}")


def _scores(url: str, answer: bytes, name: str, count: int) -> np.ndarray:
    try:
        scores = np.array(_load(url, answer)["scores"][name], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise Rejected(f"{url} answered without scores of {name!r}: {answer[:200]!r}") from error
    if scores.shape != (count,):
        raise Rejected(f"{url} gave {name!r} scores of shape {scores.shape} for {count} images")
    return scores


def _load(url: str, answer: bytes) -> dict[str, Any]:
    try:
        loaded = json.loads(answer)
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict):
        raise Rejected(f"{url} is no reward server: it answered {answer[:200]!r}")
    return loaded
