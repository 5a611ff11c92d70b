import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import blip
from mixgrpo_jax.models.blip import BLIPConfig, TextConfig, VisionConfig, text, vision
from mixgrpo_jax.models.blip import weights as blip_weights
from mixgrpo_jax.models.io import weights
from tests.blip_torch import ImageReward, random_release, torch

# Beside the sizes, what only shows where it differs: norms' eps, and the widths of image and text.
CONFIGS = {
    "tiny": blip.blip_tiny(),
    "wide text": BLIPConfig(
        VisionConfig(21, 7, 20, 33, 3, 5, layer_norm_eps=0.1),
        TextConfig(41, 36, 20, 50, 1, 2, max_position_embeddings=9, layer_norm_eps=0.03),
    ),
    "one patch": BLIPConfig(VisionConfig(16, 16, 24, 48, 1, 2), TextConfig(19, 24, 24, 31, 3, 4, 35)),
}

image_features = jax.jit(vision.apply, static_argnums=0, static_argnames="dtype")
text_features = jax.jit(text.apply, static_argnums=0)
apply = jax.jit(blip.apply, static_argnums=0, static_argnames="dtype")


@functools.cache
def release(name):
    return random_release(CONFIGS[name])


@functools.cache
def params(name):
    return blip.load(CONFIGS[name], release(name))


def inputs(config, length=7, batch=3):
    """Normalised images, ids, and a mask under which the first row is whole and the others are ever shorter."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(batch, config.vision.image_size, config.vision.image_size, 3)).astype(np.float32)
    tokens = rng.integers(0, config.text.vocab_size, (batch, length)).astype(np.int32)
    mask = (np.arange(length) < length - 2 * np.arange(batch)[:, None]).astype(np.int32)
    return images, tokens, mask


def to_torch(images, tokens, mask):
    return torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(tokens, dtype=torch.int64), torch.tensor(mask)


def relative_error(actual, expected):
    expected = np.asarray(expected, np.float32)
    return np.linalg.norm(np.asarray(actual, np.float32) - expected) / np.linalg.norm(expected)


def transformers_vision(config, tensors):
    transformers = pytest.importorskip("transformers")
    model = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vars(config), hidden_act="gelu")).eval()
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks.": "encoder.layers.",
        "norm1.": "layer_norm1.",
        "norm2.": "layer_norm2.",
        "attn.proj": "self_attn.projection",
        "attn.qkv": "self_attn.qkv",
    }
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix := "blip.visual_encoder."):
            name = name.removeprefix(prefix)
            name = "post_layernorm" + name.removeprefix("norm") if name.startswith("norm.") else name
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            state[name] = torch.tensor(tensor)
    model.load_state_dict(state)
    return model


def transformers_text(config, tensors):
    """The encoder mode of a model that has cross-attention."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    fields = dict(hidden_act="gelu", is_decoder=True, attn_implementation="eager")
    model = BlipTextModel(transformers.BlipTextConfig(**vars(config), **fields), add_pooling_layer=False).eval()
    prefix = "blip.text_encoder."
    model.load_state_dict({n.removeprefix(prefix): torch.tensor(t) for n, t in tensors.items() if n.startswith(prefix)})
    return functools.partial(model, is_decoder=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_image_features_are_those_of_transformers_and_of_the_equations(name):
    config = CONFIGS[name]
    images, *_ = inputs(config)
    ours = image_features(config.vision, params(name)["vision"], images)
    assert ours.shape == (3, config.vision.tokens, config.vision.hidden_size)
    pixels, *_ = to_torch(*inputs(config))
    with torch.no_grad():
        assert relative_error(ours, transformers_vision(config.vision, release(name))(pixels).last_hidden_state) < 1e-5
        assert relative_error(ours, ImageReward(config, release(name)).image_features(pixels)) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_text_features_are_those_of_transformers_and_of_the_equations(name):
    config = CONFIGS[name]
    _, tokens, mask = inputs(config)
    memory = np.random.default_rng(2).normal(size=(3, 11, config.vision.hidden_size)).astype(np.float32)
    ours = text_features(config.text, params(name)["text"], tokens, mask, memory)
    assert ours.shape == (3, 7, config.text.hidden_size)
    _, ids, attended = to_torch(*inputs(config))
    theirs = transformers_text(config.text, release(name))
    seen = torch.tensor(memory)
    with torch.no_grad():
        out = theirs(input_ids=ids, attention_mask=attended, encoder_hidden_states=seen).last_hidden_state
        assert relative_error(ours, out) < 1e-5
        assert relative_error(ours, ImageReward(config, release(name)).text_features(ids, attended, seen)) < 1e-5


def test_bf16_rounds_and_no_more():
    config, (images, tokens, mask) = CONFIGS["tiny"], inputs(CONFIGS["tiny"])
    exact, rounded = (
        apply(config, params("tiny"), images, tokens, mask, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(rounded, exact) < 3e-2


def test_padding_is_not_seen_and_the_image_is():
    config, (images, tokens, mask) = CONFIGS["tiny"], inputs(CONFIGS["tiny"])
    run = functools.partial(apply, config, params("tiny"))
    features = run(images, tokens, mask)
    np.testing.assert_allclose(run(images, tokens * mask, mask), features, rtol=1e-5, atol=1e-5)
    longer = [np.pad(x, ((0, 0), (0, 5)), constant_values=value) for x, value in ((tokens, 3), (mask, 0))]
    np.testing.assert_allclose(run(images, *longer), features, rtol=1e-5, atol=1e-5)
    assert np.abs(run(images[::-1], tokens, mask) - features)[0].max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_release_comes_back_bit_identical(name):
    config = CONFIGS[name]
    read = weights.load(blip_weights.TABLE, blip_weights.skeleton(config), release(name))
    written = weights.export(blip_weights.TABLE, read)
    assert written.keys() == release(name).keys()
    jax.tree.map(np.testing.assert_array_equal, written, release(name))


def test_names_are_those_of_the_release():
    names = release("tiny").keys()
    assert names >= {
        "blip.visual_encoder.cls_token",
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
        "blip.visual_encoder.norm.weight",
        "blip.text_encoder.embeddings.LayerNorm.bias",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "blip.text_encoder.encoder.layer.1.intermediate.dense.weight",
        "blip.text_encoder.encoder.layer.1.output.LayerNorm.weight",
        "mlp.layers.7.bias",
    }
    assert release("tiny")["blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"].shape == (24, 32)


def test_parts_for_other_tasks_are_ignored_by_name():
    unused = {"blip.vision_proj.weight": np.ones((2, 2)), "blip.text_encoder.embeddings.position_ids": np.arange(5)}
    loaded = blip.load(CONFIGS["tiny"], release("tiny") | unused)
    jax.tree.map(np.testing.assert_array_equal, loaded, params("tiny"))


def without(name):
    return {n: tensor for n, tensor in release("tiny").items() if n != name}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (lambda: without("mlp.layers.4.bias"), r"missing tensors: mlp\.layers\.4\.bias;"),
        (lambda: without("blip.visual_encoder.pos_embed"), r"missing tensors: blip\.visual_encoder\.pos_embed;"),
        (lambda: release("tiny") | {"mlp.layers.1.bias": np.ones(3)}, r"unexpected tensors: mlp\.layers\.1\.bias;"),
        (lambda: release("tiny") | {"blip.itm_head.bias": np.ones(2)}, r"unexpected tensors: blip\.itm_head\.bias;"),
        (
            lambda: release("tiny") | {"mlp.layers.7.bias": np.ones(2, np.float32)},
            r"mlp\.layers\.7\.bias has shape \(2,\), and the config expects \(1,\)",
        ),
        (
            lambda: release("tiny") | {"blip.visual_encoder.pos_embed": np.ones((1, 10, 32), np.float32)},
            r"pos_embed has shape \(1, 10, 32\), and the config expects \(1, 17, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors, message):
    with pytest.raises(ValueError, match=message):
        blip.load(CONFIGS["tiny"], tensors())


def test_the_head_collapses_to_one_map_and_stays_fp32():
    loaded = blip.load(CONFIGS["tiny"], release("tiny"), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves([loaded["vision"], loaded["text"]])} == {jnp.dtype(jnp.bfloat16)}
    x = np.random.default_rng(3).normal(size=(5, 24))
    expected, head = x, release("tiny")
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ head[f"mlp.layers.{layer}.weight"].T + head[f"mlp.layers.{layer}.bias"]
    assert loaded["head"]["kernel"].dtype == np.float32
    np.testing.assert_allclose(x @ loaded["head"]["kernel"] + loaded["head"]["bias"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VisionConfig(num_attention_heads=3), "hidden_size=1024 must be a multiple of num_attention_heads=3"),
        (lambda: VisionConfig(image_size=225), "image_size=225 must be a multiple of patch_size=16"),
        (lambda: TextConfig(num_attention_heads=5), "hidden_size=768 must be a multiple of num_attention_heads=5"),
        (lambda: BLIPConfig(VisionConfig(), TextConfig(encoder_hidden_size=768)), "encoder_hidden_size=768 must be"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_do_not_fit_are_refused():
    config, (images, tokens, mask) = CONFIGS["tiny"], inputs(CONFIGS["tiny"], length=41)
    with pytest.raises(ValueError, match="41 tokens do not fit max_position_embeddings=40"):
        blip.apply(config, params("tiny"), images, tokens, mask)
    with pytest.raises(ValueError, match=r"images are \(3, 24, 32, 3\): resize them to image_size=32"):
        blip.apply(config, params("tiny"), images[:, 8:], tokens[:, :4], mask[:, :4])


def test_image_reward_has_its_published_size():
    shapes = blip_weights.skeleton(blip.image_reward_v1())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 446_206_689


def test_fresh_parameters_fit_the_table_and_give_finite_features():
    config = blip.blip_tiny()
    fresh = jax.jit(blip.init, static_argnums=0)(config, jax.random.key(0))
    features = apply(config, fresh, *inputs(config))
    np.testing.assert_allclose(np.mean(np.square(features), axis=-1), 1, rtol=1e-2)
