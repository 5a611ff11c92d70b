import json

import numpy as np

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
    metrics.MetricWriter(tmp_path, resume_at=2)
    assert [line["iteration"] for line in metrics.read(writer.path)] == [1, 2]
    assert metrics.read(tmp_path / "none.jsonl") == []


def test_means_and_throughput():
    assert metrics.means("reward", {"a": np.array([1.0, 3.0])}) == {"reward/a/mean": 2.0, "reward/a/std": 1.0}
    timer = metrics.PhaseTimer()
    timer.seconds = {"rollout": 1.0, "reward": 2.0, "update": 1.0}
    result = metrics.throughput({"nfe/rollout": 1, "nfe/update": 1}, timer, samples=8, flops=1.0, devices=1)
    assert result["time/images_per_second"] == 2.0


def test_utilisation_counts_a_gradient_as_three_evaluations(monkeypatch):
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 100.0)
    timer = metrics.PhaseTimer()
    timer.seconds = {"rollout": 1.0, "reward": 5.0, "update": 1.0}
    result = metrics.throughput({"nfe/rollout": 10, "nfe/update": 10}, timer, samples=8, flops=3.0, devices=2)
    assert result["time/utilisation"] == 3.0 * 40 / 2.0 / 200.0


def test_tile_and_grid(tmp_path):
    images = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3)
    page = report.tile(images, columns=2, scale=2, gap=1)
    assert page.shape == (2 * 9 + 1, 2 * 13 + 1, 3)
    np.testing.assert_array_equal(page[1:9:2, 1:13:2], images[0])
    np.testing.assert_array_equal(page[10:18:2, 1:13:2], images[2])
    report.grid(tmp_path / "grid.png", {"before": images, "after": images}, ["a", "b", "c"])
    assert (tmp_path / "grid.png").stat().st_size > 1000
