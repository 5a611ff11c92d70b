"""Files of adapters: what diffusers opens and saves, and what other programs name otherwise."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open

from mixgrpo_jax.models import flux, lora, lora_files
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.lora import LoraConfig
from mixgrpo_jax.models.trainable import make_trainable, trainable_shapes
from tests.models.test_lora import (
    ATTENTION,
    CONFIG,
    EVERY,
    TABLE,
    adapters,
    apply,
    inputs,
    params,
    relative_error,
    velocity,
)

RULES = flux.TRANSFORMER.rules(CONFIG)
RELEASE = RULES[len(TABLE) :]
Q = "single_transformer_blocks.1.attn.to_q"


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory):
    """Builds a diffusers model with our base weights; each caller loads its own adapters."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("base")
    flux.TRANSFORMER.save_folder(folder, CONFIG, params())
    return lambda: diffusers.FluxTransformer2DModel.from_pretrained(folder)


def pipeline(model):
    import diffusers

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), transformer=model, **parts)


def run_torch(model):
    import torch

    tensors = {name: torch.tensor(value) for name, value in inputs().items()}
    names = dict(x="hidden_states", text="encoder_hidden_states", pooled="pooled_projections", image_ids="img_ids")
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        return model(**tensors, txt_ids=torch.zeros(5, 3)).sample.numpy()


@pytest.mark.parametrize(
    "config, through",
    [
        (ATTENTION, "pipeline"),
        (ATTENTION, "model"),
        (EVERY, "pipeline"),
        (dataclasses.replace(ATTENTION, alpha=4), "model"),
    ],
)
def test_diffusers_opens_what_we_save(torch_model, tmp_path, config, through):
    lora_files.save(tmp_path, TABLE, adapters(config), config.scale)
    model = torch_model()
    if through == "pipeline":
        pipeline(model).load_lora_weights(tmp_path)
    else:
        model.load_lora_adapter(tmp_path / lora_files.FILE_NAME)
    assert relative_error(run_torch(model), velocity(config)) < 1e-5


def with_alphas(tensors):
    return tensors | {name.replace("lora_A.weight", "alpha"): np.float32(16) for name in tensors if "lora_A" in name}


def save_torch(model, folder, how):
    """Writes the model's adapter in each of the ways that diffusers has, and reads it back as diffusers does."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    if how in ("model", "rslora"):
        model.save_lora_adapter(folder)
        return
    metadata = _collate_lora_metadata({"transformer": model}) if how == "metadata" else {}
    pipeline(None).save_lora_weights(folder, get_peft_model_state_dict(model), **metadata)
    if how == "alpha":
        file = folder / lora_files.FILE_NAME
        weights.write_safetensors(file, with_alphas(dict(weights.read_safetensors(file))))


@pytest.mark.parametrize("how, scale", [("model", 4), ("rslora", 8), ("metadata", 4), ("alpha", 4), ("bare", 1)])
def test_we_open_what_diffusers_saves(torch_model, tmp_path, how, scale):
    import torch
    from peft import LoraConfig as PeftConfig

    torch.manual_seed(0)
    model = torch_model()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(PeftConfig(r=4, lora_alpha=16, target_modules=targets, use_rslora=how == "rslora"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_torch(model, tmp_path, how)
    if how == "bare":  # such a file has lost its alpha: compare with what diffusers makes of it
        model = torch_model()
        pipeline(model).load_lora_weights(tmp_path)
    loaded = lora_files.load(tmp_path, TABLE, params())
    (stored,) = (t for name, t in weights.read_safetensors(tmp_path).items() if name.endswith(f"{Q}.lora_B.weight"))
    b = loaded["single_blocks"]["attention"]["q"]["b"][1]
    np.testing.assert_array_equal(b, scale * weights.halves(np.asarray(stored).T, 16))
    v = apply(CONFIG, lora.merge(params(), loaded, 1.0), **inputs())
    assert relative_error(v, apply(CONFIG, params(), **inputs())) > 0.1
    assert relative_error(v, run_torch(model)) < 1e-5


@pytest.mark.parametrize("config, ulps", [(ATTENTION, 0), (dataclasses.replace(ATTENTION, alpha=4), 0), (EVERY, 2)])
def test_saved_adapters_come_back(tmp_path, config, ulps):
    lora_files.save(tmp_path, TABLE, adapters(config), config.scale)
    with safe_open(tmp_path / lora_files.FILE_NAME, framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
    for path in (tmp_path, tmp_path / lora_files.FILE_NAME):
        loaded = lora_files.load(path, TABLE, jax.eval_shape(params), config.scale)
        assert jax.tree.structure(loaded) == jax.tree.structure(adapters(config))
        jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, ulps), loaded, adapters(config))


def test_tensors_have_diffusers_names_and_the_scale_in_b():
    tensors = lora_files.to_peft(TABLE, adapters(ATTENTION), 2.0)
    assert len(tensors) == 2 * (2 * 8 + 3 * 3)
    q = adapters(ATTENTION)["single_blocks"]["attention"]["q"]
    np.testing.assert_array_equal(tensors[f"transformer.{Q}.lora_A.weight"], q["a"][1].T)
    np.testing.assert_array_equal(tensors[f"transformer.{Q}.lora_B.weight"], 2 * weights.neighbours(q["b"][1], 16).T)
    v, theirs = adapters(ATTENTION)["single_blocks"]["attention"]["v"], Q.replace("to_q", "to_v")
    np.testing.assert_array_equal(tensors[f"transformer.{theirs}.lora_B.weight"], 2 * v["b"][1].T)


def test_bf16_tensors_become_fp32_adapters(tmp_path):
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in lora_files.to_peft(TABLE, adapters(ATTENTION), 1.0).items()}
    weights.write_safetensors(tmp_path / "bf16.safetensors", tensors)
    loaded = lora_files.load(tmp_path, TABLE, params())
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def modules(rules, rank=3):
    """A and B of every linear layer by its name, and the model that has s B A added to its weights."""
    rng, found = np.random.default_rng(4), {}
    kernels = lora.kernels(params())
    for rule in rules:
        if (layer := rule.ours.removesuffix("/kernel")) in kernels:
            d_in, d_out = kernels[layer].shape[-2:]
            for name in rule.names(kernels[layer].shape):
                sizes = dict(a=(rank, d_in), b=rule.their_shape((rank, d_out)))
                found[name.removesuffix(".weight")] = {
                    k: rng.normal(size=v).astype(np.float32) for k, v in sizes.items()
                }
    return found


def products(rules, pairs, scales):
    """s B A of each layer, as loading would read them where they are the weights."""
    deltas = {f"{name}.weight": np.float32(scales[name]) * pair["b"] @ pair["a"] for name, pair in pairs.items()}
    kernels = [rule for rule in rules if rule.names((9,))[0] in deltas]
    shapes = {f"{layer}/kernel": kernel for layer, kernel in lora.kernels(params()).items()}
    skeleton = traverse_util.unflatten_dict(shapes, sep="/")
    return lora.kernels(weights.load(kernels, skeleton, deltas))


def named(prefix, a="lora_A", b="lora_B", alpha=False, underscores=False):
    def tensors(name, pair, value):
        name = prefix + (name.replace(".", "_") if underscores else name)
        scale = {f"{name}.alpha": np.array(value, np.float16)} if alpha else {}
        return {f"{name}.{a}.weight": pair["a"], f"{name}.{b}.weight": pair["b"]} | scale

    return tensors


@pytest.mark.parametrize(
    "rules, tensors, alpha",
    [
        (RELEASE, named("lora_unet_", "lora_down", "lora_up", alpha=True, underscores=True), True),  # kohya
        (RELEASE, named("diffusion_model."), False),  # ai-toolkit, ComfyUI
        (RELEASE, named("model.diffusion_model.", "lora_down", "lora_up", alpha=True), True),
        (TABLE, named("transformer."), False),  # diffusers
        (TABLE, named("transformer.", "lora.down", "lora.up"), False),  # and of old
        (TABLE, named("lora_transformer_", "lora_down", "lora_up", alpha=True, underscores=True), True),  # OneTrainer
        (TABLE, named("base_model.model.", "lora_A.default", "lora_B.default"), False),  # PEFT
    ],
)
def test_a_file_adds_to_every_kernel_what_it_adds_to_the_tensors_that_it_names(tmp_path, rules, tensors, alpha):
    pairs = modules(rules)
    alphas = {name: 1.5 * (1 + k % 3) if alpha else 3.0 for k, name in enumerate(pairs)}  # one for each layer
    file = {k: v for name, pair in pairs.items() for k, v in tensors(name, pair, alphas[name]).items()}
    weights.write_safetensors(tmp_path / "style.safetensors", file)
    loaded = lora_files.load(tmp_path / "style.safetensors", RULES, jax.eval_shape(params), scale=2.0)
    expected = products(rules, pairs, {name: value / 3 for name, value in alphas.items()})
    assert loaded.keys() == params().keys() and len(expected) == len(lora.pairs(loaded)) == len(lora.kernels(params()))
    for layer, (a, b) in lora.pairs(loaded).items():
        np.testing.assert_allclose(2.0 * a @ b, expected[layer], rtol=1e-4, atol=1e-4)


def write(folder, tensors, metadata=None, beside=None):
    """A PEFT folder's file, with settings in its header, or beside it."""
    weights.write_safetensors(folder / lora_files.PEFT_FILE, tensors, {"format": "pt"} | (metadata or {}))
    if beside is not None:
        (folder / lora_files.PEFT_CONFIG).write_text(json.dumps(beside))
    return folder


def peft(**changes):
    tensors = lora_files.to_peft(TABLE, adapters(ATTENTION), 1.0) | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


HEADER = {"transformer.r": "4", "transformer.lora_alpha": "16"}
PATTERN = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"single_transformer_blocks.1.attn.to_q": 2, "to_.": 12}}


@pytest.mark.parametrize(
    "change, metadata, beside, q, v",
    [
        ({}, None, None, 1, 1),
        ({}, HEADER, None, 4, 4),
        ({}, {lora_files.METADATA: json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}, None, 0.5, 0.5),
        ({}, None, {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "init_lora_weights": True}, 2, 2),
        ({}, None, {"r": 4, "lora_alpha": 8, "use_rslora": True}, 4, 4),
        ({}, None, PATTERN, 0.5, 3),
        ({f"transformer.{Q}.alpha": np.float32(8)}, None, None, 2, 1),
        ({f"transformer.{Q}.alpha": np.float32(8)}, None, {"r": 4, "lora_alpha": 8}, 2, 2),  # which agree
    ],
)
def test_alpha_is_found_wherever_it_is_kept(tmp_path, change, metadata, beside, q, v):
    loaded = lora_files.load(write(tmp_path, peft(**change), metadata, beside), RULES, params())
    for head, scale in (("q", q), ("v", v)):
        b, own = (tree["single_blocks"]["attention"][head]["b"][1] for tree in (loaded, adapters(ATTENTION)))
        np.testing.assert_array_equal(b, scale * own)


A, B = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({B: None}, {}, rf"{A} is without its B"),
        ({A: None}, {}, rf"{B} is without its A"),
        ({f"transformer.{Q}.lora_magnitude_vector": np.zeros(32)}, {}, "to_q.lora_magnitude_vector is of DoRA.*merge"),
        ({"lora_unet_a.dora_scale": np.zeros(32)}, {}, "lora_unet_a.dora_scale is of DoRA"),
        ({"lora_unet_a.lokr_w1": np.zeros((4, 4))}, {}, "lora_unet_a.lokr_w1 is of LoKr"),
        ({"lora_unet_a.hada_w1_a": np.zeros((4, 4))}, {}, "lora_unet_a.hada_w1_a is of LoHa"),
        ({"lora_unet_a.lora_mid.weight": np.zeros((4, 4, 3, 3))}, {}, "lora_mid.weight is of a convolution"),
        ({"diffusion_model.img_in.diff": np.zeros((4, 4))}, {}, "img_in.diff is of no low-rank adapter"),
        ({f"transformer.{Q}.lora_B.bias": np.zeros(32)}, {}, "to_q.lora_B.bias is no tensor of a LoRA file"),
        ({A: np.zeros((2, 32))}, {}, rf"{Q}.lora_A.weight has shape \(2, 32\).*\(4, 32\)"),
        ({A: np.zeros((2, 32)), B: np.zeros((32, 2))}, {}, rf"{Q}.lora_A.weight has shape .*must be of one rank"),
        ({A: np.zeros((4, 48))}, {}, rf"{Q}.lora_A.weight has shape \(4, 48\).*\(4, 32\)"),
        ({A: np.zeros((4, 32, 1, 1))}, {}, r"has shape \(4, 32, 1, 1\).*linear"),
        ({A: np.full((4, 32), np.nan)}, {}, f"tensor {A} is not finite"),
        ({B: np.full((32, 4), np.inf)}, {}, f"tensor {B} is not finite"),
        ({A: np.zeros((4, 32), np.int8)}, {}, f"tensor {A}.* is int8"),
        ({n.replace(".1.", ".7."): np.zeros((4, 32)) for n in (A, B)}, {}, r"blocks\.7\.attn.* is of no linear layer"),
        (
            {n.replace("single_", "joint_"): np.zeros((4, 32)) for n in (A, B)},
            {},
            r"joint_transf.*this model, which has",
        ),
        (
            {A.removeprefix("transformer."): np.zeros((4, 32)), B.removeprefix("transformer."): np.zeros((32, 4))},
            {},
            "are both of single_blocks/attention/q",
        ),
        (
            {"text_encoder.q_proj.lora_A.weight": np.zeros((4, 32))},
            {},
            "text_encoder.q_proj.lora_A.* of a text encoder",
        ),
        ({"lora_te1_q.lora_down.weight": np.zeros((4, 32))}, {}, "lora_te1_q.* is of a text encoder"),
        ({f"transformer.{Q}.alpha": np.float32("nan")}, {}, "to_q.alpha is nan"),
        ({f"transformer.{Q}.alpha": np.zeros(3)}, {}, r"to_q.alpha is \(3,\)"),
        ({"transformer.other.alpha": np.float32(8)}, {}, "transformer.other.alpha is of no adapter"),
        ({f"transformer.{Q}.alpha": np.float32(16)}, {"lora_alpha": 8}, "gives alpha twice: .*to_q.alpha is 16, .* 8"),
        ({}, {"r": 8}, "r=8, .* of rank 4"),
        ({}, {"alpha_pattern": ["to_q"]}, r"alpha_pattern=\['to_q'\], which is not supported"),
        (
            {"diffusion_model.a.lora_A.weight": np.zeros(()), "diffusion_model.a.lora_B.weight": np.zeros(())},
            {},
            "empty",
        ),
        ({}, {"use_dora": True}, "use_dora=True, which is not supported"),
        ({}, {"lora_bias": True}, "lora_bias=True, which is not supported"),
        ({}, {"peft_type": "LOHA"}, "peft_type='LOHA', which is not supported"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which is not supported"),
        ({}, {"lora_alpha": "8"}, "lora_alpha is '8': it must be a number"),
        ({}, [], "adapter_config.json holds a list"),
    ],
)
def test_what_our_adapters_cannot_be_is_refused_by_name(tmp_path, change, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        lora_files.load(write(tmp_path, peft(**change), beside=settings), RULES, params())
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("header", ["{", "[]"])
def test_a_header_that_is_not_understood_is_refused(tmp_path, header):
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: its header is not understood"):
        lora_files.load(write(tmp_path, peft(), {lora_files.METADATA: header}), RULES, params())


def test_a_folder_must_hold_one_file_of_adapters(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.safetensors: give the path of one LoRA file"):
        lora_files.load(tmp_path, RULES, params())
    for name in ("a-000001", "a-000002"):
        weights.write_safetensors(tmp_path / f"{name}.safetensors", peft())
    with pytest.raises(ValueError, match=r"holds a-000001\.safetensors, a-000002\.safetensors: give the path of one"):
        lora_files.load(tmp_path, RULES, params())


def made(config):
    """What training would start from."""
    return make_trainable(Parts(FAMILY, {"transformer": CONFIG}), params(), config, jax.random.key(0), False)


def test_training_starts_from_a_file(tmp_path):
    lora_files.save(tmp_path, TABLE, adapters(ATTENTION), ATTENTION.scale)
    config = LoraConfig(rank=4, alpha=1.0, init_from=str(tmp_path))
    expected = lora.merge(params(), adapters(ATTENTION), ATTENTION.scale)
    merged = lora.merge(params(), made(config).params, config.scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, expected)
    fresh = made(dataclasses.replace(config, init_from=""))
    assert jax.tree.structure(made(config)) == jax.tree.structure(fresh)
    away = dataclasses.replace(config, init_from="/not/there")
    shapes = trainable_shapes(Parts(FAMILY, {"transformer": CONFIG}), params(), away, False).params
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), shapes, fresh.params)


def test_layers_and_blocks_that_a_file_leaves_out_start_fresh(tmp_path):
    config = LoraConfig(rank=4, alpha=4, targets=r"single_blocks/(attention/(q|v)|out)", init_from=str(tmp_path))
    some = {
        name: tensor for name, tensor in peft().items() if "single" in name and "to_q" in name and name not in (A, B)
    }
    weights.write_safetensors(tmp_path / "some.safetensors", some)
    fresh, started = (made(c).params["single_blocks"] for c in (dataclasses.replace(config, init_from=""), config))
    q, own = started["attention"]["q"], adapters(ATTENTION)["single_blocks"]["attention"]["q"]
    for block in (0, 2):
        np.testing.assert_array_equal(q["a"][block], own["a"][block])
        np.testing.assert_array_equal(q["b"][block], own["b"][block])
    np.testing.assert_array_equal(q["a"][1], fresh["attention"]["q"]["a"][1])
    assert not q["b"][1].any()
    jax.tree.map(
        np.testing.assert_array_equal,
        (started["out"], started["attention"]["v"]),
        (fresh["out"], fresh["attention"]["v"]),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rank=8), r"model.lora.rank=8, and model.lora.init_from='.*' is of rank 4: set model.lora.rank=4"),
        (
            dict(targets=".*/q"),
            r"model.lora.targets='\.\*/q' leaves out .*/k, .*set model.lora.targets='double_blocks/",
        ),
        (dict(init_from="nowhere"), "model.lora.init_from='nowhere': there is no such file or folder"),
    ],
)
def test_a_file_that_does_not_fit_the_config_is_refused_with_the_remedy(tmp_path, change, message):
    lora_files.save(tmp_path, TABLE, adapters(ATTENTION), 1.0)
    with pytest.raises(ValueError, match=message):
        made(LoraConfig(**(dict(rank=4, init_from=str(tmp_path)) | change)))


def test_the_targets_that_are_proposed_fit(tmp_path):
    lora_files.save(tmp_path, TABLE, adapters(EVERY), 1.0)
    config = LoraConfig(rank=3, init_from=str(tmp_path))
    with pytest.raises(ValueError, match="leaves out") as caught:
        made(config)
    targets = str(caught.value).split("set model.lora.targets='")[1].rstrip("'")
    made(dataclasses.replace(config, targets=targets))
