"""The pictures of a run: a grid of samples before and after, and the curve of its rewards."""

import os
import textwrap
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
    """One row per prompt (`columns` of them side by side): the prompt, then its picture in each of `pictures`.

    A picture is shown 60 to 256 pixels high: a small one enlarged, a large one reduced.
    """
    plt, names, per, dpi = _pyplot(), list(pictures), len(pictures) + 1, 130
    rows, (height, width) = -(-len(prompts) // columns), next(iter(pictures.values())).shape[1:3]
    high, text, gap, title = min(max(height, 60), 256) / dpi, 2.1, 0.06, 0.3  # inches
    wide = high * width / height
    across, down = columns * (text + len(names) * wide + per * gap), rows * (high + gap) + title
    figure, axes = plt.subplots(
        *(rows, per * columns),
        figsize=(across, down),
        width_ratios=[text, *[wide] * len(names)] * columns,
        gridspec_kw={"left": 0, "right": 1 - gap / across, "bottom": gap / down, "top": 1 - title / down}
        | {"wspace": gap * per * columns / (across - per * columns * gap), "hspace": gap / high},
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    for index, prompt in enumerate(prompts):
        line, left = index // columns, (index % columns) * per
        wrapped = textwrap.wrap(prompt, 38, max_lines=max(2, int(high * 7)), placeholder=" …")
        axes[line, left].text(0.97, 0.5, "\n".join(wrapped), ha="right", va="center", fontsize=7)
        for offset, name in enumerate(names, 1):
            enlarged = "nearest" if height < high * dpi else "antialiased"
            axes[line, left + offset].imshow(pictures[name][index], interpolation=enlarged, aspect="equal")
            if line == 0:
                axes[line, left + offset].set_title(name, fontsize=9)
    with replaced(path) as file:
        figure.savefig(file, dpi=dpi)
    plt.close(figure)


def curve(workdir: str | os.PathLike, name: str = "rewards.png") -> None:
    """Mean rewards by iteration, from `workdir`/metrics.jsonl: a colour each, held-out scores as points."""
    plt, lines = _pyplot(), metrics.read(place(workdir) / "metrics.jsonl")
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    colours: dict[str, str] = {}
    for prefix, style in (("reward/", "-"), ("watched/", "--"), ("held_out/", "o:")):
        series = sorted({k for line in lines for k in line if k.startswith(prefix) and k.endswith("/mean")})
        for key in series:
            label = key.removesuffix("/mean")
            colour = colours.setdefault(label.removeprefix(prefix), f"C{len(colours) % 10}")
            points = [(line["iteration"], line[key]) for line in lines if line.get(key) is not None]
            axis.plot(*zip(*points), style, color=colour, label=label, markersize=4, linewidth=1.2)
    axis.set(xlabel="iteration", ylabel="mean score")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)  # beside the lines
    with replaced(place(workdir) / name) as file:
        figure.savefig(file, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    """matplotlib, imported at the first picture: it takes a third of a command's start."""
    import matplotlib

    matplotlib.use("Agg")  # a run has no display
    from matplotlib import pyplot

    return pyplot
