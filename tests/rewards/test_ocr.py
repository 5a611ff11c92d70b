import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest

from mixgrpo_jax.models import ppocr
from mixgrpo_jax.rewards import ocr
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.scoring import build, score_all
from mixgrpo_jax.tasks.signs.data import PALETTE, Sign, photograph, render, sample_signs

BATCH = 50  # pictures to a call, of one shape, which is compiled once


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


@pytest.mark.parametrize("read", [ocr.read, ocr.read_on_device])
@pytest.mark.parametrize("images", [np.zeros((2, 16, 48, 3), np.float32), np.zeros((16, 48, 3), np.uint8)])
def test_images_of_another_kind_are_refused(images, read):
    with pytest.raises(ValueError, match=r"give uint8 \[B, H, W, 3\]"):
        read(images)


def test_a_missing_host_reader_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'mixgrpo_jax\[ocr_host\]', or .* where='device'"):
        ocr.network.__wrapped__()
    assert ocr.device_network.__wrapped__()[0].alphabet[0] == ""


def photographs(count):
    """Signs, every other one with noise."""
    rng, signs = np.random.default_rng(0), sample_signs("test", count)
    images = [photograph(sign, rng)["image"] if i % 2 else render(sign) for i, sign in enumerate(signs)]
    return np.stack(images), [{"number": sign.number} for sign in signs]


@pytest.mark.parametrize("count", [BATCH * 4, pytest.param(BATCH * 20, marks=pytest.mark.slow)])
def test_the_device_reads_what_the_host_reads(count):
    images, _ = photographs(count)
    session, _ = ocr.network()
    for batch in np.split(images, count // BATCH):
        assert ocr.read_on_device(batch) == ocr.read(batch)
        (expected,) = session.run(None, {"x": ocr._preprocess(batch)})
        probabilities = jax.nn.softmax(ocr._logits(*ocr.device_network(), batch))
        difference = np.abs(probabilities - expected)
        assert difference.max() < 2e-3 and difference.mean() < 1e-8


def test_the_device_scores_as_the_host_does_and_pictures_are_read_once(monkeypatch):
    images, metadata = photographs(BATCH)
    for sign, own in zip(sample_signs("test", BATCH), metadata, strict=True):
        own["plate_rgb"], own["digits_rgb"] = (np.array(PALETTE[name]) for name in (sign.plate, sign.digits))
        own["palette"] = np.array(list(PALETTE.values()))
    decoded, decode = [], ppocr.greedy_decode
    monkeypatch.setattr(ppocr, "greedy_decode", lambda *given: decoded.append(given) or decode(*given))
    scores = {}
    for where in ("host", "device"):
        both = build(["ocr", "strict"], {"ocr": {"where": where}, "strict": {"where": where}})
        scores[where] = score_all(both, images, [""] * BATCH, metadata)
    assert len(decoded) == 2 * BATCH
    for name, (host, *_) in scores["host"].items():
        assert host.dtype == np.float32 and len(set(host)) > 1
        np.testing.assert_array_equal(scores["device"][name].value, host)
    with pytest.raises(ValueError, match="where='gpu': 'host' reads with onnxruntime"):
        build(["strict"], {"strict": {"where": "gpu"}})


def test_dense_is_highest_for_what_the_picture_says():
    numbers = ["4258", "4256", "425", "44258", "9999", "31"]
    images, _ = pictures([Sign("4258", "black", "white")] * BATCH)
    found = np.asarray(ocr.dense(images, (numbers * BATCH)[:BATCH]))[: len(numbers)]
    assert found.dtype == np.float32 and found[0] > np.log(0.5)
    assert (found[0] > found[1:] + 0.5).all() and (found <= 0).all()


def test_dense_tells_misread_pictures_apart():
    images, metadata = photographs(BATCH)
    noise = np.random.default_rng(0).normal(size=images.shape)
    mixed = [np.uint8(np.clip((1 - s) * images + s * (128 + 128 * noise), 0, 255)) for s in (0.0, 0.3, 0.6, 1.0)]
    dense = [np.asarray(ocr.ocr_dense().score(x, [], metadata)) for x in mixed]
    assert (np.diff(np.mean(dense, axis=1)) < -0.1).all()
    assert len(set(dense[-1])) == BATCH and ocr.score(mixed[-1], [], metadata).mean() < 0.1


@pytest.mark.slow
def test_dense_has_the_gradient_of_its_values():
    images, metadata = photographs(2)
    own = ocr.ocr_dense().differentiable
    inputs = own.inputs(["", ""], metadata)

    @jax.jit
    def dense(x):
        return own.function(own.params, x, inputs)

    images = np.float32(images)
    np.testing.assert_allclose(dense(images), ocr.dense(images, [m["number"] for m in metadata]), rtol=1e-5)
    _, pullback = jax.vjp(dense, images)
    (gradient,) = pullback(np.ones(2, np.float32))
    step = 0.5 * gradient / np.linalg.norm(gradient)
    difference = np.sum(dense(images + step) - dense(images - step))
    np.testing.assert_allclose(2 * np.vdot(gradient, step), difference, rtol=0.02)


def test_targets():
    prompts = ["a sign", 'a cat with a sign "Hello World" and "no"', '"7"']
    assert ocr.targets(prompts, [{"number": "42"}, {}, {"number": "8"}]) == ["42", "helloworld", "8"]


@pytest.mark.parametrize("prompt", ["a sign that says 42", 'a sign that says "42', 'a sign that says " "'])
def test_a_prompt_without_a_target_is_refused(prompt):
    with pytest.raises(ValueError, match="put it in double quotes, or give metadata"):
        ocr.targets([prompt], [{}])


def test_score_reads_the_target_in_the_prompt():
    images, _ = pictures([Sign("4258", "black", "white")] * 2)
    assert ocr.score(images, ['a sign that says "4258"', 'the "4 2 5 6"'], [{}, {}]).tolist() == [1.0, 0.75]


def test_neither_the_data_nor_opencv_is_imported():
    code = (
        "import sys; from mixgrpo_jax.rewards.scoring import build; build(['ocr'], {});"
        "print([m for m in sys.modules if m.startswith(('cv2', 'rapidocr', 'mixgrpo_jax.data', 'mixgrpo_jax.tasks'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def constant(scores, name="constant"):
    return Reward(name, "host", lambda images, prompts, metadata: np.array(scores))


def test_score_all_gives_every_reward_in_float32():
    images, metadata = pictures([Sign("58", "black", "white"), Sign("31", "red", "white")])
    scores = score_all([constant([1, 2]), ocr.ocr()], images, ["", ""], metadata)
    assert list(scores) == ["constant", "ocr"]
    assert all(s.value.dtype == np.float32 and s.value.shape == (2,) and s.map is None for s in scores.values())


def test_score_all_names_the_first_score_that_is_not_finite():
    with pytest.raises(ValueError, match=r"'bad' gave nan for sample 1 \('second'\), and 2 of 3"):
        score_all(
            [constant([0, np.nan, np.inf], "bad")], np.zeros((3, 2, 2, 3)), ["first", "second", "third"], [{}] * 3
        )


@pytest.mark.parametrize("scores", [0.5, [0.5], [[0.5, 0.5]]])
def test_score_all_refuses_other_shapes(scores):
    with pytest.raises(ValueError, match="'bad' gave scores of shape"):
        score_all([constant(scores, "bad")], np.zeros((2, 2, 2, 3)), ["", ""], [{}] * 2)
