"""Reward servers on loopback, in this process."""

import contextlib
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn

from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.serving.app import make_app


def brightness(images, prompts, metadata):
    """The mean of the pixels; NaN for a black picture."""
    means = np.asarray(images, np.float32).mean((1, 2, 3))
    return np.where(means == 0, np.nan, means)


@contextlib.contextmanager
def served(app):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def serve(monkeypatch):
    """`serve(score=brightness, **limits) -> url` of a server that has the reward "bright"."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with contextlib.ExitStack() as stack:
        yield lambda score=brightness, **limits: stack.enter_context(
            served(make_app({"bright": Reward("bright", "host", score)}, **limits))
        )


@pytest.fixture
def pictures():
    """uint8 [40, 8, 8, 3], each of another brightness."""
    return np.random.default_rng(0).integers(1, 256, (40, 8, 8, 3)).astype(np.uint8)
