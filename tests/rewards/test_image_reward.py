import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from mixgrpo_jax.models import blip
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.rewards import image_reward
from mixgrpo_jax.rewards.image_reward import LENGTH
from mixgrpo_jax.rewards.preprocess import MEAN, STD
from mixgrpo_jax.rewards.scoring import score_all
from tests.blip_torch import ImageReward, random_release, torch

CONFIG = blip.blip_tiny()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "##s", "on", "blue", "table", ",", "two"]
PROMPTS = ["A red apple", "two RED apples, on a blue table", "a " * 60]

score = jax.jit(functools.partial(image_reward.score, config=CONFIG))


@functools.cache
def release():
    return random_release(CONFIG)


@functools.cache
def params():
    return blip.load(CONFIG, release())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ImageReward.pt, the same as safetensors, and the tokenizer's files."""
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save({name: torch.tensor(tensor) for name, tensor in release().items()}, folder / "ImageReward.pt")
    weights.write_safetensors(folder / "ImageReward.safetensors", release())
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return build(folder)


def build(folder, file="ImageReward.pt", **options):
    return image_reward.image_reward(weights=folder / file, tokenizer=folder, config=CONFIG, **options)


def pictures(height=50, width=71, batch=3):
    """Smooth noise, as photographs are, in bytes."""
    coarse = np.random.default_rng(0).integers(0, 256, (batch, 6, 8, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in coarse])


def pil(images, size):
    """Shorter side to `size` by PIL's bicubic, then the centre, normalised: [B, 3, size, size]."""
    out = []
    for image in images:
        height, width = image.shape[:2]
        short = min(height, width)
        resized = Image.fromarray(image).resize((width * size // short, height * size // short), Image.BICUBIC)
        pixels = np.asarray(resized, np.float32)
        top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        out.append((pixels[top : top + size, left : left + size] / 255 - MEAN) / STD)
    return torch.tensor(np.stack(out).transpose(0, 3, 1, 2), dtype=torch.float32)


def tokens(folder, prompts=PROMPTS):
    return image_reward.tokenize(image_reward.load_tokenizer(folder, CONFIG), prompts)


@pytest.mark.parametrize("size", [(50, 71), (90, 60), (20, 24)])
def test_scores_are_those_of_the_equations_on_pils_pictures(folder, reward, size):
    images = pictures(*size)
    ids, mask = tokens(folder)
    with torch.no_grad():
        expected = ImageReward(CONFIG, release()).score(pil(images, 32), torch.tensor(ids).long(), torch.tensor(mask))
    ours = reward.score(images, PROMPTS, [{}] * 3)
    assert reward.where == "device" and ours.shape == (3,) and ours.dtype == jnp.float32
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_prompts_are_lower_case_start_with_cls_and_are_cut_at_35(folder):
    ids, mask = tokens(folder)
    assert ids.shape == mask.shape == (3, LENGTH) and ids.dtype == np.int32
    assert " ".join(WORDS[i] for i in ids[1, :11]) == "[CLS] two red apple ##s , on a blue table [SEP]"
    assert mask.sum(1).tolist() == [5, 11, 35] and not ids[mask == 0].any()
    assert [WORDS[i] for i in ids[2, [0, 1, 33, 34]]] == ["[CLS]", "a", "a", "[SEP]"]


def test_padding_after_the_text_does_not_change_the_score(folder):
    ids, mask = tokens(folder, PROMPTS[:2])
    images = pictures(batch=2)
    expected = score(params(), images, ids, mask)
    np.testing.assert_allclose(score(params(), images, ids[:, :11], mask[:, :11]), expected, atol=1e-5)
    np.testing.assert_allclose(score(params(), images, np.where(mask, ids, 7), mask), expected, atol=1e-5)


def test_gradient_with_respect_to_the_picture_is_that_of_finite_differences(folder):
    ids, mask = tokens(folder, PROMPTS[:1])
    image = pictures(40, 48, 1).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: score(params(), x, ids, mask)[0]))(image)
    noise = np.random.default_rng(1).normal(size=image.shape)
    for direction in (gradient / np.abs(gradient).max(), (noise * np.sign(gradient)) > 1):
        ahead, behind = (score(params(), image + step * direction, ids, mask)[0] for step in (1, -1))
        assert abs(ahead - behind) > 1e-3
        np.testing.assert_allclose((ahead - behind) / 2, np.sum(gradient * direction), rtol=1e-2)


def test_a_score_depends_on_the_picture_and_on_the_prompt(reward):
    images = pictures()
    scores = reward.score(images, PROMPTS, [{}] * 3)
    assert np.abs(reward.score(images[::-1], PROMPTS, [{}] * 3) - scores)[0] > 1e-3
    assert np.abs(reward.score(images, PROMPTS[::-1], [{}] * 3) - scores)[0] > 1e-3


def test_safetensors_and_bf16_give_the_same_scores(folder, reward):
    images, metadata = pictures(), [{}] * 3
    scores = reward.score(images, PROMPTS, metadata)
    same = build(folder, "ImageReward.safetensors").score(images, PROMPTS, metadata)
    np.testing.assert_array_equal(same, scores)
    rounded = build(folder, dtype=jnp.bfloat16).score(images, PROMPTS, metadata)
    assert rounded.dtype == jnp.float32
    assert 1e-5 < np.abs(rounded - scores).max() < 0.1


def test_pictures_on_a_mesh_are_scored_where_they_are(reward):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    images = jax.device_put(pictures(), NamedSharding(mesh, PartitionSpec("data")))
    scores = score_all([reward], images, PROMPTS, [{}] * 3)["image_reward"].value
    np.testing.assert_allclose(scores, reward.score(pictures(), PROMPTS, [{}] * 3), atol=1e-6)


def test_files_that_do_not_fit_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=f"no vocab.txt or tokenizer.json in {tmp_path}"):
        image_reward.load_tokenizer(tmp_path, CONFIG)
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(60))]))
    with pytest.raises(ValueError, match="has 74 words, and the model embeds 64"):
        image_reward.load_tokenizer(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"missing\.pt"):
        build(folder, "missing.pt")
    weights.write_safetensors(tmp_path / "cut.safetensors", dict(list(release().items())[:-1]))
    with pytest.raises(ValueError, match=r"missing tensors: mlp\.layers\.7\.bias"):
        image_reward.image_reward(weights=tmp_path / "cut.safetensors", tokenizer=folder, config=CONFIG)
