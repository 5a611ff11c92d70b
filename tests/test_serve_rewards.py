import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.rewards import REWARDS, transport
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.remote import TOKEN, remote
from mixgrpo_jax.serve_rewards import build, read_token
from mixgrpo_jax.tasks.signs import verify

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from mixgrpo_jax import config

def get_config():
    base = config.base()
    base.rewards, base.watched = {"colour": 1.0}, ()
    return base
"""


def own(scale=1):
    return Reward("own", "host", lambda *_: scale)


def test_serves_what_the_config_names(monkeypatch):
    monkeypatch.setitem(REWARDS, "own", f"{__name__}:own")
    config = configs.base()
    config.rewards, config.watched = dict(colour=1.0), ("own", "colour")
    assert list(build(config)) == ["colour", "own"]
    with config.unlocked():
        config.reward_options = dict(own=dict(scale=5))
    assert build(config)["own"].score() == 5
    config.watched = ("nothing",)
    with pytest.raises(ValueError, match="reward 'nothing' is unknown"):
        build(config)


def test_other_machines_need_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    assert read_token("", "127.0.0.1") == ""
    with pytest.raises(configs.ConfigError, match="there is no token"):
        read_token("", "0.0.0.0")
    file = tmp_path / "token"
    file.write_text(" \n")
    with pytest.raises(configs.ConfigError, match="empty"):
        read_token(str(file), "0.0.0.0")
    file.write_text("s3cret\n")
    monkeypatch.setenv(TOKEN, "other")
    assert read_token(str(file), "0.0.0.0") == "s3cret"
    assert read_token("", "0.0.0.0") == "other"


class Server:
    """`python -m mixgrpo_jax.serve_rewards` on a port of its own."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.start()

    def start(self):
        (self.folder / "config.py").write_text(CONFIG)
        command = [sys.executable, "-m", "mixgrpo_jax.serve_rewards", f"--config={self.folder}/config.py"]
        with (self.folder / f"{self.port}.log").open("a") as log:
            env = os.environ | {TOKEN: "s3cret"}
            self.process = subprocess.Popen(
                [*command, f"--port={self.port}"], env=env, cwd=ROOT, stdout=log, stderr=log
            )

    def wait(self):
        while True:
            try:
                return transport.fetch(f"{self.url}/health", {}, 5)
            except transport.Unavailable:
                assert self.process.poll() is None, (self.folder / f"{self.port}.log").read_text()[-4000:]
                time.sleep(0.1)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def images(self):
        """How many images it has scored since its start."""
        text = transport.fetch(f"{self.url}/metrics", {"Authorization": "Bearer s3cret"}, 60).decode()
        lines = [line for line in text.splitlines() if line.startswith("mixgrpo_jax_reward_images_total")]
        return sum(int(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.mark.slow
def test_ten_thousand_images_through_two_servers_of_which_one_dies_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transport, "LONGEST_DELAY", 0.1)  # so that the server is noticed as soon as it is back
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (10_000, 2, 3)).astype(np.uint8)
    images = np.uint8(np.clip(colours[:, :1, None] + rng.normal(0, 40, (10_000, 8, 8, 3)), 0, 255))
    metadata = [{"plate_rgb": plate, "digits_rgb": digits} for plate, digits in colours]
    expected = np.asarray(verify.colour().score(images, [], metadata))
    assert len(np.unique(expected)) > 9_900  # so that a score in another's place is seen

    servers = [Server(tmp_path), Server(tmp_path)]
    try:
        for server in servers:
            server.wait()
        reward = remote("colour", urls=[server.url for server in servers], token="s3cret", batch=8)

        def disturb():
            while servers[0].images() < 1000:
                time.sleep(0.01)
            servers[0].kill()
            servers[0].start()

        disturber = threading.Thread(target=disturb)
        disturber.start()
        scores = [reward.score(images[:9000], ["x"] * 9000, metadata[:9000])]
        disturber.join()
        servers[0].wait()
        scores.append(reward.score(images[9000:], ["x"] * 1000, metadata[9000:]))
        np.testing.assert_allclose(np.concatenate(scores), expected, rtol=1e-4)
        assert servers[0].images() > 0, "it was not used again"
        assert servers[0].images() + servers[1].images() <= 9000 + 4 * 8  # the dead one took its 1000 along
    finally:
        for server in servers:
            server.kill()
