"""The report of runs: one HTML file with their charts, pictures, costs and settings, which needs no network."""

import base64
import functools
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mixgrpo_jax.runtime import distributed, metrics
from mixgrpo_jax.runtime.files import place, replaced
from mixgrpo_jax.runtime.intervals import Interval, bootstrap, paired
from mixgrpo_jax.runtime.runs import Frame, Run, find, labels, names, read

ASSETS = pathlib.Path(__file__).parents[1] / "assets" / "report"
SECTIONS = (  # a metric goes to the first that has a prefix of its name
    ("Held-out scores", ("held_out/",), "Means over prompts that are not trained on; the band is the 95% interval."),
    ("Rewards in training", ("reward/", "watched/"), "Means of an iteration; the band is the spread within groups."),
    ("Monitors", ("monitor/",), ""),
    ("Updates", ("ratio/", "kl/", "mse/", "grad_norm", "param_norm", "loss/", "velocity/", "optimizer/"), ""),
    ("Window, evaluations, advantages", ("window/", "nfe/", "advantage/"), ""),
    ("Time", ("time/",), "Seconds by phase, and throughput. The first iteration compiles, and may lie above."),
    ("Other", ("",), ""),
)
BESIDE = 5  # settings that may differ and stand beside the runs; of more, the scores would be out of sight
POINTS = 1200  # of a curve; several runs share them
WARNINGS = 12  # of which pictures are shown, of all runs together
STRIP = 12  # prompts whose pictures are shown over time
BUDGET = 3_300_000  # characters of all held-out pictures together
# Tried in turn until the pictures fit: their longest edge in pixels, evaluations over time, prompts before and after.
LEVELS = (
    (512, 16, 512),
    (320, 16, 96),
    (256, 12, 96),
    (256, 8, 48),
    (192, 8, 48),
    (128, 6, 24),
    (96, 4, 12),
    (64, 2, 6),
)


def refresh_report(workdir: str | os.PathLike) -> None:
    """Write a run's report.html, on process 0. That it fails is a warning: no run ends by it."""
    if distributed.is_first():
        try:
            write(place(workdir) / "report.html", [workdir])
        except Exception as error:
            print(f"WARNING: report.html is not written: {type(error).__name__}: {error}", file=sys.stderr)


def write(path: str | os.PathLike, workdirs: Sequence[str | os.PathLike]) -> None:
    """Write the report of one run, or of several side by side. Raises ValueError as `find` does."""
    import jinja2

    found = find(workdirs)
    runs = [read(workdir, name, WARNINGS // len(found)) for workdir, name in zip(found, names(found))]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True)
    environment.filters |= {"encoded": encoded, "number": number, "seconds": duration}
    environment.filters["text"] = lambda value: "''" if value == "" else value
    fields = sorted({name for run in runs for name in run.config})
    values = {name: [run.config.get(name) for run in runs] for name in fields}
    differing = {name: row for name, row in values.items() if any(value != row[0] for value in row)}
    short = labels([run.name for run in runs])
    data = {"sections": charts(runs), "runs": pictures(runs), "labels": short}
    result = [results(run) for run in runs]
    html = environment.get_template("page.html").render(
        runs=runs,
        labels=short,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        written=time.strftime("%Y-%m-%d %H:%M"),
        results=result,
        score_names=list(dict.fromkeys(row["name"] for rows in result for row in rows)),
        costs=[cost(run) for run in runs],
        phases=tuple(metrics.PHASES),
        config=values,
        differing=differing,
        beside=differing if len(differing) <= BESIDE else {},
        sections=data["sections"],
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        asset=lambda name: (ASSETS / name).read_text(),
    )
    with replaced(path) as file:
        file.write_text(html, encoding="utf-8")


def results(run: Run) -> list[dict[str, Any]]:
    """Each held-out score before and after, with intervals, and whether it is trained on."""
    held_out = [line for line in run.lines if any(key.startswith("held_out/") for key in line)]
    if not held_out:
        return []
    first, last = held_out[0], held_out[-1]
    rows = []
    for key in [key for key in last if key.startswith("held_out/") and key.endswith("/mean")]:
        name = key.split("/", 1)[1].removesuffix("/mean")
        there = {frame.iteration: frame.scores[name] for frame in run.frames if name in frame.scores}
        before, after = (_interval(there.get(line["iteration"]), line.get(key)) for line in (first, last))
        change = Interval(after.mean - before.mean, np.nan, np.nan)
        if {first["iteration"], last["iteration"]} <= there.keys():
            change = paired(there[first["iteration"]], there[last["iteration"]]).change
        rows.append(
            {"name": name, "trained": f"rewards.{name}" in run.config, "at": last["iteration"]}
            | {"before": before, "after": after, "change": change if first is not last else None}
        )
    return rows


def _interval(scores: np.ndarray | None, mean: float | None) -> Interval:
    """Of scores; where they were not kept, their mean without one."""
    if scores is not None:
        return _bootstrap(np.asarray(scores, np.float64).tobytes())
    return Interval(np.nan if mean is None else mean, np.nan, np.nan)


@functools.lru_cache(maxsize=10_000)  # a run writes its report anew at every evaluation, of the same scores and more
def _bootstrap(scores: bytes) -> Interval:
    return bootstrap(np.frombuffer(scores))


def cost(run: Run) -> dict[str, Any]:
    """What a run has spent: evaluations of the model, device-seconds, and seconds by phase."""

    def total(key: str) -> float:
        return sum(line.get(key) or 0 for line in run.lines)

    return {
        "iterations": max((line["iteration"] for line in run.lines), default=0),
        "evaluations": {phase: total(f"nfe/{phase}") for phase in ("rollout", "update", "gradient")},
        "device_seconds": total("time/device_seconds"),
        "seconds": {phase: total(f"time/{phase}") for phase in metrics.PHASES},
    }


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The sections of charts: each metric of any run, with a curve of each run; what never changes is text."""
    sections: list[dict[str, Any]] = [{"title": t, "note": note, "charts": [], "same": []} for t, _, note in SECTIONS]
    keys = dict.fromkeys(key for run in runs for line in run.lines for key in line if key != "iteration")
    for key in keys:
        stem, _, kind = key.rpartition("/")
        name = stem if kind == "mean" and f"{stem}/std" in keys else key
        if kind in ("std", "within") and f"{stem}/mean" in keys:
            continue  # the band of the mean
        curves = [_curve(run, key, POINTS // len(runs) + 1) for run in runs]
        values = {value for curve in curves for value in curve["y"] if value is not None}
        index = next(i for i, (_, prefixes, _) in enumerate(SECTIONS) if key.startswith(prefixes))
        if len(values) == 1 and any(len(curve["y"]) > 1 for curve in curves):
            sections[index]["same"].append(f"{name} {number(*values)}")
        elif values:
            top = None
            if key.startswith("time/"):
                top = max((value for curve in curves for value in curve["y"][1:] if value is not None), default=None)
            sections[index]["charts"].append({"title": name, "curves": curves, "top": top})
    return [section for section in sections if section["charts"] or section["same"]]


def _curve(run: Run, key: str, points: int) -> dict[str, list]:
    """A metric by iteration, as means of so many neighbours that `points` are enough; null where there is none."""
    lines = [line for line in run.lines if isinstance(line.get(key, ""), int | float | None)]
    stem, at = key.removesuffix("/mean"), np.array([line["iteration"] for line in lines])
    mean, low, high = np.array([line[key] for line in lines], float), None, None
    if key.startswith("held_out/"):
        scores = {frame.iteration: frame.scores.get(stem.split("/", 1)[1]) for frame in run.frames}
        found = [_interval(scores.get(iteration), None) for iteration in at]
        low, high = (np.array([getattr(each, end) for each in found], float) for end in ("low", "high"))
    elif key.startswith(("reward/", "watched/")):
        spread = np.array([line.get(f"{stem}/within", line.get(f"{stem}/std")) for line in lines], float)
        low, high = mean - spread, mean + spread
    size = -(-len(at) // points)
    curve = {"x": at[size - 1 :: size].tolist() if size else []}
    for name, values in {"y": mean, "low": low, "high": high}.items():
        if values is not None and not (name != "y" and np.isnan(values).all()):
            curve[name] = [_plain(part) for part in np.split(values, range(size, len(values), size))] if size else []
    curve["x"] += at[-1:].tolist() * (len(curve["y"]) - len(curve["x"]))
    return curve


def _plain(values: Any) -> float | None:
    """The mean of what is finite, of five digits; None where nothing is."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return float(f"{values.mean():.5g}") if values.size else None


def pictures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's pictures by iteration with their scores, as many and as large as the file may hold."""
    for level in LEVELS:
        shown = []
        for run in runs:
            shown.append(_shown(run, *level, BUDGET // len(runs)))
            if shown[-1] is None:
                break
        else:
            return [{"name": run.name, **each} for run, each in zip(runs, shown) if each is not None]
    return [{"name": run.name, "scores": [], "prompts": {}, "frames": []} for run in runs]


def _shown(run: Run, edge: int, frames: int, pairs: int, budget: int) -> dict[str, Any] | None:
    """A run's pictures at a level; None where they are over budget."""
    if not run.frames:
        return {"scores": [], "prompts": {}, "frames": []}
    first, last = run.frames[0], run.frames[-1]
    common = min(len(first.images()), len(last.images()))
    strip, ends, spent, result = range(min(STRIP, common)), _extremes(first, last, common, pairs), 0, []
    for index in np.unique(np.linspace(0, len(run.frames) - 1, frames).round().astype(int)):
        frame, rows = run.frames[index], {}
        images = frame.images()
        for prompt in strip if 0 < index < len(run.frames) - 1 else sorted({*strip, *ends}):
            if prompt < len(images):
                source = encoded(images[prompt], edge)
                spent += len(source)
                if spent > budget:
                    return None
                rows[str(prompt)] = {"src": source, "scores": [_plain(s[prompt]) for s in frame.scores.values()]}
        result.append({"iteration": frame.iteration, "pictures": rows})
    prompts = {str(prompt): run.prompts[prompt] for prompt in sorted({*strip, *ends}) if prompt < len(run.prompts)}
    return {"scores": list(last.scores), "strip": list(map(str, strip)), "prompts": prompts, "frames": result}


def _extremes(first: Frame, last: Frame, common: int, count: int) -> set[int]:
    """Of the first `common` prompts the `count` whose scores changed most, half of them for the better."""
    change = np.zeros(common)
    for name in first.scores.keys() & last.scores.keys():
        each = np.nan_to_num(last.scores[name][:common] - first.scores[name][:common])
        change += each / (each.std() or 1)
    order = np.argsort(change, kind="stable")
    return set(order.tolist()) if count >= common else {*order[: count // 2].tolist(), *order[-(count // 2) :].tolist()}


def encoded(image: np.ndarray, edge: int) -> str:
    """A picture [H, W, 3] uint8 as a data URI, no longer than `edge`; exact where it is small."""
    picture, data = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    picture.save(data, "WEBP", lossless=max(image.shape) <= 64, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def number(value: Any, digits: int = 4) -> str:
    """A number for people; a dash for what is none.

    >>> number(0.123456), number(1920.0), number(float("nan"))
    ('0.1235', '1,920', '–')
    """
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if value == int(value) else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(3.25), duration(75), duration(7260)
    ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
