import numpy as np
import pytest

from mixgrpo_jax.rewards.scoring import build
from mixgrpo_jax.tasks.signs import verify
from mixgrpo_jax.tasks.signs.data import DARK, PALETTE, TEST_PAIRS, TRAIN_PAIRS, Sign, render

PAIRS = TRAIN_PAIRS + TEST_PAIRS
SIGNS = [Sign(number, *pair) for pair in PAIRS for number in ("1", "7", "40", "258", "8888")]
IMAGES = np.stack([render(sign) for sign in SIGNS])


def rgb(names):
    return np.array([PALETTE[name] for name in names], np.uint8)


PLATES, DIGITS = rgb(sign.plate for sign in SIGNS), rgb(sign.digits for sign in SIGNS)


def colour_score(images, plates=PLATES, digits=DIGITS):
    return np.asarray(verify.colour_score(images, plates, digits))


def noisy(images, std):
    noise = np.random.default_rng(0).normal(scale=std, size=images.shape)
    return np.uint8(np.clip(np.rint(images + noise), 0, 255))


def test_rendered_signs_are_right():
    scores = colour_score(IMAGES)
    assert scores.shape == (len(SIGNS),) and scores.dtype == np.float32
    assert scores.min() > 0.99 and scores.max() <= 1


def test_noise_costs_more_the_stronger_it_is():
    scores = np.stack([colour_score(noisy(IMAGES, std)) for std in (0, 5, 10, 20, 30, 60)])
    assert (np.diff(scores.mean(1)) < 0).all()
    assert scores[1].min() > 0.9 and scores[4].max() < 0.7 and scores[5].max() < 0.4


def test_grey_noise_is_worth_nothing():
    assert colour_score(noisy(np.full_like(IMAGES, 128), 30)).max() < 0.05


def test_blank_plate_is_worth_nothing():
    assert colour_score(np.broadcast_to(PLATES[:, None, None], IMAGES.shape)).max() < 0.05


def test_swapped_colours_are_worth_nothing():
    assert colour_score(IMAGES, DIGITS, PLATES).max() < 0.05


@pytest.mark.parametrize("role", ["plate", "digits"])
@pytest.mark.parametrize("asked", PALETTE)
def test_another_colour_of_the_same_kind_scores_low(role, asked):
    shown = [getattr(sign, role) for sign in SIGNS]
    wrong = np.array([(name in DARK) == (asked in DARK) and name != asked for name in shown])
    colours = rgb([asked] * len(SIGNS))
    scores = colour_score(IMAGES, colours, DIGITS) if role == "plate" else colour_score(IMAGES, PLATES, colours)
    assert scores[wrong].max() < 0.4 and wrong.sum() > 20


def test_score_of_a_picture_does_not_depend_on_its_batch():
    np.testing.assert_allclose(colour_score(IMAGES[:3], PLATES[:3], DIGITS[:3]), colour_score(IMAGES)[:3], rtol=1e-5)


@pytest.mark.parametrize("std", [0, 15])
def test_nearest_colours_are_those_shown(std):
    palette = np.broadcast_to(rgb(PALETTE), (len(SIGNS), len(PALETTE), 3))
    plates, digits = verify.nearest_colours(noisy(IMAGES, std), palette)
    names = list(PALETTE)
    assert [names[i] for i in plates] == [sign.plate for sign in SIGNS]
    assert [names[i] for i in digits] == [sign.digits for sign in SIGNS]


def metadata(sign):
    plate, digits = rgb([sign.plate, sign.digits])
    return {"number": sign.number, "plate_rgb": plate, "digits_rgb": digits, "palette": rgb(PALETTE)}


def test_reward_takes_the_colours_from_the_metadata():
    (reward,) = build(["colour"], {})
    assert reward.where == "device"
    scores = reward.score(IMAGES[:4], [sign.prompt for sign in SIGNS[:4]], [metadata(sign) for sign in SIGNS[:4]])
    np.testing.assert_array_equal(scores, colour_score(IMAGES[:4], PLATES[:4], DIGITS[:4]))


def test_strict_wants_the_number_and_both_colours():
    shown = Sign("4258", "blue", "white")
    asked = [shown, Sign("4259", "blue", "white"), Sign("4258", "red", "white"), Sign("4258", "blue", "pink")]
    images = np.stack([render(shown)] * len(asked))
    (reward,) = build(["strict"], {})
    scores = reward.score(images, [sign.prompt for sign in asked], [metadata(sign) for sign in asked])
    assert scores.tolist() == [1.0, 0.0, 0.0, 0.0] and scores.dtype == np.float32
