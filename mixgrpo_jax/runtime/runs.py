"""What runs have written into their workdirs, read back for their report."""

import json
import os
import pathlib
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mixgrpo_jax.runtime import metrics
from mixgrpo_jax.runtime.files import Path, place

BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # what reading a torn .npz raises
HELD_OUT, PROMPTS = "held_out", "prompts.json"  # in a workdir: pictures and scores by iteration, and their prompts


class Frame(NamedTuple):
    """What was drawn for the held-out prompts at an iteration: its file, and the scores {name: [N]} of all of them."""

    iteration: int
    path: Path
    scores: dict[str, np.ndarray]

    def images(self) -> np.ndarray:
        """The pictures [K, H, W, 3] uint8 of the first K of the prompts."""
        return _arrays(self.path, pictures=True)["images"]


class Run(NamedTuple):
    """What a workdir says of its run."""

    name: str
    lines: list[dict]
    config: dict[str, Any]
    warnings: list[dict]
    changes: list[dict]
    prompts: list[str]
    frames: list[Frame]


def find(workdirs: Sequence[str | os.PathLike]) -> list[Path]:
    """The runs' folders: those given, and in place of one that holds runs, as a sweep's does, these.

    Raises ValueError where a folder is no run's and holds none.
    """
    found: list[Path] = []
    for workdir in map(place, workdirs):
        inside = [workdir] if _has_run(workdir) else []
        if not inside and workdir.is_dir():
            inside = sorted(folder for folder in workdir.iterdir() if _has_run(folder))
        if not inside:
            raise ValueError(f"workdir={str(workdir)!r} holds no metrics.jsonl, nor does a folder in it: give a run's")
        found += inside
    return list(dict.fromkeys(found))


def _has_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file()


def names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with those above where two have the same."""
    parts = [pathlib.PurePosixPath(os.path.abspath(folder)).parts for folder in folders]
    depth = next(d for d in range(1, 99) if len({p[-d:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def labels(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin with.

    >>> labels(["rate=1e-05,seed=1", "rate=1e-04,seed=1"]), labels(["a"])
    (['1e-05,seed=1', '1e-04,seed=1'], ['a'])
    """
    ends = [found.end() for found in re.finditer("[=,/_]", names[0])] if len(names) > 1 else []
    same = max((end for end in ends if all(name.startswith(names[0][:end]) for name in names)), default=0)
    return [name[same:] or name for name in names]


def read(workdir: Path, name: str, pictures: int = 12) -> Run:
    """All of it, with so many pictures of warnings; what is broken is left out, and said."""
    lines, prompts = metrics.read(workdir / "metrics.jsonl"), workdir / HELD_OUT / PROMPTS
    config = workdir / "config.json"
    frames = []
    for line in lines:
        at = line["iteration"]
        places = [workdir / HELD_OUT / f"{at}.npz"] + [workdir / "before.npz"] * (at == 0)
        file = next((path for path in places if path.is_file()), None)
        if file and any(key.startswith("held_out/") for key in line):
            try:
                frames.append(Frame(at, file, _arrays(file)))
            except BROKEN as error:
                print(f"WARNING: {file} cannot be read, and is left out of the report: {error}", file=sys.stderr)
    return Run(
        name,
        lines,
        dict(_flat(json.loads(config.read_text()))) if config.is_file() else {},
        _warnings(workdir, pictures),
        metrics.read(workdir / "history.jsonl"),
        json.loads(prompts.read_text()) if prompts.is_file() else [],
        frames,
    )


def _warnings(workdir: Path, pictures: int) -> list[dict]:
    """Those of monitors, the first of them with their pictures."""
    warnings = metrics.read(workdir / "warnings.jsonl")
    for warning in warnings[:pictures]:
        picture = workdir / "warnings" / f"{warning['iteration']}_{str(warning.get('monitor')).replace('/', '_')}.png"
        if picture.is_file():
            with picture.open("rb") as file, Image.open(file) as image:
                warning["picture"] = np.asarray(image.convert("RGB"))
    return warnings


def _arrays(path: Path, pictures: bool = False) -> dict[str, np.ndarray]:
    """The scores of a file of `Assessment.save`, or its pictures."""
    with path.open("rb") as opened, np.load(opened) as file:
        return {name: file[name] for name in file.files if (name == "images") == pictures}


def _flat(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
