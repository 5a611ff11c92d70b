import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.models import policy as policies
from mixgrpo_jax.models.codec import PixelCodec
from mixgrpo_jax.models.lora import LoraConfig


@pytest.fixture(scope="module")
def shipped():
    parts, params = policies.load("")
    return parts, params, policies.make(parts, configs.base().model)


def test_the_codec_loses_nothing():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 48, 3), dtype=np.uint8)
    codec = PixelCodec((16, 48))
    tokens = codec.encode(None, jnp.asarray(images))
    assert tokens.shape == (2, np.prod(codec.grid), codec.channels) == (2, 24, 96)
    np.testing.assert_array_equal(codec.decode(None, tokens), images)
    np.testing.assert_array_equal(codec.decode(None, jnp.full((1, 24, 96), 9.0)), np.full((1, 16, 48, 3), 255))
    with pytest.raises(ValueError, match=r"model.image_size: 12 rows are not a multiple of 8"):
        PixelCodec((12, 48))


def test_the_shipped_policy_is_whole(shipped):
    _, params, policy = shipped
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert 2e6 < sum(sizes) < 3e6
    assert policy.latent_shape == (24, 96)
    cond = policy.features(params, policy.tokenize(["a blue sign that says 4270 in white"] * 2))
    x = jax.random.normal(jax.random.key(0), (2, 24, 96))
    v = policy.velocity(params["transformer"], x, 0.5, cond)
    assert v.shape == x.shape and v.dtype == jnp.float32
    assert 0.2 < v.std() < 5
    alone = policy.velocity(params["transformer"], x[:1], 0.5, jax.tree.map(lambda a: a[:1], cond))
    np.testing.assert_allclose(v[0], alone[0], atol=1e-4)


def test_pooled_features_are_the_mean_of_the_prompts_own_tokens(shipped):
    _, params, policy = shipped
    tokens = policy.tokenize(["a red sign that says 7 in white"])
    cond = policy.features(params, tokens)
    real = int((tokens["t5"] != 0).sum())
    assert real < tokens["t5"].shape[1]
    np.testing.assert_allclose(cond["pooled"][0], cond["text"][0, :real].mean(0), rtol=1e-4, atol=1e-5)


def test_a_prompt_that_does_not_fit_is_refused(shipped):
    with pytest.raises(ValueError, match=r"prompt 'a blue .*' has 14 tokens; the model takes 12"):
        shipped[2].tokenize(["a blue sign that says 427011 in white"])


def test_saved_and_loaded(shipped, tmp_path):
    parts, params, _ = shipped
    policies.save(tmp_path, parts, params)
    again, loaded = policies.load(tmp_path)
    assert (again.transformer, again.text_encoder_2) == (parts.transformer, parts.text_encoder_2)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    (tmp_path / "transformer").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="has no transformer/; expected a checkpoint as diffusers saves it"):
        policies.load(tmp_path)


def test_what_ships_is_found_by_name(tmp_path):
    assert policies.find("") == policies.find("shipped:signs") == policies.SHIPPED
    assert policies.find(tmp_path) == tmp_path
    with pytest.raises(ValueError, match=r"model.folder='shipped:none' does not ship .*choose from .*signs"):
        policies.find("shipped:none")


def test_adapters_start_as_the_base_and_leave_it_alone(shipped):
    _, params, policy = shipped
    base = params["transformer"]
    made = policies.trainable(base, LoraConfig(rank=4, base="float32"), jax.random.key(0), keep_base=False)
    assert sum(leaf.size for leaf in jax.tree.leaves(made.params)) < 0.1 * sum(x.size for x in jax.tree.leaves(base))
    cond = policy.features(params, policy.tokenize(["a red sign that says 7 in white"]))
    x = jax.random.normal(jax.random.key(1), (1, 24, 96))
    start = policy.velocity(made.attach(made.params, made.base), x, 0.5, cond)
    np.testing.assert_allclose(start, policy.velocity(base, x, 0.5, cond), atol=1e-5)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, made.params)
    assert np.abs(policy.velocity(made.attach(moved, made.base), x, 0.5, cond) - start).max() > 1e-3


def test_a_fully_trained_model_keeps_its_start_when_asked(shipped):
    base = shipped[1]["transformer"]
    key = jax.random.key(0)
    assert policies.trainable(base, LoraConfig(), key, keep_base=False).base is None
    kept = policies.trainable(base, LoraConfig(), key, keep_base=True)
    jax.tree.map(np.testing.assert_array_equal, kept.base, base)
    assert kept.attach(kept.params, kept.base) is kept.params
