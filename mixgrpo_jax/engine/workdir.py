"""A run's workdir and the config at hand: whether they belong together, and what has changed."""

import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mixgrpo_jax import config as configs
from mixgrpo_jax.models import families
from mixgrpo_jax.runtime import distributed
from mixgrpo_jax.runtime.files import Path, append, place, replaced

CONFIG, HISTORY = "config.json", "history.jsonl"
RECIPE = pathlib.Path(__file__).with_name("recorded.py")  # a config's file that gives a workdir's own

# What a run keeps: its model, what its data mean, the tree of its state, and what is held out. That its averages are
# those of the state is seen where that is restored.
MODEL = ("model.folder", "model.transformer", "model.lora")
KEPT = (
    *MODEL,
    *("model.image_size", "model.text_length", "model.guidance", "model.negative_prompt"),
    *("seed", "data", "plan.name", "evaluation.prompts", "optimizer.name", "optimizer.dtype"),
)
# What the first runs had without these fields.
LATER = {"model.lora.init_from": "", "model.negative_prompt": "", "plan.spacing": "trailing"}
NAMED = ("rewards", "reward_options", "averages", "terms", "plan", "objective", "select", "model.lora")  # may lack some


def check(config: Any, workdir: str | os.PathLike, *, reads: bool = False) -> dict[str, list]:
    """What a config changes of the run in a workdir, {field: [the run's, the config's]}; said, on process 0.

    A run keeps what `KEPT` names; a command that only `reads` what was trained, `MODEL`. A workdir without config.json
    has no say.

    Raises:
        ConfigError: one of these fields differs; it names both values and the remedy.
    """
    file = place(workdir) / CONFIG
    if not file.is_file():
        return {}
    recorded = LATER | dict(_fields(_read(file)))
    own = dict(_fields(json.loads(config.to_json_best_effort())))
    changed = {
        name: [recorded.get(name), own.get(name)]
        for name in sorted(recorded.keys() | own.keys())
        if recorded.get(name) != own.get(name) and (name in recorded.keys() & own.keys() or _within(name, NAMED))
    }
    changed = {name: values for name, values in changed.items() if not _moved(name, *values)}
    kept = [name for name in changed if _within(name, MODEL if reads else KEPT)]
    if kept:
        was, now = changed[kept[0]]
        others = f" (and {', '.join(kept[1:])})" if kept[1:] else ""
        remedy = "leave --config away" if reads else f"set {kept[0]} back, or begin anew in another workdir"
        raise configs.ConfigError(f"{kept[0]}={now!r}{others}: the run in {workdir} has {was!r}. To go on, {remedy}")
    if changed and distributed.is_first():
        listed = ", ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items())
        print(f"changed since the run in {workdir} began: {listed}", file=sys.stderr)
    return changed


def record(config: Any, workdir: str | os.PathLike, changed: Mapping[str, list] | None = None, at: int = 0) -> None:
    """Write the config of a run; what has changed of it since, at so many iterations, goes to its history."""
    workdir = place(workdir)
    if not distributed.is_first():
        return
    if changed:
        append(workdir / HISTORY, json.dumps({"iteration": at, "changed": changed}))
    with replaced(workdir / CONFIG) as path:
        path.write_text(config.to_json_best_effort(indent=2) + "\n")


def recorded(workdir: str | os.PathLike) -> configs.Section:
    """The config of the run in a workdir. Raises ConfigError where there is none."""
    file = place(workdir) / CONFIG
    if not file.is_file():
        raise configs.ConfigError(
            f"workdir={str(workdir)!r} holds no {CONFIG}, and no run: give a run's, or a --config"
        )
    try:
        return configs.from_values(_read(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise configs.ConfigError(f"{file}: {error}: give a --config") from None


def with_own_config(argv: list[str]) -> list[str]:
    """A command's arguments, with the config of the run in --workdir where they name no other."""
    given = [flag.removeprefix("-").removeprefix("-") for flag in argv]
    if any(flag == "config" or flag.startswith("config=") for flag in given):
        return argv
    folders = [flag.removeprefix("workdir=") for flag in given if flag.startswith("workdir=")]
    folders += [value for flag, value in zip(given, argv[1:]) if flag == "workdir"]
    return [argv[0], f"--config={RECIPE}:{folders[-1]}", *argv[1:]] if folders else argv


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise configs.ConfigError(f"{file} is broken: {error}. Put the run's own in its place") from None


def _fields(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{path}{name}.")
        elif not isinstance(value, Mapping):
            yield f"{path}{name}", value


def _within(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _moved(name: str, was: Any, now: Any) -> bool:
    """Whether a model lies elsewhere now, and no longer where it was; of a file to begin with, the run needs none."""
    if name == "model.lora.init_from":
        return bool(was) and not families.is_here(was)
    return name in ("model.folder", "model.transformer") and bool(was and now) and not families.is_here(was)
