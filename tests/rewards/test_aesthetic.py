import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.rewards import aesthetic
from mixgrpo_jax.rewards.aesthetic import Aesthetic
from mixgrpo_jax.rewards.preprocess import MEAN, STD
from mixgrpo_jax.rewards.scoring import score_all
from tests.models.test_clip_model import expected_embeddings, hf_model, make_config
from tests.rewards.test_preprocess import by_pil, pictures

torch = pytest.importorskip("torch")

CONFIG = make_config((48, 1, 2), (40, 2, 5), "quick_gelu", 24, 45, 9)


def random_head(width):
    """The released head's layers: linear ones, and dropout that does nothing here."""
    torch.manual_seed(0)
    linear, idle = torch.nn.Linear, torch.nn.Dropout(0.2)
    head = torch.nn.Module()
    head.layers = torch.nn.Sequential(
        linear(width, 64), idle, linear(64, 32), idle, linear(32, 16), idle, linear(16, 8), linear(8, 1)
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return head.eval()


@pytest.mark.parametrize("width", [24, 768])
def test_the_affine_map_is_the_five_layers(width):
    head = random_head(width)
    weight, bias = aesthetic.collapse({name: t.numpy() for name, t in head.state_dict().items()}, width)
    assert weight.shape == (width,) and bias.shape == () and weight.dtype == bias.dtype == np.float32
    x = torch.nn.functional.normalize(torch.randn(50, width), dim=-1)
    with torch.no_grad():
        expected = head.double().layers(x.double())[:, 0].numpy()
    np.testing.assert_allclose(x.numpy().astype(np.float64) @ weight + bias, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def files(tmp_path):
    hf_model(CONFIG).save_pretrained(tmp_path / "clip")
    torch.save(random_head(24).state_dict(), tmp_path / "head.pth")
    return tmp_path / "clip", tmp_path / "head.pth"


def test_the_score_is_the_heads_of_the_pictures_embedding(files):
    images = pictures(60, 90, count=3)
    pixels = (by_pil(images, 45, "crop", "cubic") / 255 - MEAN) / STD
    embedding, _ = expected_embeddings(hf_model(CONFIG), pixels.astype(np.float32), np.zeros((3, 4), np.int64))
    with torch.no_grad():
        expected = random_head(24).layers(torch.tensor(embedding))[:, 0].numpy()
    reward = aesthetic.aesthetic(*files, config=CONFIG, dtype=jnp.float32)
    assert (reward.name, reward.where) == ("aesthetic", "device")
    assert reward.score.params.keys() == {"vision", "weight", "bias"}
    ours = score_all([reward], images, ["", "a", "b"], [{}] * 3)["aesthetic"].value
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="reward 'aesthetic' scores the probe"):
        aesthetic.aesthetic(*files, config=CONFIG, probe=99.0)


def test_gradients_with_respect_to_the_picture_are_those_of_finite_differences(files):
    reward = aesthetic.aesthetic(*files, config=CONFIG, dtype=jnp.float32)
    assert reward.score.function == Aesthetic(CONFIG, jnp.float32)
    images = pictures(50, 60, count=1).astype(np.float32)
    function = jax.jit(lambda x: reward.score.function(reward.score.params, x)[0])
    gradient = jax.jit(jax.grad(function))(images)
    slope = np.linalg.norm(gradient)
    step = 20 * gradient / slope
    np.testing.assert_allclose((function(images + step) - function(images - step)) / 40, slope, rtol=2e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda head: head | {"layers.8.bias": np.zeros(1)}, r"not expected: \['layers.8.bias'\]"),
        (lambda head: head | {"layers.4.weight": np.zeros((16, 31))}, r"layers.2 .* must have 31 rows"),
        (lambda head: head | {"layers.0.weight": np.zeros((64, 23))}, "head takes 23 numbers, .* has 24"),
        (lambda head: head | {"layers.7.bias": np.zeros(2)}, r"layers.7 of the aesthetic head has shapes"),
    ],
)
def test_a_head_that_does_not_fit_is_named(change, message):
    head = {name: t.numpy() for name, t in random_head(24).state_dict().items()}
    with pytest.raises(ValueError, match=message):
        aesthetic.collapse(change(head), 24)
