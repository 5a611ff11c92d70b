import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import clip
from mixgrpo_jax.models.clip import vision
from mixgrpo_jax.rewards.contract import Score
from mixgrpo_jax.rewards.perceptual import Encoder, log_distance, novelty, saliency
from mixgrpo_jax.rewards.scoring import of_groups, score_chunks
from mixgrpo_jax.tasks.scenes import shapes as drawn
from mixgrpo_jax.tasks.scenes.detector import shapes
from mixgrpo_jax.tasks.signs.rendering import Sign, render
from mixgrpo_jax.tasks.signs.where import digits


def picture(spot=None):
    """A grey picture of 16 x 48 with a little texture, and a bright spot in one of the cells of 8 x 4."""
    image = np.full((16, 48, 3), 100.0) + np.random.default_rng(0).normal(size=(16, 48, 3))
    if spot:
        y, x = spot
        image[8 * y : 8 * y + 8, 4 * x : 4 * x + 4] = 250.0
    return image.astype(np.uint8)


def test_a_pictures_map_is_where_it_differs():
    reward = saliency(encoder="pixels", cell=(8, 4), smooth=0.0)
    images = np.stack([picture((0, 3)), picture((1, 11)), np.full((16, 48, 3), 7, np.uint8)])
    scores = score_chunks([reward], [(images[:2], ["", ""], [{}, {}]), (images[2:], [""], [{}])])["saliency"]
    assert scores.map.shape == (3, 24) and not scores.value.any()
    assert scores.map[0].argmax() == 3 and scores.map[1].argmax() == 12 + 11
    assert scores.map[:2].min() == 0 and scores.map[:2].max() == 1 and np.sort(scores.map[0])[-2] < 0.5
    np.testing.assert_array_equal(scores.map[2], 1)  # nothing stands out
    smooth = saliency(encoder="pixels", cell=(8, 4), smooth=1.0).score(images[:1], [""], [{}]).map[0]
    assert smooth.argmax() == 3 and np.sort(smooth)[-2] > 0.5


def test_maps_of_clips_patches_have_the_latents_grid():
    config = clip.clip_tiny()
    params = {"vision": jax.eval_shape(lambda: vision.init(config.vision, jax.random.key(0)))}
    encoder = Encoder(config, (8, 4), jnp.float32)
    images = np.stack([picture((0, 3)), picture((1, 8))])
    of = jax.eval_shape
    assert of(encoder.patches, params, images).shape == (2, 4, 4, config.vision.hidden_size)
    assert of(encoder.vector, params, images).shape == (2, 24)
    reward = saliency(None, config=config, cell=(8, 4), dtype=jnp.float32)
    assert of(reward.score.function, params, images, None).map.shape == (2, 24)


def test_novelty_is_the_distance_to_the_nearest_of_the_group():
    features = np.array([[0.0, 0], [3, 4], [3, 5], [0, 0], [0, 2], [9, 9]])
    group = np.array([0, 0, 0, 1, 1, 2])
    np.testing.assert_allclose(log_distance(features, group), np.log([5, 1, 1, 2, 2, 1]), atol=1e-6)  # alone: 0
    np.testing.assert_allclose(log_distance(features, group, 2)[:3], np.log([34**0.5, 5, 34**0.5]), rtol=1e-5)


def test_a_reward_that_compares_a_group_scores_after_its_chunks():
    reward = novelty(encoder="pixels")
    images = np.stack([picture((0, 1)), picture((0, 1)), picture((1, 9)), picture((1, 2))])
    chunks = [(images[:3], [""] * 3, [{}] * 3), (images[3:], [""], [{}])]
    scores = score_chunks([reward], chunks)
    assert not scores["novelty"].value.any()
    group = np.array([0, 0, 0, 1])
    value = of_groups([reward], scores, group)["novelty"].value
    assert value[2] > value[0] == value[1] == pytest.approx(np.log(1e-6)) and value[3] == 0
    missing = {"novelty": Score(np.array([0, np.nan, 0, 0], np.float32), None, scores["novelty"].features)}
    value = of_groups([reward], missing, group)["novelty"].value
    assert np.isnan(value).tolist() == [False, True, False, False] and value[0] == value[2] > np.log(1e-6)


def test_embedded_tasks_have_exact_maps():
    sign = Sign("8", "blue", "white")
    maps = digits().score(render(sign)[None], [sign.prompt], [{"number": "8"}]).map
    assert maps.shape == (1, 24) and maps.max() == 1
    covered = (render(sign) != render(sign)[0, 0]).any(-1).reshape(2, 8, 12, 4).any((1, 3)).ravel()
    np.testing.assert_array_equal(maps[0] > 0, covered)
    scene = drawn.render([drawn.Shape("square", "red", 8, 16)])
    maps = shapes().score(scene[None], [""], [{}]).map.reshape(3, 6)
    expected = np.zeros((3, 6))
    expected[2, 2:4] = 1
    np.testing.assert_array_equal(maps, expected)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="neighbours=0 must be at least 1"):
        novelty(encoder="pixels", neighbours=0)
    with pytest.raises(ValueError, match="encoder='dino' is unknown: choose 'clip' or 'pixels'"):
        saliency(encoder="dino")
