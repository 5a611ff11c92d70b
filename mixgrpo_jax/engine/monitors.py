"""Whether rewards are hacked: cheap statistics of a run's pictures, beside those of the policy that it began with.

What is measured changes with the prompts. So it is followed in means of groups, and its base is the mean of the first
`GROUPS` groups: in so few the policy moves little, and it draws them anyway. What has changed since is averaged over
iterations, and is told in standard deviations of the first pictures. A group's diversity also changes with the place of
the window, before which its samples are one: there each place has a base, less what had changed before the window came.
Held-out pictures are compared with those of before prompt by prompt.
"""

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mixgrpo_jax.engine.collect import Collector, Drawn
from mixgrpo_jax.engine.held_out import Assessment
from mixgrpo_jax.rewards.contract import Score
from mixgrpo_jax.rl.credit import shares
from mixgrpo_jax.runtime import distributed, report
from mixgrpo_jax.runtime.files import Path, replaced
from mixgrpo_jax.runtime.metrics import scored

WARNINGS = "warnings.jsonl"  # and a folder of pictures, warnings/
GROUPS = 16  # that a base is the mean of
RATE = 0.2  # of the moving average of changes
PART = 0.5  # of the limit by which trained rewards have to rise, and a watched one to fall
VOUCHES = 0.15  # of a change: by so much a watched reward has risen, or may have, where the change is for the better
SHOWN, PIXELS = 12, 256  # pictures of a warning, and their rows at most
THUMB = 8  # rows and columns of what diversity sees of a picture
BLOCK = 1 << 22  # values that are measured at a time


def brightness(images: np.ndarray) -> np.ndarray:
    """Mean luma, 0 to 1."""
    return _luma(images).mean((1, 2)) / 255


def saturated(images: np.ndarray) -> np.ndarray:
    """Share of the values that are 0 or 255."""
    return ((images == 0) | (images == 255)).mean((1, 2, 3))


def entropy(images: np.ndarray) -> np.ndarray:
    """Of the colours, at four levels a channel: 0 to 6 bits."""
    code = (images >> 6) @ np.array([16, 4, 1], np.uint8) + 64 * np.arange(len(images))[:, None, None]
    share = np.bincount(code.ravel(), minlength=64 * len(images)).reshape(-1, 64) / code[0].size
    return -(share * np.log2(np.maximum(share, 1e-9))).sum(1)


def sharpness(images: np.ndarray) -> np.ndarray:
    """log2(1 + s), where s is the standard deviation of the luma's Laplacian, in levels of 255."""
    y = _luma(images)
    laplacian = 4 * y[:, 1:-1, 1:-1] - y[:, :-2, 1:-1] - y[:, 2:, 1:-1] - y[:, 1:-1, :-2] - y[:, 1:-1, 2:]
    return np.log2(1 + laplacian.std((1, 2)))


def edges(images: np.ndarray) -> np.ndarray:
    """Share of the pixels whose luma is more than 32 levels from that of the next one, to the right or below."""
    y = _luma(images)
    right, below = np.abs(np.diff(y, axis=2))[:, :-1], np.abs(np.diff(y, axis=1))[:, :, :-1]
    return (np.maximum(right, below) > 32).mean((1, 2))


def periodicity(images: np.ndarray) -> np.ndarray:
    """Share of the power of the luma's gradient that its strongest frequency has; 1 of a sine."""
    _, height, width, _ = images.shape
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    twice = np.where((columns == 0) | (columns == 0.5), 1, 2)  # each other one stands for its negative too
    weight = (twice * (4 - 2 * np.cos(2 * np.pi * rows) - 2 * np.cos(2 * np.pi * columns))).astype(np.float32)
    spectrum = np.fft.rfft2(_luma(images))
    power = (spectrum.real**2 + spectrum.imag**2) * weight
    return power.max((1, 2)) / np.maximum(power.sum((1, 2)), 1.0)


def _luma(images: np.ndarray) -> np.ndarray:
    return images @ np.array([0.299, 0.587, 0.114], np.float32)


def thumbs(images: np.ndarray) -> np.ndarray:
    """Pictures as means of cells, 0 to 1, [B, D]."""
    for axis in (1, 2):
        size = images.shape[axis]
        first = np.linspace(0, size, min(THUMB, size), endpoint=False).astype(int)
        cells = np.diff(first, append=size).astype(np.float32).reshape(-1, *[1] * (3 - axis))
        images = np.add.reduceat(images, first, axis=axis, dtype=np.float32) / cells
    return images.reshape(len(images), -1) / 255


def diversity(features: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Distance of each of [B, D] to the mean of its group, [B]: the root of the mean square."""
    result = np.zeros(len(features))
    for each in np.unique(group):
        of = features[group == each]
        result[group == each] = np.sqrt(((of - of.mean(0)) ** 2).mean(1))
    return result


class Monitor(NamedTuple):
    """What is measured of pictures uint8 [B, H, W, 3], [B]; the least standard deviation that it is given; and the
    directions in which a change is bad."""

    measure: Callable[[np.ndarray], np.ndarray]
    least: float
    signs: tuple[int, ...] = (1, -1)


MONITORS = {
    "brightness": Monitor(brightness, 0.05),
    "saturated": Monitor(saturated, 0.05, (1,)),
    "entropy": Monitor(entropy, 0.2),
    "sharpness": Monitor(sharpness, 0.1),
    "edges": Monitor(edges, 0.02),
    "periodicity": Monitor(periodicity, 0.02, (1,)),
}
LEAST = {name: monitor.least for name, monitor in MONITORS.items()}


def measure(items: Iterable[tuple]) -> dict[str, dict[str, np.ndarray]]:
    """What `MONITORS` measure of pictures that come in chunks, and their `thumbs`."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*MONITORS, "thumbs")}
    for images, *_ in items:
        images = np.asarray(images)
        for block in np.array_split(images, min(len(images), 1 + images.size // BLOCK)):
            for name, monitor in MONITORS.items():
                found[name].append(monitor.measure(block))
            found["thumbs"].append(thumbs(block))
    return {"pictures": {name: np.concatenate(parts) for name, parts in found.items()}}


class Change(NamedTuple):
    """What a mean was, what it is, and the difference in standard deviations of the first pictures, with its error."""

    base: float
    now: float
    units: float
    error: float = 0.0


@dataclass
class Series:
    """A monitor, followed through a run.

    bases: by the step at which a window starts, the groups seen there, and the mean that the first policy would have.
    change: since then, averaged over iterations. moments, groups: count, sum and sum of squares of the first pictures,
    and of the means of their groups.
    """

    bases: dict[str, list[float]] = field(default_factory=dict)
    change: float = 0.0
    moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    groups: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def follow(self, value: np.ndarray, group: np.ndarray, start: np.ndarray) -> None:
        """Take in an iteration's values [B], NaN where there is none, of groups [B], whose windows start [P] there."""
        by_group, changes = means_of(value, group), []
        if sum(count for count, _ in self.bases.values()) < GROUPS:
            for moments, seen in ((self.moments, value), (self.groups, by_group)):
                for power in range(3):
                    moments[power] += float((seen[~np.isnan(seen)].astype(np.float64) ** power).sum())
        for step in np.unique(start):
            found = by_group[(start == step) & ~np.isnan(by_group)]
            count, mean = self.bases.get(str(step), (0, 0.0))
            if count >= GROUPS:
                changes += (found - mean).tolist()
            elif found.size:
                total = count + found.size
                self.bases[str(step)] = [total, mean + float((found - self.change - mean).sum()) / total]
        if changes:
            self.change += RATE * (float(np.mean(changes)) - self.change)

    def told(self, start: np.ndarray, least: float) -> Change:
        """The change of groups whose windows start there, [P]; a standard deviation is at least so much."""
        unit = max(_deviation(self.moments), least, 1e-9)
        base = float(np.mean([self.bases.get(str(step), (0, 0.0))[1] for step in start]))
        averaged = len(start) * (2 - RATE) / RATE  # groups, by their weights in the moving average
        error = _deviation(self.groups) * np.sqrt(1 / max(self.groups[0], 1) + 1 / averaged)
        return Change(base, base + self.change, self.change / unit, float(error) / unit)


def _deviation(moments: list[float]) -> float:
    count, total, squares = moments
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5 if count else 0.0


def means_of(value: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Means of groups [P] of values [B], NaN where a group has none."""
    return np.array([scored(value[group == each]).mean() for each in np.unique(group)])


def suspicious(
    changes: Mapping[str, Change], rewards: Mapping[str, float], watched: Iterable[str], limit: float
) -> dict[str, int]:
    """Monitors whose change, in standard deviations, is beyond the limit in a direction that is bad, and its sign.

    What is good changes pictures too: a watched reward that rises, or within its error may have risen, vouches for a
    change in proportion. One that falls by a part of the limit, while those that are trained on, by their shares, rise
    by as much, is suspicious itself. Rewards are here as reward/NAME. A limit of 0 finds nothing.
    """
    if not limit:
        return {}
    units = {name: change.units for name, change in changes.items()}
    held = [f"reward/{name}" for name in watched if name not in rewards and f"reward/{name}" in units]
    vouched = max((units[name] + changes[name].error for name in held), default=0.0)
    signs = {name: monitor.signs for name, monitor in MONITORS.items() if name in units}
    signs |= {name: (-1,) for name in units if name.startswith("diversity")}
    found = {}
    for name, bad in signs.items():
        size, sign = abs(units[name]), 1 if units[name] > 0 else -1
        if sign in bad and size > limit and vouched < VOUCHES * size:
            found[name] = sign
    if sum(share * units.get(f"reward/{name}", 0.0) for name, share in rewards.items()) > PART * limit:
        found |= {name: -1 for name in held if units[name] < -PART * limit}
    return found


class Hacked(RuntimeError):
    """A run that its monitors have stopped."""


class Watch:
    """The monitors of a run, on every process. `state` is what a checkpoint holds of them; None begins anew.

    Raises `Hacked` where that run was stopped, and would be again.
    """

    def __init__(self, collector: Collector, workdir: Path, state: Mapping[str, Any] | None = None):
        self.collector, self.workdir, self.options = collector, workdir, collector.settings.monitors
        state = copy.deepcopy(state or {"series": {}, "warnings": []})
        self.series = {name: Series(**series) for name, series in state["series"].items()}
        self.warnings: list[dict[str, Any]] = state["warnings"]
        self._write()  # without those of iterations that will be run again
        self.check()

    @property
    def state(self) -> dict[str, Any]:
        """What JSON can hold, as it is now."""
        series = {name: dataclasses.asdict(series) for name, series in self.series.items()}
        return {"series": series, "warnings": list(self.warnings)}

    @property
    def stops(self) -> bool:
        """Whether the run has to stop."""
        return self.options.stop and bool(self.warnings)

    def check(self) -> None:
        """Raise `Hacked` where the run has to stop."""
        if self.stops:
            last = self.warnings[-1]
            raise Hacked(f"iteration {last['iteration']}: {last['message']}. To go on, set monitors.stop=False")

    def look(self, iteration: int, drawn: Drawn, scores: Mapping[str, Score]) -> dict[str, float]:
        """Metrics of an iteration's pictures; warns of what is suspicious."""
        settings, group = self.collector.settings, self.collector.group
        chunks = list(self.collector.programs.chunks)
        values = distributed.map_rows(measure, drawn.images, chunks)["pictures"]
        features = {"diversity": values.pop("thumbs")}
        features |= {f"diversity/{name}": score.features for name, score in scores.items()}
        values |= {name: diversity(each, group) for name, each in features.items() if each is not None}
        metrics = {f"monitor/{name}": float(np.nanmean(value)) for name, value in values.items()}

        values |= {f"reward/{name}": score.value for name, score in scores.items()}
        stochastic = [steps for segment, steps in zip(settings.planner.layout, drawn.plan.segments) if segment.sde]
        nowhere = np.zeros(settings.batch.prompts, int)
        starts = dict.fromkeys(values, nowhere)
        starts |= {name: next((steps.address[0] for steps in stochastic), nowhere) for name in features}
        for name, value in values.items():
            self.series.setdefault(name, Series()).follow(value, group, starts[name])

        def furthest(name: str, sign: int) -> np.ndarray:
            images = np.concatenate([distributed.gather(chunk) for chunk in drawn.images])
            away = np.nan_to_num(sign * means_of(values[name], group), nan=-np.inf)
            return images[group[np.concatenate(chunks)] == np.argmax(away)]

        changes = {name: self.series[name].told(starts[name], LEAST.get(name, 0.0)) for name in values}
        self._tell(iteration, changes, furthest)
        return metrics

    def compare(self, iteration: int, before: Assessment | None, after: Assessment) -> dict[str, float]:
        """Metrics of held-out pictures; warns of what is suspicious beside those of before."""
        shown = (before, after) if before else (after,)
        *was, now = ({**measure([(of.images,)])["pictures"], **_named(of.scores)} for of in shown)

        def change(name: str) -> Change:
            there = ~np.isnan(was[0][name] + now[name])
            old, new = was[0][name][there].astype(np.float64), now[name][there].astype(np.float64)
            unit = max(old.std(), LEAST.get(name, 0.0), 1e-9)
            error = (new - old).std() / max(len(old), 1) ** 0.5
            return Change(old.mean(), new.mean(), (new - old).mean() / unit, error / unit)

        if was:
            changes = {name: change(name) for name in now if name in was[0] and name != "thumbs"}
            self._tell(iteration, changes, lambda name, sign: after.images[np.argsort(-sign * now[name])], "held_out/")
        return {f"monitor/held_out/{name}": float(now[name].mean()) for name in MONITORS}

    def _tell(
        self,
        iteration: int,
        changes: Mapping[str, Change],
        pictures: Callable[[str, int], np.ndarray],
        where: str = "",
    ) -> None:
        """Warn of each monitor once: of `pictures` by the monitor's name, and the direction of its change."""
        settings, told = self.collector.settings, {warning["monitor"] for warning in self.warnings}
        bad = suspicious(changes, shares(settings.rewards), settings.config.watched, self.options.limit)
        for name, sign in bad.items():
            monitor, (base, now, distance, _) = where + name, changes[name]
            if monitor in told:
                continue
            file = f"warnings/{iteration}_{monitor.replace('/', '_')}.png"
            message = (
                f"{monitor} is {now:.3g}, and was {base:.3g} of the policy that the run began with: {distance:+.1f} "
                f"standard deviations of its pictures. Look at {self.workdir / file}"
            )
            images = pictures(name, sign)[:SHOWN]
            self.warnings.append({"iteration": iteration, "monitor": monitor, "message": message})
            if distributed.is_first():
                print(f"\nWARNING: iteration {iteration}: {message}", file=sys.stderr, flush=True)
                (self.workdir / file).parent.mkdir(parents=True, exist_ok=True)
                every = -(-images.shape[1] // PIXELS)
                report.save_png(self.workdir / file, report.tile(images[:, ::every, ::every], columns=4))
        if bad:
            self._write()

    def _write(self) -> None:
        path = self.workdir / WARNINGS
        if distributed.is_first() and (self.warnings or path.exists()):
            with replaced(path) as file:
                file.write_text("".join(json.dumps(warning) + "\n" for warning in self.warnings))


def _named(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"reward/{name}": value for name, value in scores.items()}
