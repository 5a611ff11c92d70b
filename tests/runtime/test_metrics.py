import json

import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax.runtime import metrics, report


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
    assert metrics.means("reward", {"a": np.array([1.0, 3.0])}) == {"reward/a/mean": 2.0, "reward/a/std": 1.0}
    timer = metrics.PhaseTimer()
    timer.seconds = {"rollout": 1.0, "reward": 2.0, "update": 1.0}
    result = metrics.throughput({"nfe/rollout": 1, "nfe/update": 1}, timer, samples=8, flops=1.0, devices=1)
    assert result == {"time/iteration": 4.0, "time/images_per_second": 2.0}  # no peak is known of a CPU
    assert timer.metrics() == {"time/rollout": 1.0, "time/reward": 2.0, "time/update": 1.0}


def test_utilisation_counts_a_gradient_as_three_evaluations(monkeypatch):
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 100.0)
    timer = metrics.PhaseTimer()
    timer.seconds = {"rollout": 1.0, "reward": 5.0, "update": 1.0}
    result = metrics.throughput({"nfe/rollout": 10, "nfe/update": 10}, timer, samples=8, flops=3.0, devices=2)
    assert result["time/utilisation"] == 3.0 * 40 / 2.0 / 200.0


def test_pictures_are_tiled_on_white():
    images = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3)
    page = report.tile(images, columns=2, scale=2, gap=1)
    expected = np.full((2 * 9 + 1, 2 * 13 + 1, 3), 255, np.uint8)
    for image, (top, left) in zip(images, [(1, 1), (1, 14), (10, 1)]):
        expected[top : top + 8, left : left + 12] = image.repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(page, expected)


def test_a_grid_shows_each_prompt_beside_its_pictures(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
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
