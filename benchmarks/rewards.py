"""Reward models in JAX beside the usual ways to run them, on the same pictures: seconds a batch, and their ratios.

    python -m benchmarks.rewards
    python -m benchmarks.rewards --pictures=64 --repetitions=5

The ways are interleaved (each once, then each again), and compared within a run of this program only. What a way takes
includes everything between a batch of pictures and their scores or embeddings. To compare another model, add it to
`MODELS`.
"""

import dataclasses
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers
from absl import app, flags

from mixgrpo_jax.models import clip
from mixgrpo_jax.models.clip import vision as vision
from mixgrpo_jax.rewards import ocr
from mixgrpo_jax.rewards.preprocess import MEAN, STD, preprocess
from mixgrpo_jax.tasks.signs import data as signs

_MODELS = flags.DEFINE_list("models", None, "Names of reward models; all by default.")
_PICTURES = flags.DEFINE_integer("pictures", 192, "Pictures a batch: by default, 16 prompts with groups of 12.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 3, "How often each way is timed, after a first call.")

Ways = dict[str, Callable[[], object]]  # the first is ours


def ocr_ways(count: int) -> Ways:
    """PP-OCRv4's recognition network on `count` signs with more or less noise."""
    rng = np.random.default_rng(0)
    drawn = signs.sample_signs("test", count)
    images = np.stack([signs.photograph(sign, rng)["image"] for sign in drawn])
    numbers = [{"number": sign.number} for sign in drawn]

    prompts, dense = [""] * count, ocr.ocr_dense()

    def score(read: ocr.Read, rows: slice = slice(None)) -> np.ndarray:
        return ocr.score(images[rows], [], numbers[rows], inspect.unwrap(read))  # which remembers no pictures

    return {
        "JAX": lambda: score(ocr.read_on_device),
        "JAX, dense score": lambda: np.asarray(dense.score(images, prompts, numbers)),
        "onnxruntime": lambda: score(ocr.read),
        "onnxruntime, one at a time": lambda: [score(ocr.read, slice(i, i + 1)) for i in range(count)],
    }


def hps_ways(count: int) -> Ways:
    """HPS-v2.1's image tower, ViT-H/14 at 224 pixels with random weights in fp32, on pictures of 512 pixels."""
    config = clip.clip_h14().vision
    images = np.random.default_rng(0).integers(0, 256, (count, 512, 512, 3), np.uint8)
    params = jax.jit(vision.init, static_argnums=0)(config, jax.random.key(0))
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**dataclasses.asdict(config)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    @jax.jit
    def embed(params: Any, images: jax.Array) -> jax.Array:
        return vision.apply(config, params, preprocess(images, config.image_size, rounded=False))

    @torch.inference_mode()
    def by_torch(images: np.ndarray) -> torch.Tensor:
        pixels = torch.tensor(images).permute(0, 3, 1, 2) / 255
        resized = torch.nn.functional.interpolate(pixels, (224, 224), mode="bicubic", antialias=True)
        return model(pixel_values=(resized - mean) / std).image_embeds

    return {
        "JAX": lambda: jax.block_until_ready(embed(params, images)),
        "PyTorch": lambda: by_torch(images),
        "PyTorch, one at a time": lambda: [by_torch(image[None]) for image in images],
    }


# With the share of a batch's pictures that is enough to time it on a CPU.
MODELS: dict[str, tuple[Callable[[int], Ways], float]] = {"ocr": (ocr_ways, 1.0), "hps": (hps_ways, 1 / 24)}


def seconds(way: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def rows(model: str, count: int, repetitions: int) -> list[str]:
    """One row a way: its first call, its median, and the ratio of each repetition's seconds to ours."""
    make, share = MODELS[model]
    count = max(1, round(count * share))
    ways = make(count)
    first = {name: seconds(way) for name, way in ways.items()}
    rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(repetitions)]
    ours = next(iter(ways))
    result = []
    for name in ways:
        median = statistics.median(times[name] for times in rounds)
        ratios = sorted(times[name] / times[ours] for times in rounds)
        result.append(
            f"| {model} | {name} | {count} | {first[name]:.1f} | {count / median:.2f} "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    return result


def main(_):  # noqa: D103
    lines = [
        "| model | way | pictures | first call, s | pictures a second | s, ours = 1 (range) |",
        "|---|---|---|---|---|---|",
    ]
    for model in _MODELS.value or MODELS:
        lines += rows(model, _PICTURES.value, _REPETITIONS.value)
    print("\n".join(lines))


if __name__ == "__main__":
    app.run(main)
