"""Runs that are killed at random instants and started again, each against one that is not: the same bits.

    python -m benchmarks.kills --workdir=runs/kills

SIGKILL in start-up, rollout, update and save, and SIGTERM anywhere, of four kinds of run on the embedded task: plain,
one step off policy, by LoRA, and by two processes of which one is killed. Each kill is a line: the phase that the
process was in, and where the run had come to. At the end the whole state and metrics.jsonl, times aside, are compared
bit for bit.
"""

import contextlib
import itertools
import json
import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags, logging

from mixgrpo_jax.models.io import orbax_io
from mixgrpo_jax.runtime import distributed, metrics
from mixgrpo_jax.runtime.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "batch.prompts": 2,
    "batch.group": 4,
    "batch.updates": 2,
    "batch.micro_batch": 4,
    "batch.decode": 8,
    "evaluation.prompts": 2,
    "evaluation.batch": 2,
    "evaluation.num_steps": 2,
    "plan.num_steps": 4,
    "plan.length": 2,
    "plan.bound": 4,
    "checkpoint.every": 1,
}
KINDS = {
    "plain": {},
    "one step off policy": {"one_step_off_policy": True},
    "LoRA": {"model.lora.rank": 4},
    "two processes": {"mesh.data": 2},
}
PHASES = ("start-up", "rollout", "update", "checkpoint")
PHASE_FILE, WIDTH = "MIXGRPO_JAX_PHASE_FILE", 16
CLOCK = ("time/", "compilations")  # metrics of a process, not of the run
LIMIT = 1200  # seconds in which a process comes to a phase, or ends: machines are busy with other things


def told() -> None:
    """`train`, in a process that writes down the phase it is in."""
    before, file = metrics.PhaseTimer.__call__, os.open(os.environ[PHASE_FILE], os.O_WRONLY)

    @contextlib.contextmanager
    def timed(timer: metrics.PhaseTimer, phase: str) -> Iterator[None]:
        os.pwrite(file, phase.ljust(WIDTH).encode(), 0)
        with before(timer, phase):
            yield

    metrics.PhaseTimer.__call__ = timed
    runpy.run_module("mixgrpo_jax.train", run_name="__main__", alter_sys=True)


def start(workdir: pathlib.Path, kind: str, iterations: int) -> list[subprocess.Popen]:
    """A run's processes. Each writes its phase to WORKDIR.INDEX, and what it says is added to WORKDIR.log."""
    fields = SMALL | KINDS[kind] | {"iterations": iterations}
    arguments = [f"--config={ROOT}/configs/quickstart.py", f"--workdir={workdir}"]
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    found = []
    for index, environment in enumerate(distributed.on_loopback(2) if kind == "two processes" else [{}]):
        phase = workdir.with_suffix(f".{index}")
        phase.write_text("start-up".ljust(WIDTH))
        environment |= {PHASE_FILE: str(phase), "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")}
        command = [sys.executable, "-c", "from benchmarks.kills import told; told()", *arguments]
        with workdir.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log)
        found.append(process)
    return found


def kill(processes: list[subprocess.Popen], workdir: pathlib.Path, number: int, phase: str, rng: random.Random) -> str:
    """Kill one of a run's processes at a random instant of a phase, "" for any; the phase that it was in then."""
    victim = rng.randrange(len(processes))
    file, deadline = workdir.with_suffix(f".{victim}"), time.monotonic() + LIMIT
    seen, wanted = 0, rng.randint(1, 3)  # which one of such phases
    before = ""
    delay = rng.uniform(0.5, 12) if phase == "start-up" else rng.uniform(0, 0.15)
    while phase != "start-up" and seen < wanted and processes[victim].poll() is None:
        now = file.read_text().strip()
        seen += now != before and now in (phase or PHASES[1:])
        before = now
        time.sleep(0.002)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{workdir} did not come to {phase} in {LIMIT} s, see {workdir.with_suffix('.log')}")
    time.sleep(delay)
    now = file.read_text().strip()
    if processes[victim].poll():
        raise RuntimeError(f"{workdir} failed, see {workdir.with_suffix('.log')}")
    processes[victim].send_signal(number)
    for process in processes:
        process.wait(LIMIT)  # the others end by themselves
    return now if processes[victim].returncode else "finished"


def result(workdir: pathlib.Path) -> tuple[int, dict[str, np.ndarray], dict, list[dict]]:
    """The newest checkpoint's iteration, arrays by path and host state, and the lines of metrics.jsonl, times aside."""
    checkpoints = Checkpoints(workdir)
    host, iteration = checkpoints.restore_host(), checkpoints.latest
    checkpoints.close()
    state = arrays(workdir / "checkpoints" / str(iteration) / "state")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines]
    return iteration, state, host, lines


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Of a checkpoint, by path, by whatever processes it was saved."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), orbax_io.stored(folder))
    leaves = jax.tree_util.tree_leaves_with_path(orbax_io.restore(folder, shapes))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def compare(one: pathlib.Path, other: pathlib.Path) -> str:
    """What differs between two finished runs; "" for nothing."""
    (at, state, host, lines), (its, others, theirs, rows) = result(one), result(other)
    if (at, host, state.keys()) != (its, theirs, others.keys()):
        return f"iterations {at} and {its}, or the host states, or the trees of the states"
    differing = [path for path, leaf in state.items() if leaf.tobytes() != others[path].tobytes()]
    if differing:
        return f"{len(differing)} of {len(state)} arrays, {differing[0]} first"
    return "" if lines == rows else f"metrics.jsonl, of {len(lines)} and {len(rows)} lines"


def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)
    folder, rng, failed = pathlib.Path(_WORKDIR.value).absolute(), random.Random(_SEED.value), 0
    for kind in _KIND.value:
        # Each kill in its turn costs a kill in rollout or update one iteration at most, and gains up to three.
        kills = [(signal.SIGKILL, phase) for phase, _ in itertools.product(PHASES, range(_KILLS.value))]
        kills += [(signal.SIGTERM, "")] * _TERMS.value
        rng.shuffle(kills)
        workdir, iterations = folder / kind.replace(" ", "_"), 3 * len(kills) + 2
        workdir.mkdir(parents=True)
        for number, phase in kills:
            processes = start(workdir, kind, iterations)
            was = kill(processes, workdir, number, phase, rng)
            log = workdir / "metrics.jsonl"
            finished = sum(1 for _ in log.open()) - 1 if log.exists() else 0
            name, codes = signal.Signals(number).name, [process.returncode for process in processes]
            print(f"{kind}: {name} in {was}, after {finished} iterations; ended with {codes}", flush=True)
        straight = workdir.with_name(f"{workdir.name}_straight")
        for each in (workdir, straight):
            if any(process.wait(20 * LIMIT) for process in start(each, kind, iterations)):
                raise RuntimeError(f"{each} failed, see {each.with_suffix('.log')}")
        difference = compare(workdir, straight)
        print(f"{kind}: {len(kills)} kills in {iterations} iterations, {difference or 'the same bits'}", flush=True)
        failed += bool(difference)
    sys.exit(failed)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "A new folder.", required=True)
    _KIND = flags.DEFINE_multi_enum("kind", list(KINDS), list(KINDS), "Which runs.")
    _KILLS = flags.DEFINE_integer("kills", 4, "SIGKILLs in each phase of each run.")
    _TERMS = flags.DEFINE_integer("terms", 5, "SIGTERMs of each run.")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the instants.")
    app.run(main)
