import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.models import families
from mixgrpo_jax.models.lora import LoraConfig
from mixgrpo_jax.models.trainable import make_trainable, trainable_shapes
from mixgrpo_jax.tasks.signs import data as signs


@pytest.fixture(scope="module")
def shipped():
    parts, params = families.load("")
    return parts, params, parts.family.make(parts, configs.base().model)


def test_the_shipped_policy_is_whole(shipped):
    _, params, policy = shipped
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    assert sizes == {"transformer": 1_888_224, "text_encoder_2": 336_640}
    assert policy.latent_shape == (24, 96)
    assert (policy.tokens, policy.evaluations) == ({"image": slice(None)}, 1)
    dataset = signs.load("test")
    batch = signs.collate([dataset[i] for i in range(8)])
    x0 = policy.codec.encode(None, jnp.asarray(batch["image"]))
    noise = jax.random.normal(jax.random.key(0), x0.shape)
    x, flow = 0.2 * x0 + 0.8 * noise, noise - x0
    cond = policy.features(params, policy.tokenize(batch["prompt"]))
    v = policy.velocity(params["transformer"], x, 0.8, cond)
    assert v.shape == x.shape and v.dtype == jnp.float32
    # The flow's variance is 1.6: the prompt and the noisy picture tell most of it, and another prompt misleads.
    assert jnp.square(v - flow).mean() == pytest.approx(0.385, abs=0.01)
    other = policy.velocity(params["transformer"], x, 0.8, jax.tree.map(lambda a: a[::-1], cond))
    assert jnp.square(other - flow).mean() == pytest.approx(1.176, abs=0.03)
    alone = policy.velocity(params["transformer"], x[:1], jnp.array([0.8]), jax.tree.map(lambda a: a[:1], cond))
    np.testing.assert_allclose(v[0], alone[0], atol=1e-4)


def test_pictures_are_the_codecs(shipped):
    _, params, policy = shipped
    tokens = 2 * jax.random.normal(jax.random.key(0), (2, 24, 96))
    np.testing.assert_array_equal(policy.pixels(params, tokens), policy.codec.pixels(None, tokens))
    np.testing.assert_array_equal(policy.decode(params, tokens), policy.codec.decode(None, tokens))


def test_shapes_are_those_of_what_is_computed(shipped):
    parts, params, policy = shipped
    tokens = policy.tokenize(["a red sign that says 7 in white"] * 3)
    cond = jax.eval_shape(policy.features, params, tokens)
    for expected, found in ((tokens, policy.token_shapes(3)), (cond, policy.cond_shapes(3))):
        assert {name: array.shape for name, array in found.items()} == {name: a.shape for name, a in expected.items()}
    assert {array.dtype for array in policy.token_shapes(3).values()} == {tokens["t5"].dtype}

    whole = families.shapes(parts, text=True, dtype=jnp.float32)
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(), whole, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole["transformer"])} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(whole["text_encoder_2"])} == {jnp.dtype(jnp.bfloat16)}
    assert families.shapes(parts, text=False).keys() == {"transformer"}
    for config in (LoraConfig(), LoraConfig(rank=2, base="int8")):
        made = make_trainable(parts, params["transformer"], config, jax.random.key(0), keep_base=True)
        shapes = trainable_shapes(parts, whole["transformer"], config, keep_base=True)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), made[:2]) == jax.tree.map(
            lambda a: (a.shape, a.dtype), shapes[:2]
        )


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
    families.save(tmp_path, parts, params)
    again, loaded = families.load(tmp_path)
    assert (again.family, again.configs) == (parts.family, parts.configs)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    assert families.read_parts(tmp_path).configs == parts.configs
    (tmp_path / "transformer").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="has no transformer/; expected a checkpoint as diffusers saves it"):
        families.load(tmp_path)


def test_what_ships_is_found_by_name(tmp_path):
    assert families.find("") == families.find("shipped:signs") == families.SHIPPED
    assert families.find(tmp_path) == tmp_path and families.is_here(tmp_path) and families.is_here("shipped:signs")
    with pytest.raises(ValueError, match=r"model.folder='shipped:none' does not ship .*choose from .*signs"):
        families.find("shipped:none")


def test_adapters_start_as_the_base_and_leave_it_alone(shipped):
    parts, params, policy = shipped
    base = params["transformer"]
    made = make_trainable(parts, base, LoraConfig(rank=4, base="float32"), jax.random.key(0), keep_base=False)
    assert sum(leaf.size for leaf in jax.tree.leaves(made.params)) < 0.1 * sum(x.size for x in jax.tree.leaves(base))
    cond = policy.features(params, policy.tokenize(["a red sign that says 7 in white"]))
    x = jax.random.normal(jax.random.key(1), (1, 24, 96))
    start = policy.velocity(made.attach(made.params, made.base), x, 0.5, cond)
    np.testing.assert_allclose(start, policy.velocity(base, x, 0.5, cond), atol=1e-5)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, made.params)
    assert np.abs(policy.velocity(made.attach(moved, made.base), x, 0.5, cond) - start).max() > 1e-3


def test_a_fully_trained_model_keeps_its_start_when_asked(shipped):
    parts, base = shipped[0], shipped[1]["transformer"]
    key = jax.random.key(0)
    assert make_trainable(parts, base, LoraConfig(), key, keep_base=False).base is None
    kept = make_trainable(parts, base, LoraConfig(), key, keep_base=True)
    jax.tree.map(np.testing.assert_array_equal, kept.base, base)
    assert kept.attach(kept.params, kept.base) is kept.params
