"""What a run writes down: metrics.jsonl, one object a line; the same for TensorBoard and Weights & Biases."""

import collections
import contextlib
import datetime
import json
import operator
import os
import pathlib
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mixgrpo_jax.runtime import boards, progress
from mixgrpo_jax.runtime.files import in_bucket, place, replaced, upload

UPLOADS = 30.0  # seconds from one to the next, of a metrics.jsonl in a bucket

# Peak dense bf16 FLOP/s of a device, by a part of `jax.Device.device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


_compiled: collections.Counter[str] = collections.Counter()


def _begin_compilation(event: str, value: float, **about: Any) -> None:
    del value  # when it begins
    if event.endswith("backend_compile_duration"):
        progress.compiling(about.get("fun_name", "").removeprefix("jit(").removesuffix(")"))


def _count_compilation(event: str, duration_secs: float, **about: Any) -> None:
    del duration_secs
    if event.endswith("backend_compile_duration"):
        _compiled[about.get("fun_name", "")] += 1
        progress.compiling(None)


jax.monitoring.register_scalar_listener(_begin_compilation)
jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def compilations(*functions: str) -> int:
    """Programs that this process has compiled of jitted functions of these names, whatever made it compile again."""
    return sum(_compiled[f"jit({name})"] for name in functions)


PHASES = {
    "rollout": "drawing samples",
    "decode": "decoding",
    "reward": "scoring",
    "update": "updating the policy",
    "evaluation": "evaluating",
    "checkpoint": "saving",
    "report": "writing the report",
}


class PhaseTimer:
    """Seconds by phase of one iteration, whose signs of life name the phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block; its results must be ready when it ends, or the next phase pays for them."""
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(phase), progress.doing(PHASES.get(phase, phase)):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """The seconds, as `time/PHASE`."""
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}


def traced(iterations: Iterable[int], folder: str | os.PathLike, start: int, count: int) -> Iterator[int]:
    """The iterations, of which `count` from `start` (from 1; 0 is none) are traced by JAX's profiler into a folder."""
    with contextlib.ExitStack() as trace:
        tracing = False
        for iteration in iterations:
            if start and not tracing and start <= iteration + 1 < start + count:
                trace.enter_context(_trace(folder))
                tracing = True
            yield iteration
            if tracing and iteration + 2 == start + count:
                trace.close()
                tracing = False


@contextlib.contextmanager
def _trace(folder: str | os.PathLike) -> Iterator[None]:
    folder = place(folder)
    with tempfile.TemporaryDirectory() if in_bucket(folder) else contextlib.nullcontext(str(folder)) as written:
        jax.profiler.start_trace(written)
        try:
            yield
        finally:
            jax.profiler.stop_trace()
        if in_bucket(folder):
            upload(pathlib.Path(written), folder)


def means(prefix: str, scores: Mapping[str, np.ndarray], groups: int = 0) -> dict[str, float]:
    """`PREFIX/NAME/mean` and `/std` of scores {name: [B]}; NaN is no score, and left out.

    Where they are of so many `groups`, also `/within`, the mean of the groups' own standard deviations.
    """
    named = {f"{prefix}/{name}": np.asarray(values) for name, values in scores.items()}
    result = {f"{name}/mean": float(scored(values).mean()) for name, values in named.items()}
    result |= {f"{name}/std": float(scored(values).std()) for name, values in named.items()}
    for name, values in named.items() if groups else ():
        result[f"{name}/within"] = float(scored([scored(group).std() for group in values.reshape(groups, -1)]).mean())
    return result


def scored(values: Any) -> np.ndarray:
    """Those of scores [B] that are there; one NaN where none is."""
    values = np.asarray(values)
    there = values[~np.isnan(values)]
    return there if there.size else np.full(1, np.nan)


def throughput(
    timer: PhaseTimer, samples: int, flops: float, devices: int, overlapped: bool = False
) -> dict[str, float]:
    """Pictures a second of an iteration, device-seconds of all its phases, and where the chip's peak is known, the
    share of it that its FLOPs make.

    The utilisation is of the seconds of rollout and update; of all, where rollouts are `overlapped` with rewards.
    """
    work = {phase: timer.seconds.get(phase, 0.0) for phase in ("rollout", "decode", "reward", "update")}
    result = {"time/iteration": sum(work.values()), "time/images_per_second": samples / sum(work.values())}
    result["time/device_seconds"] = devices * sum(timer.seconds.values())
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)
    if peak:
        busy = sum(work.values()) if overlapped else work["rollout"] + work["update"]
        result["time/utilisation"] = flops / busy / (peak * devices)
    return result


class Pace:
    """The clock of a run of `total` iterations.

    Attributes:
      begun: of `time.monotonic`, less the seconds that earlier parts of the run took.
    """

    def __init__(self, total: int, begun: float):
        self.total, self.begun = total, begun
        self._first: tuple[int, float] | None = None  # the first iteration of this process, which compiles, and its end

    def metrics(self, done: int) -> dict[str, float]:
        """Seconds since the run began, `time/wall`, and from the second iteration here those left, `time/left`."""
        now = time.monotonic()
        result = {"time/wall": now - self.begun}
        if self._first and done > self._first[0]:
            first, ended = self._first
            result["time/left"] = (now - ended) / (done - first) * (self.total - done)
        elif done:
            self._first = done, now
        return result


def brief(iteration: int, total: int, line: Mapping[str, Any]) -> str:
    """What a person reads of an iteration, in a line: as many rewards as fit, what the updates did, and the clock.

    Held-out scores, where there are some, are a second line.
    """
    forms = {"ratio/clip_fraction": "clip {:.2f}", "ratio/drift": "drift {:.0e}", "window/start": "window {}"}
    end = [form.format(line[key]) for key, form in forms.items() if key in line] + [f"{line['time/iteration']:.1f} s"]
    if "time/left" in line:
        end.append(f"{datetime.timedelta(seconds=round(line['time/left']))} left")
    head, tail = f"{iteration:>{len(str(total))}}/{total}  ", "  " + "  ".join(end)
    lines = [head + _fitting(line, ("reward/", "watched/"), progress.COLUMNS - len(head + tail)) + tail]
    if held_out := _fitting(line, ("held_out/",), progress.COLUMNS - len(head) - 10):
        lines.append(f"{'':{len(head)}}held out: {held_out}")
    return "\n".join(lines)


def _fitting(line: Mapping[str, Any], prefixes: tuple[str, ...], columns: int) -> str:
    """Means of scores, as many as fit; how many more there are."""
    means = [(key, value) for key, value in line.items() if key.startswith(prefixes) and key.endswith("/mean")]
    shown = [f"{key.split('/', 1)[1].removesuffix('/mean')} {value:.3f}" for key, value in means]
    for count in range(len(shown), 0, -1):
        text = "  ".join([*shown[:count], *[f"+{len(shown) - count}"] * (count < len(shown))])
        if len(text) <= columns:
            return text
    return ""


class MetricWriter:
    """Appends to `workdir`/metrics.jsonl, one flat object a line, written through at once, by process 0 alone.

    In a bucket, where nothing can be appended to, the file is written anew: after a while, and by `flush`, which must
    come before a checkpoint that needs its lines. `check` comes before that, and raises where it must not be written.

    On resume, lines of iterations that will be run again are dropped, all of a run that begins (`resume_at` None), and
    iterations without a line are said.

    Attributes:
      seconds: that the run had taken by its last line.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_at: int | None = None,
        check: Callable[[], None] = lambda: None,
        project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """With a `project`, a run of Weights & Biases in it gets the lines, too, and the `config` of the run."""
        self.seconds, self._boards = 0.0, list[boards.Board]()
        self.path = place(workdir) / "metrics.jsonl"
        self._writes, self._check = jax.process_index() == 0, check
        self._text, self._waits, self._written_at = "", False, 0.0  # of a file in a bucket
        if not self._writes:
            return
        end = -1 if resume_at is None else resume_at
        kept = {line["iteration"]: line for line in read(self.path) if line["iteration"] <= end}
        if missing := sorted(set(range(end + 1)) - kept.keys()):
            _warn(f"{self.path} has no line of iteration {', '.join(map(str, missing[:5]))} ({len(missing)} in all)")
        self._text = "".join(json.dumps(kept[iteration]) + "\n" for iteration in sorted(kept))
        self._rewrite()
        self.seconds = kept[max(kept)].get("time/wall", 0.0) if kept else 0.0
        self._boards = boards.found(workdir, project, config, resume_at is None)

    def write(
        self, iteration: int, metrics: Mapping[str, Any], images: Mapping[str, np.ndarray] = types.MappingProxyType({})
    ) -> None:
        """One line: the iteration (from 1), then the metrics; null for what is not finite.

        TensorBoard and Weights & Biases get its numbers and `images`, {name: [H, W, 3] uint8}.
        """
        if not self._writes:
            return
        line = {"iteration": iteration} | {name: _plain(value) for name, value in metrics.items()}
        text = json.dumps(line) + "\n"
        if in_bucket(self.path):
            self._text, self._waits = self._text + text, True
            if time.monotonic() - self._written_at > UPLOADS:
                self.flush()
        else:
            with self.path.open("a") as file:
                file.write(text)
        for board in self._boards:
            board(iteration, {k: v for k, v in line.items() if isinstance(v, int | float)}, images)

    def flush(self) -> None:
        """Write what waits."""
        if self._waits:
            self._rewrite()

    close = flush

    def _rewrite(self) -> None:
        self._check()
        with replaced(self.path) as path:
            path.write_text(self._text)
        self._waits, self._written_at = False, time.monotonic()


def read(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl; empty where there is none. What a crash has broken is left out, and said."""
    path = place(path)
    lines, broken = [], []
    data = path.read_bytes() if path.is_file() else b""
    for number, text in enumerate(data.decode(errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            lines.append(line | {"iteration": operator.index(line["iteration"])})
        except (ValueError, KeyError, TypeError):
            broken.append(number)
    if broken:
        _warn(f"{path}: line {', '.join(map(str, broken[:5]))} ({len(broken)} in all) cannot be read, and is left out")
    return lines


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)


def _plain(value: Any) -> int | float | str | None:
    if isinstance(value, int | str | None):
        return value
    return float(value) if np.isfinite(value) else None
