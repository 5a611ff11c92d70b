import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax.rewards import jpeg


def pictures(size=64):
    """Flat, a gradient, soft noise, and noise: each harder to compress than the one before."""
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 255, size)[:, None, None], (size, size, 3))
    noise = rng.integers(0, 256, (size, size, 3))
    return np.stack([np.full((size, size, 3), 128), ramp, 128 + (noise - 128) // 8, noise]).astype(np.uint8)


def test_sizes_are_those_of_files(tmp_path):
    images = pictures()
    sizes = []
    for image in images:
        Image.fromarray(image).save(tmp_path / "picture.jpg", quality=95)
        sizes.append((tmp_path / "picture.jpg").stat().st_size)
    np.testing.assert_allclose(jpeg.kilobytes(images), np.array(sizes) / 1000, rtol=1e-6)


def test_detail_is_incompressible_and_each_reward_is_the_others_opposite():
    scores = jpeg.incompressibility(pictures(), [""] * 4, [{}] * 4)
    assert scores.dtype == np.float32 and scores.shape == (4,)
    assert (np.diff(scores) > 0).all()
    np.testing.assert_allclose(jpeg.compressibility(pictures(), [""] * 4, [{}] * 4), -scores / 500, rtol=1e-6)


def test_an_image_scores_the_same_in_any_batch_and_from_the_device():
    images = np.concatenate([pictures()] * 5)
    alone = np.concatenate([jpeg.kilobytes(image[None]) for image in images])
    np.testing.assert_array_equal(jpeg.kilobytes(images), alone)
    np.testing.assert_array_equal(jpeg.kilobytes(jnp.asarray(images)), alone)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match=r"give uint8 \[B, H, W, 3\]"):
        jpeg.kilobytes(images)
