"""Which monitors warn, and when: of rewards that pay for what nobody wants, and of the task's own.

    python -m benchmarks.monitors --workdir=runs/monitors --seeds=1,2,3

The runs are the quickstart's, with 4 prompts x 8 samples an iteration. Those of bad rewards take 20 iterations at four
times its rate, which does not fall: in so few the pictures have to be bad. A run that is there already is not done
again.
"""

import json
import pathlib

import numpy as np
from absl import app, flags

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.runtime import metrics

CONFIGS = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")
BAD, HONEST = ("noise", "darkness", "one_picture", "grid"), ("signs", "scenes")


def noise(images, prompts, metadata):
    """How much each value differs from the one to its right."""
    return np.abs(np.diff(np.asarray(images, np.float32), axis=2)).mean((1, 2, 3)) / 255


def darkness(images, prompts, metadata):
    """How far from white a picture is."""
    return 1 - np.asarray(images, np.float32).mean((1, 2, 3)) / 255


def one_picture(images, prompts, metadata):
    """How near each picture is to one and the same, a ramp from black to white."""
    images = np.asarray(images, np.float32) / 255
    ramp = np.linspace(0, 1, images.shape[2])[:, None]
    return -np.sqrt(((images - ramp) ** 2).mean((1, 2, 3)))


def grid(images, prompts, metadata):
    """Stripes of four pixels, upright and lying, in one phase: that of a token's own pixels."""
    grey = np.asarray(images, np.float32).mean(3) / 255
    waves = [np.cos(np.pi * (np.arange(size) / 2 + 0.25)) / size for size in grey.shape[1:]]
    return grey.mean(1) @ waves[1] + grey.mean(2) @ waves[0]


def run_config(kind: str, seed: int, iterations: int = 0):
    """The config of a run of a bad reward, or of a task's own."""
    config = configs.load("quickstart", CONFIGS, *(["scenes"] if kind == "scenes" else []))
    config.seed = seed
    config.batch.prompts, config.batch.group = 4, 8
    config.evaluation.prompts = config.evaluation.batch = 64
    if kind in BAD:
        config.iterations, config.optimizer.final_rate = 20, 1.0
        config.optimizer.learning_rate *= 4
        config.rewards = {kind: 1.0}
        config.reward_options = {kind: dict(kind="function", path=f"{__file__}:{kind}")}
    config.iterations = iterations or config.iterations
    return config


def warnings(workdir: pathlib.Path) -> list[dict]:
    """Those of a run."""
    path = workdir / "warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(_):  # noqa: D103
    for kind in _KINDS.value:
        for seed in map(int, _SEEDS.value):
            config, workdir = run_config(kind, seed), pathlib.Path(_WORKDIR.value, f"{kind}_{seed}")
            if len(metrics.read(workdir / "metrics.jsonl")) <= config.iterations:
                train.train(config, workdir)
            told = ", ".join(f"{each['monitor']} at {each['iteration']}" for each in warnings(workdir))
            print(f"{kind} {seed}: {told or 'nothing'}", flush=True)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
    _KINDS = flags.DEFINE_list("kinds", [*BAD, *HONEST], "Rewards that pay for what nobody wants, or tasks.")
    _SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds.")
    app.run(main)
