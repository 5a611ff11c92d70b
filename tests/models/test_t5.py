import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import t5
from mixgrpo_jax.models.t5 import T5Config

CONFIGS = {
    "wide heads": T5Config(vocab_size=37, d_model=24, d_kv=16, d_ff=50, num_layers=3, num_heads=2),
    "narrow heads": T5Config(vocab_size=19, d_model=40, d_kv=4, d_ff=33, num_layers=1, num_heads=5),
    "few buckets": T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    ),
}
PARITY = [("wide heads", 13), ("narrow heads", 150), ("few buckets", 41)]


apply = jax.jit(t5.apply, static_argnums=0, static_argnames="dtype")


def tokens_for(config, length, batch=2):
    return np.random.default_rng(1).integers(0, config.vocab_size, (batch, length)).astype(np.int32)


def run_torch(model, tokens):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens, dtype=torch.int64)).last_hidden_state.to(torch.float32).numpy()


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float32) - expected) / np.linalg.norm(expected)


@functools.cache
def random_params(config):
    leaves, tree = jax.tree.flatten(jax.eval_shape(functools.partial(t5.init, config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    random = [rng.normal(size=leaf.shape, scale=2 * leaf.shape[-1] ** -0.5).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, random)


@pytest.mark.parametrize("name, length", PARITY)
def test_transformers_weights_give_the_same_features(tmp_path, name, length):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = CONFIGS[name]
    reference = transformers.T5EncoderModel(
        transformers.T5Config(**vars(config), feed_forward_proj="gated-gelu")
    ).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    reference.save_pretrained(tmp_path)
    loaded, params = t5.load_folder(tmp_path)
    assert loaded == config
    tokens = tokens_for(config, length)
    assert relative_error(apply(config, params, tokens), run_torch(reference, tokens)) < 1e-5


@pytest.mark.parametrize("name, length", PARITY)
def test_transformers_opens_what_we_save(tmp_path, name, length):
    transformers = pytest.importorskip("transformers")
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    t5.save_folder(tmp_path, config, params)
    reference = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    tokens = tokens_for(config, length)
    assert relative_error(apply(config, params, tokens), run_torch(reference, tokens)) < 1e-5


@pytest.mark.parametrize("name, length", PARITY)
def test_bf16_error_is_that_of_torch(tmp_path, name, length):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, params, tokens = CONFIGS[name], random_params(CONFIGS[name]), tokens_for(CONFIGS[name], length)
    t5.save_folder(tmp_path, config, params)
    exact = run_torch(transformers.T5EncoderModel.from_pretrained(tmp_path).eval(), tokens)
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ours = apply(config, params, tokens, dtype=jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(ours, exact) < 1.5 * relative_error(run_torch(theirs, tokens), exact)


@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 20), (16, 64)])
def test_buckets_are_those_of_transformers_at_every_distance(buckets, distance):
    torch, modeling = pytest.importorskip("torch"), pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    expected = modeling.T5Attention._relative_position_bucket(relative, True, buckets, distance).numpy()
    np.testing.assert_array_equal(t5.relative_buckets(600, buckets, distance), expected)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_saved_parameters_come_back_bit_identical(tmp_path, dtype):
    config = CONFIGS["few buckets"]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    t5.save_folder(tmp_path, config, params)
    loaded, restored = t5.load_folder(tmp_path)
    assert loaded == config
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "clip_text_model"}, "model_type='clip_text_model'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"num_layers": 3}, r"missing tensors: encoder\.block\.2\.layer"),
        ({"num_layers": 1}, r"unexpected tensors: encoder\.block\.1\.layer"),
        ({"vocab_size": 51}, r"shared.weight has shape \(50, 32\).*expects \(51, 32\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(tmp_path, change, message):
    t5.save_folder(tmp_path, CONFIGS["few buckets"], random_params(CONFIGS["few buckets"]))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        t5.load_folder(tmp_path)


def test_t5_xxl_has_its_published_size():
    shapes = jax.eval_shape(functools.partial(t5.init, t5.t5_xxl()), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 4_762_310_656


def test_fresh_features_have_unit_scale_and_depend_on_order():
    config = t5.t5_tiny(vocab_size=20)
    tokens = tokens_for(config, 12)
    params = jax.jit(t5.init, static_argnums=0)(config, jax.random.key(0))
    features, reversed_ = np.split(apply(config, params, np.concatenate([tokens, tokens[:, ::-1]])), 2)
    assert features.shape == (2, 12, config.d_model)
    np.testing.assert_allclose(np.mean(np.square(features), axis=-1), 1, rtol=1e-3)
    assert np.abs(features - reversed_[:, ::-1]).max() > 1e-2
