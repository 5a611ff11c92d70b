import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from mixgrpo_jax.rewards import brisque
from mixgrpo_jax.rewards.scoring import score_all

pytestmark = pytest.mark.skipif(importlib.util.find_spec("brisque") is None, reason="brisque ships the weights")

# Of `photographs`, by the package brisque 0.2.0 in double precision; the last of the cut ones is left out, because the
# package follows a shape beyond 10, where the published fit ends.
WHOLE = [44.0407, 53.0910, 79.0682, 80.9034]
CUT = [47.2815, 57.2477, 78.9463]


@pytest.fixture(scope="module")
def photographs():
    """A scene of soft shapes with fine texture; the same with noise, blurred, and in coarse blocks."""
    rng = np.random.default_rng(0)
    scene = np.zeros((96, 96, 3))
    for size, share in ((4, 2), (12, 4), (48, 8)):
        layer = Image.fromarray(rng.integers(0, 256, (size, size, 3)).astype(np.uint8))
        scene = scene + np.asarray(layer.resize((96, 96), Image.Resampling.BICUBIC), float) / share
    scene = scene * 0.9
    noisy = np.clip(scene + rng.normal(scale=25, size=scene.shape), 0, 255)
    picture = Image.fromarray(scene.astype(np.uint8))
    blurred = picture.filter(ImageFilter.GaussianBlur(2))
    blocks = picture.resize((24, 24), Image.Resampling.BOX).resize((96, 96), Image.Resampling.NEAREST)
    return np.stack([np.asarray(x, np.uint8) for x in (picture, noisy, blurred, blocks)])


def test_scores_are_those_of_the_package(photographs):
    np.testing.assert_allclose(brisque.brisque(photographs), WHOLE, atol=0.01)


def test_odd_sizes_are_halved_as_the_package_does(photographs):
    np.testing.assert_allclose(brisque.brisque(photographs[:3, :71, :86]), CUT, atol=0.01)


def test_distortion_costs_and_an_image_scores_the_same_alone(photographs):
    reward = brisque.brisque_reward()
    scores = score_all([reward], photographs, [""] * 4, [{}] * 4)["brisque"].value
    np.testing.assert_array_equal(scores, -brisque.brisque(photographs))
    assert (scores[1:] < scores[0] - 5).all()
    np.testing.assert_allclose(reward.score(photographs[:1], [""], [{}]), scores[:1], atol=1e-2)


@pytest.mark.parametrize("level", [0, 200, 255])
def test_flat_pictures_have_a_score_and_a_bad_one(level):
    assert brisque.brisque(np.full((1, 64, 64, 3), level, np.uint8))[0] > 100


def test_local_statistics_have_a_gradient_in_flat_pictures():
    flat = jnp.stack([jnp.full((16, 16), level) for level in (0.0, 0.8)])
    contrast = jax.grad(lambda x: brisque._contrast(x).sum())(flat)
    fit = jax.grad(lambda x: jnp.stack(brisque._fit(x)).sum())(flat)
    assert np.isfinite(contrast).all() and np.isfinite(fit).all()


@pytest.mark.slow
def test_the_gradient_is_that_of_the_values_and_finite_in_flat_pictures(photographs):
    own = brisque.brisque_reward().differentiable
    score = jax.jit(lambda x: own.function(own.params, x, own.inputs([""] * 4, [{}] * 4)))
    x = np.float32(photographs[:, :32, :32])
    x[2], x[3] = 0, 200
    gradient = np.asarray(jax.grad(lambda x: score(x).sum())(x))
    assert np.isfinite(gradient).all()
    step = 0.1 * gradient / np.linalg.norm(gradient[:2].reshape(2, -1), axis=1).repeat(2)[:, None, None, None]
    difference = (score(x + step) - score(x - step)) / 2
    np.testing.assert_allclose(np.sum(gradient * step, (1, 2, 3))[:2], difference[:2], rtol=0.05)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 4.0])
def test_the_fit_finds_the_distribution_that_was_sampled(shape):
    """|x|^a is Gamma(1/a) where x is a generalised Gaussian of shape a."""
    rng = np.random.default_rng(0)
    size = (1, 400, 400)
    magnitude = rng.gamma(1 / shape, size=size) ** (1 / shape)
    # The weight of each side is in proportion to its scale, as of the asymmetric distribution.
    left = rng.uniform(size=size) < 1 / 3
    x = np.where(left, -magnitude, 2 * magnitude)
    found, mean, variance_left, variance_right = brisque._fit(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, shape, rtol=0.03)
    np.testing.assert_allclose(mean, x.mean(), rtol=0.03)
    np.testing.assert_allclose(variance_right / variance_left, 4, rtol=0.05)


def test_contrast_does_not_depend_on_exposure_away_from_edges():
    """It is (x - m) / (s + c): near one for strong texture, whatever its gain and offset."""
    x = np.random.default_rng(0).uniform(size=(1, 40, 40))
    bright, dark = (np.asarray(brisque._contrast(jnp.asarray(y, jnp.float32)))[:, 3:-3, 3:-3] for y in (x, x / 2 + 0.1))
    np.testing.assert_allclose(bright, dark, rtol=0.05, atol=0.02)


def test_halving_keeps_a_ramp():
    ramp = np.broadcast_to(np.arange(16.0)[None, :, None], (1, 16, 10))
    halved = brisque._halved(jnp.asarray(ramp))
    assert halved.shape == (1, 8, 5)
    np.testing.assert_allclose(halved[0, 1:-1, 0], np.arange(0.5, 16, 2)[1:-1], atol=1e-5)


def test_opencv_is_not_imported():
    code = (
        "import sys; from mixgrpo_jax.rewards import brisque; brisque.regression();"
        "assert not {'cv2', 'skimage', 'brisque'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pickle_that_could_run_is_refused(tmp_path):
    (tmp_path / "normalize.pickle").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with (
        open(tmp_path / "normalize.pickle", "rb") as file,
        pytest.raises(ValueError, match=r"names os\.system"),
    ):
        brisque._Numbers(file).load()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    brisque.regression.cache_clear()
    with pytest.raises(ImportError, match="pip install --no-deps brisque"):
        brisque.regression()
