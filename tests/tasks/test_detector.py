import itertools

import numpy as np
import pytest

from mixgrpo_jax.rewards import geneval
from mixgrpo_jax.tasks.scenes.data import lay_out, sample_scenes
from mixgrpo_jax.tasks.scenes.detector import detect
from mixgrpo_jax.tasks.scenes.shapes import GROUND, PALETTE, SHAPES, SIZE, Shape, render


def boxes(laid):
    """(name, colour, upper left) of shapes or detections, in an order of their own."""
    if isinstance(laid[0], Shape):
        return sorted(tuple(shape) for shape in laid)
    return sorted((found.name, found.colour, *found.box[:2]) for found in laid)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    scenes = [scene for split in ("train", "test") for scene in sample_scenes(split, 1500)]
    laid = [lay_out(scene, rng) for scene in scenes]
    return scenes, laid, np.stack([render(shapes) for shapes in laid])


def noisy(images, std):
    noise = np.random.default_rng(0).normal(scale=std, size=images.shape)
    return np.uint8(np.clip(np.rint(images + noise), 0, 255))


def test_clean_pictures_are_read_without_error(drawn):
    scenes, laid, images = drawn
    found = detect(images)
    assert [boxes(detections) for detections in found] == [boxes(shapes) for shapes in laid]
    assert min(detection.score for detections in found for detection in detections) > 0.999
    assert geneval.scores(found, [scene.metadata for scene in scenes], strict=True).all()


def test_little_noise_costs_little_and_much_costs_all(drawn):
    scenes, _, images = (part[:150] for part in drawn)
    metadata = [scene.metadata for scene in scenes]
    scores = [geneval.scores(detect(noisy(images, std)), metadata, strict=True).mean() for std in (20, 40, 60, 80, 130)]
    assert scores[0] > 0.99 and scores[1] > 0.85 and scores[2] > scores[3] and scores[4] < 0.02
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("colour", PALETTE)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_known_wherever_it_lies(name, colour):
    places = [(left, top) for left in range(0, 24 - SIZE + 1, 3) for top in (0, 5, 24 - SIZE)]
    found = detect(np.stack([render([Shape(name, colour, *place)]) for place in places]))
    assert [boxes(detections) for detections in found] == [[(name, colour, *place)] for place in places]


def test_shapes_side_by_side_are_told_apart_wherever_they_lie():
    rng, laid = np.random.default_rng(0), []
    while len(laid) < 300:
        places = rng.integers(0, 5, (int(rng.integers(2, 5)), 2)) * 4
        if all(np.abs(a - b).max() > SIZE for a, b in itertools.combinations(places, 2)):
            laid.append(
                [Shape(str(rng.choice(SHAPES)), str(rng.choice(list(PALETTE))), *map(int, place)) for place in places]
            )
    found = detect(np.stack([render(shapes) for shapes in laid]))
    assert [boxes(detections) for detections in found] == [boxes(shapes) for shapes in laid]


def test_what_is_no_shape_is_not_sure_to_be_one():
    ground = np.full((3, 24, 24, 3), GROUND, np.uint8)
    ground[1, 4:6, 4:6] = 0  # a speck
    ground[2, 4:18, 4:12] = 0  # two squares in one
    nothing, speck, merged = detect(ground)
    assert nothing == speck == [] and len(merged) == 1 and merged[0].score < geneval.COUNTING_THRESHOLD


def test_a_picture_is_read_the_same_in_any_batch(drawn):
    images = noisy(drawn[2][:20], 40)
    assert detect(images) == [detect(image[None])[0] for image in images]


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images are uint8 \(1, 16, 48, 3\): give uint8 \[B, 24, 24, 3\]"):
        detect(np.zeros((1, 16, 48, 3), np.uint8))
