import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from mixgrpo_jax.engine.cost import Cost
from mixgrpo_jax.runtime import boards, metrics, report


def test_lines_are_flat_numbers_and_survive_a_restart(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    for iteration in (1, 2, 3):
        writer.write(iteration, {"reward/ocr/mean": np.float32(0.25), "nfe/rollout": 7})
    with writer.path.open("a") as file:
        file.write('{"iteration": 4, "rew')  # a crash in the middle of a line
    assert json.loads(writer.path.read_text().splitlines()[0]) == {
        "iteration": 1,
        "reward/ocr/mean": 0.25,
        "nfe/rollout": 7,
    }
    again = metrics.MetricWriter(tmp_path, resume_at=2)
    kept = [{"iteration": iteration, "reward/ocr/mean": 0.25, "nfe/rollout": 7} for iteration in (1, 2)]
    assert metrics.read(writer.path) == kept
    again.write(3, {"window/start": np.int64(1)})
    kept.append({"iteration": 3, "window/start": 1.0})
    assert writer.path.read_text() == "".join(json.dumps(line) + "\n" for line in kept)
    assert metrics.read(tmp_path / "none.jsonl") == []


def test_means_and_throughput():
    scores = {"a": np.array([1.0, 3.0], np.float32), "b": np.array([2.0, 2.0, 5.0])}
    expected = {"reward/a/mean": 2.0, "reward/a/std": 1.0, "reward/b/mean": 3.0, "reward/b/std": 2**0.5}
    assert metrics.means("reward", scores) == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in metrics.means("reward", scores).values())
    with_none = {"a": np.array([np.nan, 1.0, np.nan, 3.0], np.float32), "b": np.full(2, np.nan)}
    expected |= {"reward/b/mean": np.nan, "reward/b/std": np.nan}
    assert metrics.means("reward", with_none) == pytest.approx(expected, nan_ok=True)
    grouped = metrics.means("reward", {"a": np.array([1.0, 3.0, 5.0, np.nan, np.nan, np.nan])}, groups=3)
    assert grouped["reward/a/within"] == pytest.approx(0.5) and grouped["reward/a/mean"] == 3  # of groups that have any
    timer = metrics.PhaseTimer()
    timer.seconds = {"rollout": 1.0, "reward": 2.0, "update": 1.0}
    result = metrics.throughput(timer, samples=8, flops=1.0, devices=1)
    times = {"time/iteration": 4.0, "time/images_per_second": 2.0, "time/device_seconds": 4.0}
    assert result == times  # no peak is known of a CPU
    assert timer.metrics() == {"time/rollout": 1.0, "time/reward": 2.0, "time/update": 1.0}


@pytest.mark.parametrize(("overlapped", "busy"), [(False, 2.5), (True, 8.5)])
def test_utilisation_is_of_the_seconds_in_which_the_policy_is_at_work(monkeypatch, overlapped, busy):
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 100.0)
    timer = metrics.PhaseTimer()
    timer.seconds = {"rollout": 1.0, "decode": 1.0, "reward": 5.0, "update": 1.5, "checkpoint": 50.0}
    result = metrics.throughput(timer, samples=17, flops=120.0, devices=2, overlapped=overlapped)
    assert result == {
        "time/iteration": 8.5,
        "time/images_per_second": 2.0,
        "time/device_seconds": 117.0,  # the checkpoint's too
        "time/utilisation": pytest.approx(120.0 / busy / 200.0),
    }


@pytest.mark.parametrize(
    ("adapters", "recomputed", "update"), [(False, False, 52), (True, False, 42), (True, True, 52)]
)
def test_a_gradient_costs_two_passes_more_and_with_adapters_one(adapters, recomputed, update):
    cost = Cost(rollout=100, update=32, gradient=10)
    assert cost.work(adapters, recomputed) == {"rollout": 100, "update": update}


def test_the_clock_of_a_run_goes_on_and_what_is_left_is_told_by_what_is_done_here(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    pace = metrics.Pace(10, begun=1000.0 - 60.0)  # that earlier parts took
    assert pace.metrics(0) == {"time/wall": 60.0}
    now[0] += 10
    assert pace.metrics(4) == {"time/wall": 70.0}  # iteration 4 compiled here, and says nothing of the others
    now[0] += 5
    assert pace.metrics(5) == {"time/wall": 75.0, "time/left": 25.0}
    now[0] += 3
    assert pace.metrics(6) == {"time/wall": 78.0, "time/left": 16.0}


def test_a_line_of_meaning_fits_whatever_is_rewarded():
    line = {
        "reward/ocr/mean": 0.7512,
        "reward/ocr/std": 0.2,
        "watched/strict/mean": np.nan,
        "ratio/clip_fraction": 0.02,
    }
    line |= {"ratio/drift": 0.00312, "window/start": 3, "time/iteration": 6.13, "time/left": 161.2}
    assert metrics.brief(3, 36, line) == (
        " 3/36  ocr 0.751  strict nan  clip 0.02  drift 3e-03  window 3  6.1 s  0:02:41 left"
    )
    assert metrics.brief(1, 3, {"reward/hps/mean": 21.5, "time/iteration": 100.0}) == "1/3  hps 21.500  100.0 s"
    line |= {f"reward/{number}_of_several/mean": 0.5 for number in range(9)}
    line |= {f"held_out/{number}_of_several/mean": 0.5 for number in range(9)}
    first, second = metrics.brief(3, 36, line).splitlines()
    assert first.startswith(" 3/36  ocr 0.751  strict nan  +9  clip") and len(first) <= 100
    assert second.startswith("       held out: 0_of_several 0.500  ") and second.endswith("  +5") and len(second) <= 100


class Wandb(types.ModuleType):
    """Stands in for Weights & Biases: what it was asked."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs, self.lines = [], []

    def init(self, **options):
        self.runs.append(options)
        return types.SimpleNamespace(log=lambda values, step: self.lines.append((step, values)))

    Image = staticmethod(lambda image: ("image", image.shape))


def test_one_call_writes_a_line_and_what_boards_show(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"wandb='signs'.*pip install -e '\.\[wandb\]'"):
        boards.check("signs")
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    boards.check("signs")
    images = {"held_out": np.zeros((4, 6, 3), np.uint8)}
    writer = metrics.MetricWriter(tmp_path, project="signs", config={"seed": 7})
    writer.write(0, {"a": np.float32(0.5), "time/wall": 12.5, "b": np.nan, "c": None}, images)
    writer.write(1, {"a": 1})
    assert metrics.read(writer.path)[0] == {"iteration": 0, "a": 0.5, "time/wall": 12.5, "b": None, "c": None}
    scalars = {"iteration": 0, "a": 0.5, "time/wall": 12.5}
    assert wandb.lines == [(0, scalars | {"held_out": ("image", (4, 6, 3))}), (1, {"iteration": 1, "a": 1})]
    again = metrics.MetricWriter(tmp_path, 0, project="signs")
    assert again.seconds == 12.5
    first, second = wandb.runs
    assert first["id"] == second["id"] and first["config"] == {"seed": 7} and first["resume"] == "allow"
    metrics.MetricWriter(tmp_path, project="signs")  # another run in the same place
    assert wandb.runs[2]["id"] != first["id"]
    metrics.MetricWriter(tmp_path)
    assert len(wandb.runs) == 3


def test_tensorboard_gets_the_same(tmp_path, monkeypatch):
    said = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def write_scalars(self, step, scalars):
            said.append((step, dict(scalars)))

        def write_images(self, step, images):
            said.append((step, {name: image.shape for name, image in images.items()}))

        def flush(self):
            said.append("flush")

    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: name == "tensorflow" or None)
    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "clu", types.SimpleNamespace(metric_writers=fake))
    writer = metrics.MetricWriter(tmp_path)
    writer.write(2, {"a": 0.5, "b": None}, {"held_out": np.zeros((4, 6, 3), np.uint8)})
    assert said == [(2, {"iteration": 2, "a": 0.5}), (2, {"held_out": (4, 6, 3)}), "flush"]


def test_pictures_are_tiled_on_white():
    images = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3)
    page = report.tile(images, columns=2, scale=2, gap=1)
    expected = np.full((2 * 9 + 1, 2 * 13 + 1, 3), 255, np.uint8)
    for image, (top, left) in zip(images, [(1, 1), (1, 14), (10, 1)]):
        expected[top : top + 8, left : left + 12] = image.repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(page, expected)


def test_a_grid_shows_each_prompt_beside_its_pictures(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    before = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3)
    pictures = {"before": before, "after": 255 - before}
    report.grid(tmp_path / "grid.png", pictures, ["a", "b", "c"])
    axes = np.array(figures[0].axes).reshape(2, 6)  # two prompts a row, each with two pictures
    assert [[text.get_text() for text in axis.texts] for axis in axes[:, [0, 3]].flat] == [["a"], ["b"], ["c"], []]
    for index, place in enumerate([(0, 0), (0, 3), (1, 0)]):
        for offset, (name, images) in enumerate(pictures.items(), 1):
            axis = axes[place[0], place[1] + offset]
            (shown,) = axis.images
            np.testing.assert_array_equal(shown.get_array(), images[index])
            assert axis.get_title() == (name if place[0] == 0 else "")
    assert not any(axis.images for axis in [*axes[:, 0], *axes[:, 3], *axes[1, 4:]])
    with Image.open(tmp_path / "grid.png") as file:
        assert file.size == pytest.approx(figures[0].get_size_inches() * 130, abs=1)


def test_the_iterations_asked_for_are_traced(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics.jax.profiler, "start_trace", lambda folder: seen.append(folder))
    monkeypatch.setattr(metrics.jax.profiler, "stop_trace", lambda: seen.append("stop"))

    def run(start, count):
        seen.clear()
        for iteration in metrics.traced(range(2, 6), "profile", start, count):
            seen.append(iteration + 1)
        return list(seen)

    assert run(0, 9) == [3, 4, 5, 6]
    assert run(4, 2) == [3, "profile", 4, 5, "stop", 6]
    assert run(1, 3) == ["profile", 3, "stop", 4, 5, 6]  # of a run that goes on from its second
    assert run(6, 3) == [3, 4, 5, "profile", 6, "stop"]


def test_a_begun_run_has_no_lines_and_a_resumed_one_says_which_it_lacks(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 0}\n[1]\n{"iteration": 3, "a": NaN}\n{"iteration": 4}\n{"iterat')
    metrics.MetricWriter(tmp_path, resume_at=3).write(4, {"a": np.float32(np.nan), "b": np.inf, "c": None})
    said = capsys.readouterr().err
    assert "line 3, 6 (2 in all) cannot be read" in said and "no line of iteration 1, 2 (2 in all)" in said
    assert [line["iteration"] for line in metrics.read(path)] == [0, 3, 4]
    assert path.read_text().splitlines()[-1] == '{"iteration": 4, "a": null, "b": null, "c": null}'
    metrics.MetricWriter(tmp_path)
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
