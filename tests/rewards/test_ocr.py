import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from mixgrpo_jax.data.signs import Sign, render, sample_signs
from mixgrpo_jax.rewards import REWARDS, Reward, ocr, score_all


def pictures(signs):
    return np.stack([render(sign) for sign in signs]), [{"number": sign.number} for sign in signs]


@pytest.mark.parametrize(
    "text, target, expected",
    [
        ("4270", "4270", 1.0),
        ("4271", "4270", 0.75),
        ("427", "4270", 0.75),
        ("14270", "4270", 0.75),  # another number, though it contains the one asked for
        ("4720", "4270", 0.5),
        ("", "4270", 0.0),
        ("999999999", "4270", 0.0),
        ("7", "7", 1.0),
    ],
)
def test_accuracy(text, target, expected):
    assert ocr.accuracy(text, target) == expected


def test_edit_distance_is_a_metric():
    words = ["", "4", "42", "24", "4270", "0724", "4477"]
    for a in words:
        for b in words:
            d = ocr.edit_distance(a, b)
            assert d == ocr.edit_distance(b, a) and (d == 0) == (a == b)
            assert abs(len(a) - len(b)) <= d <= max(len(a), len(b))
            assert all(d <= ocr.edit_distance(a, c) + ocr.edit_distance(c, b) for c in words)


def test_reads_clean_signs():
    signs = [sign for sign in sample_signs("test", 60) if len(sign.number) > 1 and "7" not in sign.number]
    images, metadata = pictures(signs)
    scores = ocr.score(images, [], metadata)
    assert scores.dtype == np.float32 and scores.shape == (len(signs),)
    assert np.mean(scores == 1) > 0.95


def test_a_picture_reads_the_same_in_any_batch():
    images, _ = pictures(sample_signs("test", 6))
    assert ocr.read(images) == [text for image in images for text in ocr.read(image[None])]


def test_falls_with_noise_to_nothing():
    images, metadata = pictures(sample_signs("test", 16))
    noise = np.random.default_rng(0).normal(size=images.shape)
    mixed = [(1 - s) * images + s * (128 + 128 * noise) for s in (0.0, 0.3, 1.0)]
    scores = [ocr.score(np.uint8(np.clip(x, 0, 255)), [], metadata).mean() for x in mixed]
    assert scores[0] > scores[1] + 0.1 and scores[1] > scores[2] + 0.1 and scores[2] < 0.1


def test_another_number_scores_by_the_digits_it_gets_right():
    images, _ = pictures([Sign("4258", "black", "white")])
    scores = [ocr.score(images, [], [{"number": number}])[0] for number in ("4258", "4256", "4166", "9999")]
    assert scores == [1.0, 0.75, 0.25, 0.0]


@pytest.mark.parametrize("images", [np.zeros((2, 16, 48, 3), np.float32), np.zeros((16, 48, 3), np.uint8)])
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match=r"give uint8 \[B, H, W, 3\]"):
        ocr.read(images)


def test_missing_weights_name_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install rapidocr-onnxruntime"):
        ocr.network.__wrapped__()


def test_neither_the_data_nor_opencv_is_imported():
    code = (
        "import sys, mixgrpo_jax.rewards as r; r.REWARDS['ocr']();"
        "print([m for m in sys.modules if m.startswith(('cv2', 'rapidocr', 'mixgrpo_jax.data'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def constant(scores, name="constant"):
    return Reward(name, "host", lambda images, prompts, metadata: np.array(scores))


def test_score_all_gives_every_reward_in_float32():
    images, metadata = pictures([Sign("58", "black", "white"), Sign("31", "red", "white")])
    scores = score_all([constant([1, 2]), REWARDS["ocr"]()], images, ["", ""], metadata)
    assert list(scores) == ["constant", "ocr"]
    assert all(s.dtype == np.float32 and s.shape == (2,) for s in scores.values())


def test_score_all_names_the_first_score_that_is_not_finite():
    with pytest.raises(ValueError, match=r"'bad' gave nan for sample 1 \('second'\), and 2 of 3"):
        score_all(
            [constant([0, np.nan, np.inf], "bad")], np.zeros((3, 2, 2, 3)), ["first", "second", "third"], [{}] * 3
        )


@pytest.mark.parametrize("scores", [0.5, [0.5], [[0.5, 0.5]]])
def test_score_all_refuses_other_shapes(scores):
    with pytest.raises(ValueError, match="'bad' gave scores of shape"):
        score_all([constant(scores, "bad")], np.zeros((2, 2, 2, 3)), ["", ""], [{}] * 2)
