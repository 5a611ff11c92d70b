import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import qwen3, t5
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.qwen3 import Qwen3Config
from mixgrpo_jax.tasks.signs.data import build_tokenizer

CONFIGS = {
    "grouped": Qwen3Config(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-4,
        rope_theta=1e6,
    ),
    "one key": qwen3.qwen3_tiny(num_hidden_layers=3, num_key_value_heads=1, head_dim=6),
    "all keys": qwen3.qwen3_tiny(num_hidden_layers=2, num_key_value_heads=4),
}
# Ids, on which side padding is, and the layers, the last of which may be the model's last.
PARITY = [("grouped", 13, "right", (1, 2, 4)), ("one key", 17, "left", (2, 3)), ("all keys", 92, "right", (1, 2))]
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
PROMPTS = ["a blue sign that says 4270 in white", "a red sign"]
LAYERS = (1, 2, 4)

# Most of the time here goes into compiling, which is faster without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
apply = jit(qwen3.apply, static_argnums=0, static_argnames=("dtype", "layers"))


def chat_tokenizer():
    """The signs' tokenizer with a chat template as Qwen3's."""
    tokenizer = build_tokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def inputs_for(config, length, side):
    """Random ids of three texts, of which two are padded."""
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (3, length)).astype(np.int32)
    from_start = np.arange(length) if side == "right" else np.arange(length)[::-1]
    return ids, (from_start < np.array([[length], [length // 2], [1]])).astype(np.int32)


def run_torch(model, inputs, layers):
    import torch

    ids, mask = (torch.tensor(array, dtype=torch.int64) for array in inputs)
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return [states[layer].to(torch.float32).numpy() for layer in layers]


def relative_errors(features, expected):
    """At each of the layers."""
    actual = np.split(np.asarray(features, np.float32), len(expected), axis=-1)
    return [np.linalg.norm(a - e) / np.linalg.norm(e) for a, e in zip(actual, expected)]


@functools.cache
def random_params(config):
    leaves, tree = jax.tree.flatten(jax.eval_shape(functools.partial(qwen3.init, config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    random = [rng.normal(size=leaf.shape, scale=2 * leaf.shape[-1] ** -0.5).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, random)


def opened(folder, **options):
    """transformers' model of a folder that we saved, none of whose tensors may be missing or left over."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, report = transformers.Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name, length, side, layers", PARITY)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_weights_give_the_same_features(tmp_path, name, length, side, layers, tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, inputs = CONFIGS[name], inputs_for(CONFIGS[name], length, side)
    reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**vars(config), tie_word_embeddings=tied)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    reference.save_pretrained(tmp_path)
    loaded, params = qwen3.load_folder(tmp_path)
    assert loaded == config
    features = apply(config, params, *inputs, layers=layers)
    assert features.shape == (3, length, len(layers) * config.hidden_size)
    assert max(relative_errors(features, run_torch(reference, inputs, layers))) < 1e-5


@pytest.mark.parametrize("name, length, side, layers", PARITY)
def test_transformers_opens_what_we_save(tmp_path, name, length, side, layers):
    config, params, inputs = CONFIGS[name], random_params(CONFIGS[name]), inputs_for(CONFIGS[name], length, side)
    qwen3.save_folder(tmp_path, config, params)
    features = apply(config, params, *inputs, layers=layers)
    assert max(relative_errors(features, run_torch(opened(tmp_path), inputs, layers))) < 1e-5


@pytest.mark.parametrize("name, length, side, layers", PARITY)
def test_bf16_error_is_that_of_torch(tmp_path, name, length, side, layers):
    torch = pytest.importorskip("torch")
    config, params, inputs = CONFIGS[name], random_params(CONFIGS[name]), inputs_for(CONFIGS[name], length, side)
    qwen3.save_folder(tmp_path, config, params)
    exact = run_torch(opened(tmp_path), inputs, layers)
    theirs = np.concatenate(run_torch(opened(tmp_path, dtype=torch.bfloat16), inputs, layers), axis=-1)
    ours = apply(config, params, *inputs, dtype=jnp.bfloat16, layers=layers)
    assert ours.dtype == jnp.bfloat16
    for error, bound in zip(relative_errors(ours, exact), relative_errors(theirs, exact)):
        assert 1e-4 < error < 2 * bound


def test_prompts_become_the_features_of_the_released_pipeline(tmp_path):
    pipeline = pytest.importorskip("diffusers").Flux2KleinPipeline
    config = qwen3.qwen3_tiny()
    params, tokenizer = random_params(config), chat_tokenizer()
    qwen3.save_folder(tmp_path, config, params)
    embed = functools.partial(pipeline._get_qwen3_prompt_embeds, opened(tmp_path), tokenizer, PROMPTS)
    for limit in (24, 14):
        expected = embed(max_sequence_length=limit, hidden_states_layers=LAYERS).detach().numpy()
        ids, mask = qwen3.tokenize(tokenizer, PROMPTS, limit, cut=limit < 24)
        assert ids.shape == mask.shape == (2, limit) and ids.dtype == mask.dtype == np.int32
        assert max(relative_errors(apply(config, params, ids, mask, layers=LAYERS), [expected])) < 1e-5


def test_prompts_are_a_users_words_answered_without_thinking():
    tokenizer = chat_tokenizer()
    ids, mask = qwen3.tokenize(tokenizer, PROMPTS, 24)
    assert mask.sum(axis=1).tolist() == [19, 11]
    assert (mask[:, :-1] >= mask[:, 1:]).all() and (ids[mask == 0] == tokenizer.pad_token_id).all()
    words = tokenizer.decode(ids[1][mask[1] > 0])
    assert words.startswith("<|im_start|>") and words.endswith("<think> </think> </s>") and "a red sign" in words


def test_a_prompt_that_does_not_fit_is_named():
    tokenizer = chat_tokenizer()
    with pytest.raises(ValueError, match=r"'a blue .*' has 19 tokens; the model takes 18: .* raise model.text_length"):
        qwen3.tokenize(tokenizer, PROMPTS, 18)
    assert qwen3.tokenize(tokenizer, PROMPTS, 18, cut=True)[1].sum(axis=1).tolist() == [18, 11]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template: .* chat_template\.jinja"):
        qwen3.tokenize(tokenizer, PROMPTS, 24)


def test_layers_after_the_last_that_is_asked_for_are_not_computed():
    config = CONFIGS["grouped"]
    params = jax.tree.map(np.array, random_params(config))
    for leaf in jax.tree.leaves(params["blocks"]):
        leaf[4] = np.nan
    assert np.isfinite(apply(config, params, *inputs_for(config, 13, "right"), layers=(1, 2, 4))).all()


@pytest.mark.parametrize("layers", [(), (0, 1), (2, 2), (3, 6)])
def test_layers_that_are_not_there_are_named(layers):
    config = CONFIGS["grouped"]
    with pytest.raises(ValueError, match=r"layers=\(.*\) must ascend from 1 to num_hidden_layers=5"):
        qwen3.apply(config, random_params(config), *inputs_for(config, 3, "right"), layers=layers)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_saved_parameters_come_back_bit_identical(tmp_path, dtype):
    config = CONFIGS["grouped"]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    qwen3.save_folder(tmp_path, config, params)
    loaded, restored = qwen3.load_folder(tmp_path)
    assert loaded == config
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(restored))


def change_config(folder, change):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2"}, r"config.json has model_type='qwen2', and this model needs 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_type='linear'"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 must be a multiple of num_key_value_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_hidden_layers": 6}, r"missing tensors: model\.layers\.5\."),
        ({"num_hidden_layers": 4}, r"unexpected tensors: model\.layers\.4\."),
        ({"vocab_size": 38}, r"model.embed_tokens.weight has shape \(37, 24\).*expects \(38, 24\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(tmp_path, change, message):
    qwen3.save_folder(tmp_path, CONFIGS["grouped"], random_params(CONFIGS["grouped"]))
    change_config(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        qwen3.load_folder(tmp_path)


def test_a_folder_of_t5_is_refused(tmp_path):
    t5.save_folder(tmp_path, t5.t5_tiny(), {"embedding": np.zeros((64, 128), np.float32)})
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json has model_type='t5', and this model needs 'qwen3'"):
        qwen3.load_folder(tmp_path)


def test_both_generations_of_the_angles_base_are_read(tmp_path):
    config = CONFIGS["grouped"]
    qwen3.save_folder(tmp_path, config, random_params(config))
    change_config(tmp_path, {"rope_theta": 5e5, "rope_scaling": None})
    assert qwen3.read_config(tmp_path).rope_theta == 5e5
    change_config(tmp_path, {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}})
    assert qwen3.read_config(tmp_path).rope_theta == 7e5


def test_the_head_is_not_read(tmp_path):
    config, params = CONFIGS["grouped"], random_params(CONFIGS["grouped"])
    qwen3.save_folder(tmp_path, config, params)
    file = tmp_path / "model.safetensors"
    weights.write_safetensors(file, dict(weights.read_safetensors(tmp_path)) | {"lm_head.weight": np.zeros((37, 24))})
    jax.tree.map(np.testing.assert_array_equal, qwen3.load_folder(tmp_path)[1], params)


@pytest.mark.parametrize("config, size", [(qwen3.qwen3_4b(), 4_022_468_096), (qwen3.qwen3_8b(), 7_568_405_504)])
def test_released_models_have_their_published_sizes(config, size):
    shapes = jax.eval_shape(functools.partial(qwen3.init, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == size
