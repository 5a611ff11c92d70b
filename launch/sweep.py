"""Run the grid of a config, and put its results into a table.

    python launch/sweep.py --config=configs/signs_sweep.py --workdir=runs/sweep --parallel=2
    python launch/sweep.py --config=configs/signs_sweep.py --workdir=runs/sweep --config.iterations=10 --dry_run
    python launch/sweep.py --config=configs/flux_sweep.py --workdir=gs://bucket/sweep \\
        --print="launch/tpu_pod.sh --zone=us-east5-a --type=v5p-64 --spot"

Beside `get_config`, the config's file has `sweep(add)`, which calls `add` for each point with the fields that differ:
`add(**{"optimizer.learning_rate": 1e-5, "seed": 1})`. A point runs `python -m mixgrpo_jax.train` in a folder of the
workdir that is named after it, with its output in log.txt there. A finished point is not run again, and a stopped one
goes on; a failed one is reported, and the others go on. The table is printed, and written to workdir/results.md; the
exit status is 1 where a point failed. `--print` prints a command of the given launcher for each unfinished point
instead, with a --name for each.
"""

import concurrent.futures
import copy
import pathlib
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.fields import listed
from mixgrpo_jax.runtime import app, files, metrics

TAIL = 15  # lines of a failed point's log that are shown


class Point(NamedTuple):
    """A point of the grid: the fields that it changes, where it runs, and how many iterations it has."""

    fields: dict[str, Any]
    workdir: files.Path
    iterations: int

    @property
    def name(self) -> str:
        """Name of the point, which its folder has too."""
        return self.workdir.name

    @property
    def flags(self) -> list[str]:
        """The fields as flags of the training command."""
        return [f"--config.{field}={value}" for field, value in self.fields.items()]

    def lines(self) -> list[dict]:
        """What is in its metrics.jsonl."""
        return metrics.read(self.workdir / "metrics.jsonl")

    def done(self) -> int:
        """Iterations that are finished."""
        return max((line["iteration"] for line in self.lines()), default=0)


def points(path: str, config: Any, workdir: files.Path) -> list[Point]:
    """The grid of the config file at `path`, on top of `config`.

    Raises:
        ConfigError: there is no grid, two points are one, or a point's field or value cannot be; the message names it.
    """
    sweep = runpy.run_path(path).get("sweep")
    if sweep is None:
        raise configs.ConfigError(f"config {path} has no sweep(add): define one beside get_config")
    grid: list[dict[str, Any]] = []
    sweep(lambda **fields: grid.append(fields))
    if not grid:
        raise configs.ConfigError(f"sweep(add) of {path} adds no point: call add(**{{field: value}}) for each")
    found = [Point(fields, workdir / name_of(fields), changed(config, fields).iterations) for fields in grid]
    twice = {point.name for point in found if sum(point.name == other.name for other in found) > 1}
    if twice:
        raise configs.ConfigError(f"sweep(add) of {path} adds {', '.join(sorted(twice))} twice: add each point once")
    return found


def name_of(fields: dict[str, Any]) -> str:
    """A point's name.

    >>> name_of({"optimizer.learning_rate": 1e-05, "seed": 1})
    'optimizer.learning_rate=1e-05,seed=1'
    """
    return ",".join(f"{field}={value}" for field, value in fields.items()).replace("/", "_").replace(" ", "")


def changed(config: Any, fields: dict[str, Any]) -> Any:
    """A copy of the config with a point's fields; ConfigError where that cannot be."""
    config = copy.deepcopy(config)
    for field, value in fields.items():
        *sections, last = field.split(".")
        section = config
        try:
            for name in sections:
                section = section[name]
            section[last]  # assigning alone would not tell an unknown field from a wrong type
            section[last] = value
        except (KeyError, TypeError) as error:
            reason = "there is no such field" if isinstance(error, KeyError) else error
            raise configs.ConfigError(f"sweep: {field}={value!r}: {reason}; see mixgrpo_jax/config.py") from None
    try:
        configs.resolve(config)
    except configs.ConfigError as error:
        raise configs.ConfigError(f"sweep: point {name_of(fields)}: {error}") from None
    return config


def command(point: Point, config: str, overrides: Sequence[str]) -> list[str]:
    """What trains a point here."""
    start = [sys.executable, "-m", "mixgrpo_jax.train", f"--config={config}", f"--workdir={point.workdir}"]
    return [*start, *overrides, *point.flags]


def launch_command(launcher: str, index: int, point: Point, config: str, overrides: Sequence[str]) -> list[str]:
    """What trains a point by one of the launch scripts."""
    name = f"{pathlib.Path(config.partition(':')[0]).stem.replace('_', '-')}-{index}"
    start = [*shlex.split(launcher), f"--name={name}", f"--config={config}", f"--workdir={point.workdir}"]
    return [*start, "--", *overrides, *point.flags]


def run(point: Point, arguments: Sequence[str]) -> bool:
    """Train a point, with its output in log.txt; True where it succeeded, and otherwise the log's end is shown."""
    point.workdir.mkdir(parents=True, exist_ok=True)
    path = point.workdir / "log.txt"
    print(f"{point.name}: started at iteration {point.done()} of {point.iterations}", flush=True)
    with path.open("a") as log:
        status = subprocess.run(arguments, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        tail = "\n".join(f"    {line}" for line in path.read_text(errors="replace").splitlines()[-TAIL:])
        print(f"{point.name}: failed with status {status}; the end of {path}:\n{tail}", flush=True)
    else:
        print(f"{point.name}: finished", flush=True)
    return status == 0


def table(found: Sequence[Point]) -> str:
    """Markdown: the fields of each point, its iterations, and its newest held-out means."""
    fields = list(dict.fromkeys(field for point in found for field in point.fields))
    newest = [
        next((line for line in reversed(point.lines()) if any(k.startswith("held_out/") for k in line)), {})
        for point in found
    ]
    scores = sorted({k for line in newest for k in line if k.startswith("held_out/") and k.endswith("/mean")})
    header = [*fields, "iterations", *(score.removesuffix("/mean") for score in scores), "at iteration"]
    rows = [
        [
            *(str(point.fields.get(field, "")) for field in fields),
            f"{point.done()}/{point.iterations}",
            *(f"{line[score]:.4f}" if score in line else "" for score in scores),
            str(line.get("iteration", "")),
        ]
        for point, line in zip(found, newest)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def main(_) -> None:
    """Run, or print, the unfinished points."""
    config = config_flags.get_config_filename(flags.FLAGS["config"])
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    workdir = files.place(_WORKDIR.value)
    if files.in_bucket(workdir) and not _PRINT.value:
        raise configs.ConfigError(
            f"--workdir={workdir} is a bucket, which takes no logs: give a folder, or --print a launcher's commands"
        )
    found = points(config.partition(":")[0], _CONFIG.value, workdir)
    left = [point for point in found if point.done() < point.iterations]
    commands = [command(point, config, overrides) for point in left]
    if _PRINT.value:
        commands = [launch_command(_PRINT.value, found.index(p), p, config, overrides) for p in left]
    if _PRINT.value or _DRY_RUN.value:
        print("\n".join(shlex.join(arguments) for arguments in commands))
        return
    with concurrent.futures.ThreadPoolExecutor(_PARALLEL.value) as pool:
        succeeded = list(pool.map(run, left, commands))
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "results.md").write_text(table(found) + "\n")
    print(table(found))
    sys.exit(0 if all(succeeded) else 1)


if __name__ == "__main__":
    _CONFIG = app.config_flag(listed)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the points' folders.", required=True)
    _PARALLEL = flags.DEFINE_integer("parallel", 1, "Points that run at a time.", lower_bound=1)
    _PRINT = flags.DEFINE_string("print", "", "A launcher with its options: print its commands, and run nothing.")
    _DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the commands that would run here, and run nothing.")
    app.run(main)
