"""A run on meshes of eight virtual devices, and by two processes of four, beside the same run on one device.

    python -m benchmarks.meshes --workdir=runs/meshes
    python -m benchmarks.meshes --workdir=runs/meshes --meshes=data=8 -- --config.iterations=2

Prints how far the metrics get from those of one device: the largest difference over all iterations. What follows `--`
goes to every run of `train`. A run that has finished is not repeated.
"""

import os
import pathlib
import subprocess
import sys

from absl import app, flags

from mixgrpo_jax.runtime import distributed, metrics
from mixgrpo_jax.runtime.mesh import virtual_devices

METRICS = (
    *("reward/{}/mean", "advantage/abs_mean", "loss/total", "grad_norm"),
    *("ratio/max_deviation", "velocity/rollout_deviation", "held_out/{}/mean"),
)

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
_CONFIG = flags.DEFINE_string("config", "configs/quickstart.py", "The recipe.")
_MESHES = flags.DEFINE_list(
    "meshes",
    ["data=8", "fsdp=8", "tensor=4 data=2", "context=4 data=2", "data=2 fsdp=2 tensor=2", "fsdp=4 context=2"],
    "Meshes, separated by commas: sizes of axes, separated by spaces; the rest are 1.",
)
_PROCESSES = flags.DEFINE_list("processes", ["data=2 fsdp=4"], "Meshes of two processes.")


def run(workdir: pathlib.Path, mesh: str, devices: int, processes: int, arguments: list[str]) -> list[dict]:
    """The metrics of a run on `mesh`, whose processes have so many devices each. Raises RuntimeError."""
    sizes = dict(data="1") | dict(size.split("=") for size in mesh.split())
    settings = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    command = [sys.executable, "-m", "mixgrpo_jax.train", f"--config={_CONFIG.value}", f"--workdir={workdir}"]
    workdir.mkdir(parents=True, exist_ok=True)
    started = []
    for index, told in enumerate(distributed.on_loopback(processes)):
        env = os.environ | virtual_devices(devices) | told
        with (workdir / f"{index}.log").open("w") as log:
            started.append(subprocess.Popen([*command, *settings, *arguments], env=env, stdout=log, stderr=log))
    for process in started:
        if process.wait():
            raise RuntimeError(f"a run has failed: see {workdir}/*.log")
    return metrics.read(workdir / "metrics.jsonl")


def row(name: str, lines: list[dict], one: list[dict] | None = None) -> str:
    """The largest magnitude of each metric over a run, or with `one`, of its difference from that run's."""
    cells = []
    for key in columns(lines):
        values = [line[key] for line in lines if key in line]
        beside = [line[key] for line in one if key in line] if one else [0.0] * len(values)
        cells.append(f"{max(abs(a - b) for a, b in zip(values, beside, strict=True)):.1e}")
    return f"| {' | '.join([name, *cells])} |"


def columns(lines: list[dict]) -> list[str]:
    """Names of the metrics compared: METRICS, of each reward there is."""
    names = dict.fromkeys(key for line in lines for key in line)
    patterns = [metric.split("{}") for metric in METRICS]
    return [name for name in names if any(name.startswith(p[0]) and name.endswith(p[-1]) for p in patterns)]


def main(argv):  # noqa: D103
    workdir = pathlib.Path(_WORKDIR.value)
    one = run(workdir / "one", "", 1, 1, argv[1:])
    rows = [f"| {' | '.join(['', *columns(one)])} |", "|---" * (1 + len(columns(one))) + "|", row("largest value", one)]
    for processes, meshes in ((1, _MESHES.value), (2, _PROCESSES.value)):
        for mesh in meshes:
            name = f"{mesh}, {processes} process{'es' * (processes > 1)}"
            lines = run(workdir / f"{mesh.replace(' ', '-')}-{processes}", mesh, 8 // processes, processes, argv[1:])
            rows.append(row(name, lines, one))
    print("\n".join(rows))


if __name__ == "__main__":
    app.run(main)
