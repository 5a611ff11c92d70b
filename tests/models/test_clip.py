import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import t5
from mixgrpo_jax.models.clip import text as clip
from mixgrpo_jax.models.clip.text import CLIPTextConfig
from mixgrpo_jax.models.io import weights

CONFIGS = {
    "quick gelu": CLIPTextConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=13,
        eos_token_id=40,
    ),
    "exact gelu": CLIPTextConfig(
        vocab_size=19,
        hidden_size=35,
        intermediate_size=33,
        num_hidden_layers=1,
        num_attention_heads=5,
        max_position_embeddings=77,
        hidden_act="gelu",
        eos_token_id=2,
    ),
    "coarse norms": CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=20,
        hidden_act="gelu",
        layer_norm_eps=0.1,
        eos_token_id=11,
    ),
    "legacy end": CLIPTextConfig(
        vocab_size=23,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=9,
        eos_token_id=2,
    ),
    "projected": CLIPTextConfig(
        vocab_size=30,
        hidden_size=28,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=7,
        max_position_embeddings=16,
        eos_token_id=29,
        projection_dim=17,
    ),
}
PARITY = [("quick gelu", 13), ("exact gelu", 61), ("coarse norms", 20), ("legacy end", 7), ("projected", 11)]


apply = jax.jit(clip.apply, static_argnums=0, static_argnames="dtype")


def tokens_for(config, length, batch=3):
    """Random ids; the end of text stands at a place of its own in each row, and twice in the last."""
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (batch, length)).astype(np.int32)
    tokens[tokens == config.eos_token_id] = 0
    tokens[np.arange(batch), np.arange(batch) * 2 + 1] = config.eos_token_id
    tokens[-1, -1] = config.eos_token_id
    return tokens


def torch_class(config):
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTextModelWithProjection if config.projection_dim else transformers.CLIPTextModel


def random_torch(config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields = {name: value for name, value in vars(config).items() if value is not None}
    model = torch_class(config)(transformers.CLIPTextConfig(**fields, bos_token_id=0, pad_token_id=1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model


def run_torch(model, tokens):
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens, dtype=torch.int64), output_hidden_states=True)
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
    return [x.to(torch.float32).numpy() for x in (out.last_hidden_state, pooled, out.hidden_states[-2])]


def relative_errors(actual, expected):
    """Of the features, of the pooled vectors, and of the features before the last block."""
    return [np.linalg.norm(np.asarray(a, np.float32) - e) / np.linalg.norm(e) for a, e in zip(actual, expected)]


@functools.cache
def random_params(config):
    leaves, tree = jax.tree.flatten(jax.eval_shape(functools.partial(clip.init, config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    random = [rng.normal(size=leaf.shape, scale=2 * leaf.shape[-1] ** -0.5).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, random)


def change_tensors(folder, change):
    """Rewrites the folder's tensors by name."""
    weights.write_safetensors(folder / "model.safetensors", change(dict(weights.read_safetensors(folder))))


@pytest.mark.parametrize("name, length", PARITY)
def test_transformers_weights_give_the_same_features(tmp_path, name, length):
    config, tokens = CONFIGS[name], tokens_for(CONFIGS[name], length)
    reference = random_torch(config)
    reference.save_pretrained(tmp_path)
    loaded, params = clip.load_folder(tmp_path)
    assert loaded == config
    ours = apply(config, params, tokens)
    assert ours[0].shape == (3, length, config.hidden_size)
    assert ours[1].shape == (3, config.projection_dim or config.hidden_size)
    assert max(relative_errors(ours, run_torch(reference, tokens))) < 1e-5


@pytest.mark.parametrize("name, length", PARITY)
def test_transformers_opens_what_we_save(tmp_path, name, length):
    config, params, tokens = CONFIGS[name], random_params(CONFIGS[name]), tokens_for(CONFIGS[name], length)
    clip.save_folder(tmp_path, config, params)
    reference, report = torch_class(config).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert max(relative_errors(apply(config, params, tokens), run_torch(reference.eval(), tokens))) < 1e-5


@pytest.mark.parametrize("name", ["quick gelu", "projected"])
def test_both_generations_of_names_load(tmp_path, name):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    clip.save_folder(tmp_path, config, params)
    positions = {"text_model.embeddings.position_ids": np.arange(config.max_position_embeddings)[None]}
    change_tensors(tmp_path, lambda tensors: tensors | positions)
    jax.tree.map(np.testing.assert_array_equal, clip.load_folder(tmp_path)[1], params)
    change_tensors(tmp_path, lambda tensors: {n.removeprefix("text_model."): t for n, t in tensors.items()})
    jax.tree.map(np.testing.assert_array_equal, clip.load_folder(tmp_path)[1], params)


@pytest.mark.parametrize("name, length", [PARITY[0], PARITY[1], PARITY[4]])
def test_bf16_error_is_that_of_torch(tmp_path, name, length):
    torch = pytest.importorskip("torch")
    config, params, tokens = CONFIGS[name], random_params(CONFIGS[name]), tokens_for(CONFIGS[name], length)
    clip.save_folder(tmp_path, config, params)
    exact = run_torch(torch_class(config).from_pretrained(tmp_path).eval(), tokens)
    theirs = run_torch(torch_class(config).from_pretrained(tmp_path, dtype=torch.bfloat16).eval(), tokens)
    ours = apply(config, params, tokens, dtype=jnp.bfloat16)
    assert {output.dtype for output in ours} == {jnp.dtype(jnp.bfloat16)}
    for error, bound in zip(relative_errors(ours, exact), relative_errors(theirs, exact)):
        assert 1e-4 < error < 1.5 * bound


@pytest.mark.parametrize(
    "eos, row, end",
    [
        (9, [4, 9, 3, 9, 9], 1),
        (9, [9, 4, 11, 3, 1], 0),
        (9, [4, 11, 3, 1, 9], 4),
        (9, [4, 11, 3, 1, 8], 0),
        (2, [4, 2, 11, 3, 11], 2),
    ],
)
def test_the_end_of_text_is_the_first_eos_or_in_old_configs_the_largest_id(eos, row, end):
    assert clip.end_positions(jnp.array([row]), eos).tolist() == [end]


def test_tokens_do_not_see_those_after_them():
    config = CONFIGS["quick gelu"]
    tokens = tokens_for(config, 13)
    changed = np.where(np.arange(13) < 5, tokens, (tokens + 1) % config.vocab_size)
    features, others = (apply(config, random_params(config), ids).features for ids in (tokens, changed))
    np.testing.assert_allclose(features[:, :5], others[:, :5], rtol=1e-5, atol=1e-5)
    assert np.abs(features[:, 5:] - others[:, 5:]).max(axis=-1).min() > 1e-2


def test_what_pads_the_text_does_not_change_the_pooled_vector():
    config = CONFIGS["projected"]
    tokens = tokens_for(config, 11)
    ends = np.argmax(tokens == config.eos_token_id, axis=-1)[:, None]
    padded = np.where(np.arange(11) > ends, config.eos_token_id, tokens)
    pooled, same = (apply(config, random_params(config), ids).pooled for ids in (tokens, padded))
    assert (tokens != padded).any(axis=-1).all()
    np.testing.assert_allclose(pooled, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["legacy end", "projected"])
def test_saved_parameters_come_back_bit_identical(tmp_path, name, dtype):
    config = CONFIGS[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    clip.save_folder(tmp_path, config, params)
    loaded, restored = clip.load_folder(tmp_path)
    assert loaded == config
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(restored))


def test_load_folder_casts_to_the_dtype_asked_for(tmp_path):
    clip.save_folder(tmp_path, CONFIGS["legacy end"], random_params(CONFIGS["legacy end"]))
    _, params = clip.load_folder(tmp_path, dtype=jnp.bfloat16)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(CONFIGS["legacy end"]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "clip"}, "model_type='clip'"),
        ({"hidden_act": "relu"}, "hidden_act='relu'.*quick_gelu"),
        ({"num_attention_heads": 3}, "hidden_size=32 must be a multiple of num_attention_heads=3"),
        ({"eos_token_id": 50}, "eos_token_id=50.*vocab_size=50"),
        ({"num_hidden_layers": 3}, r"missing tensors: text_model\.encoder\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"unexpected tensors: text_model\.encoder\.layers\.1\."),
        (
            {"max_position_embeddings": 21},
            r"text_model.embeddings.position_embedding.weight has shape \(20, 32\).*expects \(21, 32\)",
        ),
        (
            {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 8},
            r"missing tensors: text_projection\.weight",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, change, message):
    clip.save_folder(tmp_path, CONFIGS["coarse norms"], random_params(CONFIGS["coarse norms"]))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        clip.load_folder(tmp_path)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_tensors_that_do_not_fit_are_named(tmp_path, prefix):
    clip.save_folder(tmp_path, CONFIGS["coarse norms"], random_params(CONFIGS["coarse norms"]))
    change_tensors(tmp_path, lambda tensors: {n.replace("text_model.", prefix): t for n, t in tensors.items()})
    norm = f"{prefix}final_layer_norm.bias"
    change_tensors(tmp_path, lambda tensors: tensors | {norm: tensors[norm][:-1]})
    with pytest.raises(ValueError, match=rf"{norm} has shape \(31,\).*expects \(32,\)"):
        clip.load_folder(tmp_path)
    change_tensors(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != norm})
    with pytest.raises(ValueError, match=f"missing tensors: {norm};"):
        clip.load_folder(tmp_path)


def test_a_folder_of_t5_is_refused(tmp_path):
    config = t5.t5_tiny()
    shapes = jax.eval_shape(functools.partial(t5.init, config), jax.random.key(0))
    t5.save_folder(tmp_path, config, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    with pytest.raises(ValueError, match=r"config.json has model_type='t5', and this model needs 'clip_text_model'"):
        clip.load_folder(tmp_path)


def test_more_tokens_than_positions_are_refused():
    config = CONFIGS["legacy end"]
    with pytest.raises(ValueError, match="10 tokens do not fit max_position_embeddings=9"):
        clip.apply(config, random_params(config), np.zeros((1, 10), np.int32))


def test_clip_l_has_its_published_size():
    shapes = jax.eval_shape(functools.partial(clip.init, clip.clip_l()), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 123_060_480


def test_fresh_features_have_unit_scale_and_depend_on_order():
    config = clip.clip_tiny()
    tokens = tokens_for(config, 12)
    params = jax.jit(clip.init, static_argnums=0)(config, jax.random.key(0))
    features, pooled, _ = apply(config, params, tokens)
    np.testing.assert_allclose(np.mean(np.square(features), axis=-1), 1, rtol=5e-2)
    swapped = apply(config, params, tokens[:, [1, 0, *range(2, 12)]]).pooled
    assert np.abs(pooled - swapped)[1:].max(axis=-1).min() > 1e-3
