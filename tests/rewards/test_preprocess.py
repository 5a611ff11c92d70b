import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax.rewards.preprocess import MEAN, STD, preprocess

FILTERS = {"cubic": Image.Resampling.BICUBIC, "linear": Image.Resampling.BILINEAR}
run = jax.jit(preprocess, static_argnums=1, static_argnames=("resize", "method", "rounded"))


def pictures(height, width, count=2):
    """Photograph-like: a 1/f spectrum with soft colour, hard-edged discs and a line of black-and-white detail."""
    rng = np.random.default_rng(height * width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    spectrum = rng.normal(size=(count, *frequency.shape, 3)) / np.maximum(frequency, 1)[..., None]
    x = np.fft.irfft2(spectrum, (height, width), axes=(1, 2))
    x = 128 + 50 * x / x.std(axis=(1, 2), keepdims=True)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(6):
        y, z, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, height / 4)
        x[:, (rows - y) ** 2 + (columns - z) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    x[:, height // 2 : height // 2 + 8] = rng.choice([0.0, 255.0], (1, 8, width, 1))
    return np.uint8(np.clip(np.rint(x), 0, 255))


def levels(result):
    """Back to 0..255, before the normalisation."""
    return (np.asarray(result) * STD + MEAN) * 255


def by_pil(images, size, resize, method):
    height, width = images.shape[1:3]
    short = size / min(height, width)
    sides = (size, size) if resize == "squash" else (int(height * short + 1e-9), int(width * short + 1e-9))
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    resized = [np.asarray(Image.fromarray(image).resize(sides[::-1], FILTERS[method])) for image in images]
    return np.stack(resized)[:, top : top + size, left : left + size]


def by_torch(images, size, method):
    """Square float tensors as torchvision's Resize takes them, which calls this; without rounding."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(images.transpose(0, 3, 1, 2)) / 255
    mode = {"cubic": "bicubic", "linear": "bilinear"}[method]
    x = torch.nn.functional.interpolate(x, (size, size), mode=mode, antialias=True, align_corners=False)
    return x.numpy().transpose(0, 2, 3, 1) * 255


@pytest.mark.parametrize(
    "height, width, size, resize, method",
    [
        (320, 320, 224, "crop", "cubic"),
        (405, 300, 224, "crop", "cubic"),
        (200, 300, 112, "squash", "cubic"),
        (96, 128, 224, "crop", "cubic"),
        (64, 80, 64, "crop", "cubic"),
        (405, 300, 224, "crop", "linear"),
        (256, 384, 224, "crop", "cubic"),
    ],
)
def test_uint8_images_are_pils_within_one_level(height, width, size, resize, method):
    images = pictures(height, width)
    ours, theirs = levels(run(images, size, resize=resize, method=method)), by_pil(images, size, resize, method)
    difference = np.abs(ours - theirs)
    assert difference.max() < 1.01 and difference.mean() < 2e-3


@pytest.mark.parametrize("side, size, method", [(320, 224, "cubic"), (300, 112, "linear"), (96, 224, "cubic")])
def test_unrounded_and_float_images_are_torchs(side, size, method):
    images = pictures(side, side)
    expected = by_torch(images, size, method)
    for given in (images, images.astype(np.float32)):
        np.testing.assert_allclose(levels(run(given, size, method=method, rounded=False)), expected, atol=0.01)


def test_rounding_is_of_uint8_images_alone():
    images = pictures(100, 100)
    rounded, exact = (levels(run(images, 48, rounded=flag)) for flag in (True, False))
    np.testing.assert_allclose(rounded, np.rint(rounded), atol=1e-3)
    assert rounded.min() > -0.01 and exact.min() < -1  # the cubic kernel overshoots at edges
    np.testing.assert_array_equal(run(images.astype(np.float32), 48), run(images, 48, rounded=False))


def test_the_normalisation_is_that_of_unit_pixels():
    result = run(np.full((1, 9, 9, 3), 51, np.uint8), 9)
    np.testing.assert_allclose(result[0, 0, 0], (0.2 - np.array(MEAN)) / STD, rtol=1e-6)
    plain = preprocess(np.full((1, 9, 9, 3), 51, np.uint8), 3, mean=(0.5,) * 3, std=(0.5,) * 3)
    np.testing.assert_allclose(plain, -0.6, rtol=1e-6)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_gradients_are_those_of_a_linear_map(resize):
    rng = np.random.default_rng(0)
    images, step, weight = rng.uniform(0, 255, (3, 1, 20, 26, 3)).astype(np.float32)
    weight = rng.normal(size=(1, 8, 8, 3))

    def loss(x):
        return jnp.sum(preprocess(x, 8, resize=resize) * weight)

    gradient = jax.grad(loss)(images)
    np.testing.assert_allclose(jnp.sum(gradient * step), loss(images + step) - loss(images), rtol=1e-4, atol=1e-3)


def test_a_batch_is_its_images_one_by_one():
    images = pictures(50, 70, count=3)
    together = run(images, 32)
    apart = jnp.concatenate([run(images[i : i + 1], 32) for i in range(3)])
    np.testing.assert_allclose(together, apart, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "images, options, message",
    [
        (np.zeros((4, 4, 3), np.uint8), {}, r"images have shape \(4, 4, 3\)"),
        (np.zeros((1, 4, 4, 4), np.uint8), {}, r"images have shape \(1, 4, 4, 4\)"),
        (np.zeros((1, 4, 4, 3), np.int32), {}, "images are int32"),
        (np.zeros((1, 4, 4, 3), np.uint8), {"resize": "pad"}, "resize='pad'.*crop.*squash"),
        (np.zeros((1, 4, 4, 3), np.uint8), {"method": "lanczos3"}, "method='lanczos3'.*cubic"),
        (np.zeros((1, 4, 4, 3), np.uint8), {"size": 0}, "size=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        functools.partial(preprocess, images, **({"size": 2} | options))()
