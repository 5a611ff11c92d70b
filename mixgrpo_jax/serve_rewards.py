"""Serve a config's rewards over HTTP, for runs on other machines.

    python -m mixgrpo_jax.serve_rewards --config=configs/signs.py --port=8100

Needs `pip install -e '.[serve]'`. Serves what the config names in `rewards` and `watched`:

    POST /score    {"id": ..., "scores": {reward: [B]}} of the images in the body; see rewards/serving/wire.py
    GET  /health   whether it lives, and what it serves
    GET  /metrics  counts for Prometheus

With a token, in the environment's MIXGRPO_JAX_TOKEN or in a file (--token_file), requests must bear it as
`Authorization: Bearer ...`; without one, only this machine is served. Errors are {"error": {"code", "message", ...}}:
400 with the `field` that cannot be read, 401, 408 for a body that is late, 413 over a limit, 503 with Retry-After when
busy, and 500 with the `reward`, and the `sample` whose score is not finite.
"""

import os
import pathlib
from typing import Any

from absl import flags

from mixgrpo_jax.config import ConfigError
from mixgrpo_jax.engine.fields import listed
from mixgrpo_jax.rewards import scoring
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.remote import TOKEN
from mixgrpo_jax.runtime import app


def build(config: Any) -> dict[str, Reward]:
    """The rewards that a config names, trained on or watched, by name. Raises ValueError as `scoring.build` does."""
    names = dict.fromkeys([*config.rewards, *config.watched])
    return {reward.name: reward for reward in scoring.build(names, config.reward_options)}


def read_token(token_file: str, host: str) -> str:
    """The token in the file, or else in the environment; "" if there is none, and `host` is reached from here alone.

    Raises:
        ConfigError: an empty file, or an open door.
    """
    token = pathlib.Path(token_file).read_text().strip() if token_file else os.environ.get(TOKEN, "")
    if token_file and not token:
        raise ConfigError(f"token_file={token_file!r} is empty")
    if not token and host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(f"host={host!r} lets other machines in, and there is no token: set {TOKEN}, or --token_file")
    return token


def main(_):  # noqa: D103
    from mixgrpo_jax.rewards.serving.app import make_app, serve  # or it says what is not installed

    token = read_token(_TOKEN_FILE.value, _HOST.value)
    limits = _MAX_BATCH.value, _MAX_QUEUE.value, _MAX_BYTES.value, _MAX_SECONDS.value
    web = make_app(build(_CONFIG.value), token, *limits)
    serve(web, _HOST.value, _PORT.value)


if __name__ == "__main__":
    _CONFIG = app.config_flag(listed)
    _HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines in.")
    _PORT = flags.DEFINE_integer("port", 8100, "Port to listen at.")
    _TOKEN_FILE = flags.DEFINE_string("token_file", "", "File with the token; without it, the environment's.")
    _MAX_BATCH = flags.DEFINE_integer("max_batch", 64, "Images scored at once, and the most that a request may hold.")
    _MAX_QUEUE = flags.DEFINE_integer("max_queue", 64, "Requests in hand, beyond which others are told to come again.")
    _MAX_BYTES = flags.DEFINE_integer("max_bytes", 256 << 20, "Of a request's body, and of its decoded images.")
    _MAX_SECONDS = flags.DEFINE_float("max_seconds", 60.0, "In which the whole of a request's body has to come.")
    app.run(main)
