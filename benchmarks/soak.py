"""A long run of a tiny policy: whether memory, open files and threads grow, or iterations take longer.

    python -m benchmarks.soak --workdir=runs/soak

Prints a line every hundred iterations, and the slope of the resident memory over all but the first quarter.
"""

import os
import pathlib
import resource
import threading
import time

import jax
import numpy as np
from absl import app, flags, logging

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.models import families, flux, t5
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.runtime.metrics import MetricWriter
from mixgrpo_jax.tasks.signs.data import build_tokenizer

CONFIGS = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")


def tiny(folder: pathlib.Path, iterations: int, every: int) -> configs.Section:
    """A run of a policy with one block of each kind, whose reward is a picture's brightness."""
    sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=32)
    text = t5.t5_tiny(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    parts = {"transformer": flux.flux_small(**sizes, pooled_projection_dim=32), "text_encoder_2": text}
    model = Parts(FAMILY, parts, {"tokenizer_2": build_tokenizer()})
    families.save(folder, model, jax.tree.map(np.asarray, families.init(model, jax.random.key(0))))
    config = configs.load("mixgrpo", CONFIGS, "signs")
    config.model.folder, config.iterations, config.checkpoint.every = str(folder), iterations, every
    config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 2, 4, 2, 4
    config.plan.num_steps, config.plan.length, config.plan.bound = 3, 1, 2
    config.evaluation.prompts = config.evaluation.batch = 2
    config.rewards, config.watched = dict(jpeg_compressibility=1.0), ()
    return config


def usage() -> tuple[float, int, int]:
    """Resident MB, open files and threads of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()


def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)
    workdir, seen, write = pathlib.Path(_WORKDIR.value), [], MetricWriter.write

    def told(writer: MetricWriter, iteration: int, line: dict) -> None:
        write(writer, iteration, line)
        seen.append((time.monotonic(), *usage()))
        if iteration % 100 == 0:
            print("iteration {}: {:.1f} MB, {} files, {} threads".format(iteration, *seen[-1][1:]), flush=True)

    MetricWriter.write = told
    train.train(tiny(workdir / "policy", _ITERATIONS.value, _EVERY.value), workdir / "run")
    at, memory, files, threads = np.array(seen[len(seen) // 4 :]).T
    seconds, quarter = np.diff(at), len(at) // 4
    slope = 100 * np.polyfit(np.arange(len(memory)), memory, 1)[0]
    print(
        f"{slope:.3f} MB per 100 iterations; files {files[0]:.0f} -> {files[-1]:.0f}, threads {threads[0]:.0f} -> ",
        end="",
    )
    ratio = np.median(seconds[-quarter:]) / np.median(seconds[:quarter])
    print(f"{threads[-1]:.0f}; the last iterations take {ratio:.2f} times the first ones' seconds")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "A new folder.", required=True)
    _ITERATIONS = flags.DEFINE_integer("iterations", 2000, "Of the run.")
    _EVERY = flags.DEFINE_integer("every", 5, "Iterations between saves.")
    app.run(main)
