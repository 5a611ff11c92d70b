"""Monitors by their properties, and a run from which they are seen, stopped and resumed."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from benchmarks import monitors as bad
from mixgrpo_jax import train
from mixgrpo_jax.engine import monitors
from mixgrpo_jax.engine.held_out import Assessment
from mixgrpo_jax.engine.monitors import (
    GROUPS,
    MONITORS,
    Change,
    Hacked,
    Series,
    Watch,
    diversity,
    measure,
    suspicious,
    thumbs,
)
from tests.test_train import fast, lines

RNG = np.random.default_rng(0)
NAMES = [*MONITORS]


def photographs(count=4, size=(32, 48)):
    """Smooth pictures: low frequencies, in no plain colour."""
    rows, columns = np.meshgrid(*(np.linspace(0, 1, n) for n in size), indexing="ij")
    phase = RNG.uniform(0, 6, (count, 3, 2))
    waves = np.sin(2 * rows[None, None] + phase[..., :1, None]) + np.sin(3 * columns[None, None] + phase[..., 1:, None])
    return np.moveaxis(128 + 40 * waves, 1, 3).astype(np.uint8)


def noisy(images):
    return np.clip(images + RNG.normal(0, 40, images.shape), 0, 255).astype(np.uint8)


def gridded(images):
    stripes = np.sin(2 * np.pi * np.arange(images.shape[2]) / 4)[:, None]
    return np.clip(images + 40 * stripes, 0, 255).astype(np.uint8)


def flat(images):
    return np.broadcast_to(images.mean((1, 2), keepdims=True), images.shape).astype(np.uint8)


RAISED = {
    "brightness": lambda images: images // 2 + 128,
    "saturated": lambda images: np.where(images > 160, 255, images).astype(np.uint8),
    "entropy": noisy,
    "sharpness": noisy,
    "edges": noisy,
    "periodicity": gridded,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_monitor_sees_what_it_is_for_in_each_picture_alone(name):
    images, of = photographs(), MONITORS[name].measure
    assert of(images).shape == (4,) and np.all(of(RAISED[name](images)) > of(images) + MONITORS[name].least)
    np.testing.assert_array_equal(of(images[::-1])[::-1], of(images))
    np.testing.assert_allclose(of(images[1:2]), of(images)[1:2], rtol=1e-5)


def test_the_ends_of_monitors():
    images = flat(photographs())
    assert np.all(measure([(images,)])["pictures"]["sharpness"] < 1e-3)
    for name in ("edges", "entropy", "saturated", "periodicity"):
        np.testing.assert_allclose(MONITORS[name].measure(images), 0, atol=1e-3)
    white = np.full((1, 8, 8, 3), 255, np.uint8)
    assert monitors.brightness(white) == pytest.approx(1) and monitors.saturated(white) == 1
    sine = np.broadcast_to(127 + 100 * np.sin(2 * np.pi * np.arange(32) / 8)[:, None], (1, 32, 32, 3)).astype(np.uint8)
    assert monitors.periodicity(sine) > 0.99
    assert monitors.entropy(RNG.integers(0, 256, (1, 256, 256, 3), np.uint8)) > 5.95


def test_diversity_is_of_the_group_whatever_the_order_and_0_of_one_picture():
    images, group = photographs(6), np.array([0, 0, 0, 1, 1, 1])
    images[3:] = images[3]
    apart = diversity(thumbs(images), group)
    assert np.all(apart[:3] > 0.05) and np.all(apart[3:] < 1e-6)
    order = RNG.permutation(6)
    np.testing.assert_allclose(diversity(thumbs(images[order]), group[order]), apart[order], rtol=1e-5)
    assert thumbs(images[:, :5, :3]).shape == (6, 5 * 3 * 3)  # smaller than its cells
    np.testing.assert_allclose(thumbs(images).reshape(6, -1, 3).mean(1) * 255, images.mean((1, 2)), rtol=1e-3)


def test_chunks_and_blocks_make_no_difference(monkeypatch):
    images = photographs(7)
    whole = measure([(images,)])["pictures"]
    monkeypatch.setattr(monitors, "BLOCK", images[0].size)
    parts = measure([(images[:2],), (images[2:],)])["pictures"]
    assert all(np.allclose(whole[name], parts[name], rtol=1e-5) for name in whole)


def followed(values, starts, prompts=4):
    """The change that a series finds in values by iteration; their window starts there."""
    series, rng, group = Series(), np.random.default_rng(1), np.repeat(np.arange(prompts), 8)
    told = []
    for value, start in zip(values, starts):
        of = value + rng.normal(0, 0.3, prompts)[group] + rng.normal(0, 0.1, len(group))
        series.follow(of, group, np.full(prompts, start))
        told.append(series.told(np.full(prompts, start), 0.0))
    return told


def test_a_window_that_moves_is_no_change_and_a_change_is_carried_over_it():
    each = GROUPS // 4
    starts = np.repeat(np.arange(4), 2 * each)
    level = 5.0 * starts  # what moves with the window
    still = followed(level, starts)
    assert max(abs(change.units) for change in still) < 0.7
    assert all(abs(change.units) < 4 * change.error < 2 for change in still[1:])
    drifting = followed(level + np.linspace(0, 2, len(starts)), starts)
    assert drifting[-1].units > 2  # what changes while a base is made is not seen
    assert drifting[-1].now == pytest.approx(17, abs=0.5) and drifting[-1].base == pytest.approx(16, abs=0.5)


def test_what_is_suspicious():
    still = dict.fromkeys([*MONITORS, "diversity", "reward/a", "reward/b", "reward/w"], 0.0)

    def found(limit=1.0, error=0.0, **changed):
        units = still | {k.replace("_", "/"): v for k, v in changed.items()}
        changes = {name: Change(0.0, 0.0, each, error) for name, each in units.items()}
        return suspicious(changes, dict(a=0.5, b=0.5), ["w"], limit)

    assert found() == {} and found(brightness=0.9, reward_a=9, reward_w=-0.4) == {}
    assert found(brightness=-1.1, periodicity=1.2) == {"brightness": -1, "periodicity": 1}
    assert found(diversity=1.1, periodicity=-2, saturated=-2) == {} and found(diversity=-1.1) == {"diversity": -1}
    assert found(reward_a=1.2, reward_w=-0.6) == {"reward/w": -1} and found(reward_a=-1.2, reward_w=-0.6) == {}
    assert found(sharpness=-3, entropy=-3.1, reward_w=0.46) == {"entropy": -1}  # a watched reward vouches for the other
    assert found(error=0.3, edges=1.5) == {} and found(error=0.3, edges=1.5, reward_w=-0.2) == {"edges": 1}
    assert found(0.0, brightness=9) == {} and found(2.0, brightness=1.9) == {}


def dark(folder, iterations=4, **changes):
    """A run whose samples are changed by hand before they are looked at."""
    config = fast(folder, iterations)
    config.checkpoint.every = 1
    config.monitors.update(changes)
    return config


@pytest.fixture
def painted(monkeypatch):
    """Monitors that find pictures black from the third iteration on, and have a base of the first."""
    monkeypatch.setattr(monitors, "GROUPS", 2)
    monkeypatch.setattr(monitors, "RATE", 1.0)
    look = Watch.look

    def black(self, iteration, drawn, scores):
        factor = int(iteration < 3)
        return look(self, iteration, drawn._replace(images=[image * factor for image in drawn.images]), scores)

    monkeypatch.setattr(Watch, "look", black)


def test_a_run_warns_once_shows_what_it_saw_and_is_the_same_after_a_restart(small_policy, painted, tmp_path, capfd):
    train.train(dark(small_policy, 4), tmp_path / "straight")
    said = capfd.readouterr().err
    found = [json.loads(line) for line in (tmp_path / "straight" / "warnings.jsonl").read_text().splitlines()]
    by_name = {each["monitor"]: each for each in found}
    assert len(by_name) == len(found) and said.count("monitor") == 0 and said.count("WARNING: iteration") == len(found)
    first = by_name["brightness"]
    assert first["iteration"] == 3 and "brightness is 0, and was 0." in first["message"].replace("-0,", "0,")
    picture = tmp_path / "straight" / "warnings" / "3_brightness.png"
    assert str(picture) in first["message"] and np.asarray(Image.open(picture)).min() == 0
    log = lines(tmp_path / "straight")
    assert log[2]["monitor/brightness"] > 0.1 and log[3]["monitor/brightness"] == 0
    assert {f"monitor/{name}" for name in [*MONITORS, "diversity"]} <= log[1].keys()
    assert {f"monitor/held_out/{name}" for name in MONITORS} <= log[4].keys()

    with pytest.raises(Hacked, match=r"iteration 3: .*standard deviations.* To go on, set monitors.stop=False"):
        train.train(dark(small_policy, 4, stop=True), tmp_path / "stopped")
    assert [line["iteration"] for line in lines(tmp_path / "stopped")] == [0, 1, 2, 3]
    with pytest.raises(Hacked):
        train.train(dark(small_policy, 4, stop=True), tmp_path / "stopped")
    train.train(dark(small_policy, 4), tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == log
    for name in ("warnings.jsonl", "drawn/3.csv", "drawn/4.csv"):
        read = [(tmp_path / run / name).read_text().replace("stopped", "straight") for run in ("stopped", "straight")]
        assert read[0] == read[1]


def test_held_out_pictures_are_compared_prompt_by_prompt(tmp_path):
    images = photographs(8)
    before = Assessment(images, {})

    config = types.SimpleNamespace(watched=())
    options = types.SimpleNamespace(limit=1.0, stop=False)
    settings = types.SimpleNamespace(rewards=dict(a=1.0), config=config, monitors=options)
    watch = Watch(types.SimpleNamespace(settings=settings), tmp_path)
    watch.compare(5, before, before)
    assert not watch.warnings and not (tmp_path / "warnings.jsonl").exists()
    metrics = watch.compare(5, before, Assessment(noisy(images), {}))
    assert metrics["monitor/held_out/sharpness"] > 5
    assert {"held_out/sharpness", "held_out/edges"} <= {each["monitor"] for each in watch.warnings}
    assert (tmp_path / "warnings" / "5_held_out_sharpness.png").exists()


@pytest.mark.slow
def test_a_reward_that_pays_for_noise_is_seen_within_20_iterations(tmp_path):
    train.train(bad.run_config("noise", seed=1), tmp_path)
    assert bad.warnings(tmp_path)
