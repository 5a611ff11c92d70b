"""The pictures of a run: a grid of samples before and after, and the curve of its rewards."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mixgrpo_jax.runtime import metrics
from mixgrpo_jax.runtime.files import place, replaced


def tile(images: np.ndarray, columns: int, scale: int = 2, gap: int = 4) -> np.ndarray:
    """Images [B, H, W, 3] uint8 in rows of `columns` on white, each pixel enlarged `scale` times."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    page = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (gap + (index // columns) * (height + gap), gap + (index % columns) * (width + gap))
        page[top : top + height, left : left + width] = image
    return page


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write one picture [H, W, 3] uint8."""
    with replaced(path) as file:
        Image.fromarray(image).save(file)


def grid(path: str | os.PathLike, pictures: Mapping[str, np.ndarray], prompts: Sequence[str], columns: int = 2) -> None:
    """One row per prompt (`columns` of them side by side): the prompt, then its picture in each of `pictures`."""
    plt, names, per = _pyplot(), list(pictures), len(pictures) + 1
    rows = -(-len(prompts) // columns)
    figure, axes = plt.subplots(rows, per * columns, figsize=(2.1 * per * columns, 0.62 * rows + 0.35), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, prompt in enumerate(prompts):
        line, left = index // columns, (index % columns) * per
        axes[line, left].text(1.0, 0.5, prompt, ha="right", va="center", fontsize=7)
        for offset, name in enumerate(names, 1):
            axes[line, left + offset].imshow(pictures[name][index], interpolation="nearest", aspect="equal")
            if line == 0:
                axes[line, left + offset].set_title(name, fontsize=9)
    figure.tight_layout(pad=0.3)
    with replaced(path) as file:
        figure.savefig(file, dpi=130)
    plt.close(figure)


def curve(workdir: str | os.PathLike, name: str = "rewards.png") -> None:
    """Mean rewards by iteration, from `workdir`/metrics.jsonl; held-out scores as points."""
    plt, lines = _pyplot(), metrics.read(place(workdir) / "metrics.jsonl")
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for prefix, style in (("reward/", "-"), ("watched/", "--"), ("held_out/", "o-")):
        series = sorted({k for line in lines for k in line if k.startswith(prefix) and k.endswith("/mean")})
        for key in series:
            points = [(line["iteration"], line[key]) for line in lines if line.get(key) is not None]
            axis.plot(*zip(*points), style, label=key.removesuffix("/mean"), markersize=4, linewidth=1.2)
    axis.set(xlabel="iteration", ylabel="mean score")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    with replaced(place(workdir) / name) as file:
        figure.savefig(file, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    """matplotlib, imported at the first picture: it takes a third of a command's start."""
    import matplotlib

    matplotlib.use("Agg")  # a run has no display
    from matplotlib import pyplot

    return pyplot
