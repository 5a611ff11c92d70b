import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from mixgrpo_jax.models import flux, lora, weights
from mixgrpo_jax.models.flux.model import FluxConfig
from mixgrpo_jax.models.flux.weights import TABLE
from mixgrpo_jax.models.lora import Int8Kernel, LoraConfig

CONFIG = FluxConfig(
    in_channels=20,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
ATTENTION = LoraConfig(rank=4, alpha=8)
EVERYTHING = LoraConfig(rank=3, alpha=7.5, targets=".*")
Q = "single_transformer_blocks.1.attn.to_q"

apply = jax.jit(flux.apply, static_argnums=0, static_argnames=("dtype", "remat"))
init = jax.jit(lora.init, static_argnums=0)


@functools.cache
def params():
    """Every parameter random: fresh ones have zero modulations, and a velocity of zero would be equal to anything."""
    rng = np.random.default_rng(0)

    def normal(path, leaf):
        fan_in = leaf.shape[-2 if path[-1].key == "kernel" else -1]
        return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)

    shapes = jax.eval_shape(functools.partial(flux.init, CONFIG), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(normal, shapes)


@functools.cache
def adapters(config):
    """Adapters with random B, as after training."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(lora.init, config), params(), jax.random.key(0))
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@functools.cache
def inputs():
    rng = np.random.default_rng(2)
    shapes = dict(x=(2, 6, CONFIG.in_channels), text=(2, 5, CONFIG.joint_attention_dim))
    shapes["pooled"] = (2, CONFIG.pooled_projection_dim)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    scalars = dict(timestep=np.float32([0.9375, 0.125]), guidance=np.full(2, 3.5, np.float32))
    return arrays | scalars | {"image_ids": np.asarray(flux.image_ids(2, 3))}


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


def attached(config):
    return lora.attach(params(), adapters(config), config.scale)


def paths(tree):
    return {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("config", [ATTENTION, EVERYTHING])
def test_fresh_adapters_change_nothing(config):
    fresh = init(config, params(), jax.random.key(0))
    v = apply(CONFIG, params(), **inputs())
    np.testing.assert_array_equal(apply(CONFIG, lora.attach(params(), fresh, config.scale), **inputs()), v)
    assert lora.attach(params(), {}, config.scale) == params()


@pytest.mark.parametrize("scheme, std", [("gaussian", 1 / 8), ("kaiming_uniform", (3 * 64) ** -0.5)])
def test_adapters_are_random_in_a_and_zero_in_b(scheme, std):
    shapes = {"block": {"q": {"kernel": jax.ShapeDtypeStruct((5, 64, 48), jnp.bfloat16)}}}
    fresh = lora.init(LoraConfig(8, targets="block/q", init=scheme), shapes, jax.random.key(0))["block"]["q"]
    assert (fresh["a"].shape, fresh["b"].shape) == ((5, 64, 8), (5, 8, 48))
    assert fresh["a"].dtype == fresh["b"].dtype == jnp.float32
    assert fresh["a"].std() == pytest.approx(std, rel=0.05)
    assert not fresh["b"].any()


def test_default_targets_are_the_attention_projections():
    streams = {f"double_blocks/{s}/{layer}" for s in ("image", "text") for layer in ("attention_out", "attention/{}")}
    expected = {f"{layer.format(n)}/{f}" for layer in streams for n in "qkv" for f in "ab"}
    expected |= {f"single_blocks/attention/{n}/{f}" for n in "qkv" for f in "ab"}
    assert paths(adapters(ATTENTION)) == expected


def test_a_layers_random_numbers_do_not_depend_on_the_other_targets():
    one = init(LoraConfig(3, targets="single_blocks/attention/k"), params(), jax.random.key(0))
    many = init(EVERYTHING, params(), jax.random.key(0))
    single = many["single_blocks"]["attention"]
    np.testing.assert_array_equal(one["single_blocks"]["attention"]["k"]["a"], single["k"]["a"])
    assert (single["k"]["a"] != single["q"]["a"]).all()


@pytest.mark.parametrize("config, remat", [(ATTENTION, "none"), (EVERYTHING, "none"), (EVERYTHING, "block")])
def test_attached_adapters_equal_merged_ones(config, remat):
    merged = lora.merge(params(), adapters(config), config.scale)
    expected = apply(CONFIG, merged, **inputs())
    assert relative_error(apply(CONFIG, params(), **inputs()), expected) > 0.1
    assert relative_error(apply(CONFIG, attached(config), **inputs(), remat=remat), expected) < 1e-5


@functools.partial(jax.jit, static_argnums=1)
@jax.grad
def gradients(trained, combine):
    v = flux.apply(CONFIG, combine(params(), trained, EVERYTHING.scale), **inputs(), remat="block")
    return jnp.mean((v - inputs()["x"]) ** 2)


def test_gradients_are_those_of_the_dense_formula():
    low_rank, dense = (gradients(adapters(EVERYTHING), combine) for combine in (lora.attach, lora.merge))
    assert jax.tree.structure(low_rank) == jax.tree.structure(adapters(EVERYTHING))
    assert all(np.abs(leaf).max() > 0 and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low_rank))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), low_rank, dense)


def test_the_first_step_trains_b_alone():
    first = gradients(init(EVERYTHING, params(), jax.random.key(0)), lora.attach)
    for path, leaf in jax.tree_util.tree_leaves_with_path(first):
        assert leaf.any() == (path[-1].key == "b")


def test_the_low_rank_product_is_in_the_activations_dtype():
    kernel = attached(ATTENTION)["single_blocks"]["attention"]["q"]["kernel"][0]
    for x in (jnp.ones((3, 32), jnp.bfloat16), np.ones((3, 32), jnp.bfloat16)):
        assert (x @ kernel.astype(x.dtype)).dtype == jnp.bfloat16
    exact = apply(CONFIG, attached(ATTENTION), **inputs())
    assert 1e-4 < relative_error(apply(CONFIG, attached(ATTENTION), **inputs(), dtype=jnp.bfloat16), exact) < 0.05


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_keeps_dtypes_and_other_leaves(dtype):
    base = lora.freeze(params(), jnp.dtype(dtype).name)
    merged = lora.merge(base, adapters(ATTENTION), ATTENTION.scale)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    assert merged["image_in"]["kernel"] is base["image_in"]["kernel"]
    kernel, pair = (tree["single_blocks"]["attention"]["q"] for tree in (base, adapters(ATTENTION)))
    exact = kernel["kernel"].astype(np.float64) + 2 * pair["a"].astype(np.float64) @ pair["b"]
    np.testing.assert_allclose(merged["single_blocks"]["attention"]["q"]["kernel"], exact.astype(dtype), rtol=1e-5)


def test_sharded_adapters_give_the_same_velocity():
    code = """
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from mixgrpo_jax.models import lora
        from tests.models import test_lora as t

        mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        def place(path, leaf):
            kernel = any(getattr(key, "key", None) == "kernel" for key in path)
            cut = kernel and all(size % 2 == 0 for size in leaf.shape[-2:])
            return NamedSharding(mesh, P(*[None] * (leaf.ndim - 2), "fsdp", "tensor") if cut else P())
        adapted = lora.attach(lora.freeze(t.params(), "int8"), t.adapters(t.ATTENTION), 2.0)
        sharded = jax.device_put(adapted, jax.tree_util.tree_map_with_path(place, adapted))
        print(t.relative_error(*(t.apply(t.CONFIG, p, **t.inputs()) for p in (sharded, adapted))))
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(run, env=os.environ | flags, capture_output=True, text=True, check=True).stdout
    assert float(out) < 1e-5


def leaves_of(tree, kind):
    is_leaf = lambda leaf: isinstance(leaf, Int8Kernel)  # noqa: E731
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_leaf) if isinstance(leaf, kind)]


@pytest.mark.parametrize("host", [True, False])
def test_int8_rounds_to_half_a_step_and_takes_a_byte(host):
    original = params() if host else jax.tree.map(jnp.asarray, params())
    frozen = lora.freeze(original, "int8")
    kernels = leaves_of(frozen, Int8Kernel)
    assert len(kernels) == 2 * 7 + 6
    for name in ("double_blocks", "single_blocks"):
        for kernel, quantised in zip(
            leaves_of(original[name], (np.ndarray, jax.Array)), leaves_of(frozen[name], object)
        ):
            if kernel.ndim == 3:
                step = np.abs(kernel).max(axis=1, keepdims=True) / 127
                assert (np.abs(quantised.astype(np.float32) - kernel) <= 0.5001 * step).all()
                assert quantised.values.nbytes + quantised.scale.nbytes == kernel.size + 4 * kernel[:, 0].size
    others = leaves_of(frozen, (np.ndarray, jax.Array))
    assert {leaf.dtype for leaf in others} == {jnp.dtype(jnp.bfloat16)}
    assert isinstance(others[0], np.ndarray if host else jax.Array)


def test_int8_keeps_the_velocity_and_zero_columns():
    exact = apply(CONFIG, params(), **inputs())
    assert 1e-4 < relative_error(apply(CONFIG, lora.freeze(params(), "int8"), **inputs()), exact) < 0.02
    zeros = {"block": {"kernel": np.zeros((2, 8, 4), np.float32)}}
    np.testing.assert_array_equal(lora.freeze(zeros, "int8")["block"]["kernel"].astype(np.float32), 0)


def test_adapters_train_and_merge_over_int8():
    base = lora.freeze(params(), "int8")
    merged = lora.merge(base, adapters(ATTENTION), ATTENTION.scale)
    assert merged["single_blocks"]["attention"]["q"]["kernel"].dtype == jnp.float32

    def loss(trained):
        v = flux.apply(CONFIG, lora.attach(base, trained, ATTENTION.scale), **inputs(), remat="block")
        return jnp.mean((v - inputs()["x"]) ** 2), v

    trained, v = jax.jit(jax.grad(loss, has_aux=True))(adapters(ATTENTION))
    assert relative_error(v, apply(CONFIG, merged, **inputs())) < 1e-5
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(trained))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": -1}, "lora.rank=-1"),
        ({"alpha": 0}, "lora.alpha=0"),
        ({"targets": "(q"}, r"lora.targets='\(q' is not a regular expression"),
        ({"init": "orthogonal"}, "lora.init='orthogonal'.*kaiming_uniform"),
        ({"base": "int4"}, "lora.base='int4'.*int8"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_targets_that_match_nothing_and_foreign_adapters_are_named():
    with pytest.raises(ValueError, match=r"lora.targets='attn.to_q' matches no layer; there are double_blocks/image/"):
        lora.init(LoraConfig(4, targets="attn.to_q"), params(), jax.random.key(0))
    foreign = {"joint_blocks": {"q": {"a": np.zeros((4, 2)), "b": np.zeros((2, 4))}}}
    for combine in (lora.attach, lora.merge):
        with pytest.raises(ValueError, match="joint_blocks/q"):
            combine(params(), foreign, 1.0)
    with pytest.raises(ValueError, match="base='int4'"):
        lora.freeze(params(), "int4")


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory):
    """Builds a diffusers model with our base weights; each caller loads its own adapters."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("base")
    flux.save_folder(folder, CONFIG, params())
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
    [(ATTENTION, "pipeline"), (ATTENTION, "model"), (EVERYTHING, "pipeline"), (LoraConfig(rank=4, alpha=4), "model")],
)
def test_diffusers_opens_what_we_save(torch_model, tmp_path, config, through):
    lora.save(tmp_path, TABLE, adapters(config), config.scale)
    model = torch_model()
    if through == "pipeline":
        pipeline(model).load_lora_weights(tmp_path)
    else:
        model.load_lora_adapter(tmp_path / lora.FILE_NAME)
    assert relative_error(run_torch(model), apply(CONFIG, attached(config), **inputs())) < 1e-5


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
        file = folder / lora.FILE_NAME
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
    loaded, loaded_scale = lora.load(tmp_path, TABLE, params())
    assert loaded_scale == scale
    v = apply(CONFIG, lora.merge(params(), loaded, loaded_scale), **inputs())
    assert relative_error(v, apply(CONFIG, params(), **inputs())) > 0.1
    assert relative_error(v, run_torch(model)) < 1e-5


@pytest.mark.parametrize("config, ulps", [(ATTENTION, 0), (LoraConfig(4, alpha=4), 0), (EVERYTHING, 2)])
def test_saved_adapters_come_back(tmp_path, config, ulps):
    lora.save(tmp_path, TABLE, adapters(config), config.scale)
    with safe_open(tmp_path / lora.FILE_NAME, framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
    for path in (tmp_path, tmp_path / lora.FILE_NAME):
        loaded, scale = lora.load(path, TABLE, jax.eval_shape(params))
        assert scale == config.scale
        assert jax.tree.structure(loaded) == jax.tree.structure(adapters(config))
        jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, ulps), loaded, adapters(config))


def test_tensors_have_diffusers_names_and_the_scale_in_b():
    tensors = lora.to_peft(TABLE, adapters(ATTENTION), 2.0)
    assert len(tensors) == 2 * (2 * 8 + 3 * 3)
    q = adapters(ATTENTION)["single_blocks"]["attention"]["q"]
    np.testing.assert_array_equal(tensors[f"transformer.{Q}.lora_A.weight"], q["a"][1].T)
    np.testing.assert_array_equal(tensors[f"transformer.{Q}.lora_B.weight"], 2 * q["b"][1].T)


def test_bf16_tensors_become_fp32_adapters():
    tensors = lora.to_peft(TABLE, adapters(ATTENTION), 1.0)
    loaded, _ = lora.from_peft(TABLE, params(), {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"transformer.{Q}.lora_B.weight": None}, rf"missing tensors: transformer\.{Q}\.lora_B\.weight"),
        ({f"transformer.{Q}.lora_magnitude_vector": np.zeros(32)}, "unexpected tensors: .*to_q.lora_magnitude_vector"),
        ({f"transformer.{Q}.lora_A.weight": np.zeros((2, 32))}, rf"{Q}.lora_A.weight has shape \(2, 32\).*\(4, 32\)"),
        ({f"transformer.{Q}.lora_A.weight": np.zeros((4, 48))}, rf"{Q}.lora_A.weight has shape \(4, 48\).*\(4, 32\)"),
        ({"transformer.transformer_blocks.2.attn.to_q.lora_A.weight": np.zeros((4, 32))}, "transformer_blocks.2.attn"),
        ({"text_encoder.q_proj.lora_A.weight": np.zeros((4, 32))}, "unexpected tensors: text_encoder.q_proj.lora_A"),
        ({f"transformer.{Q}.alpha": np.float32(8)}, rf"alphas differ, .*{Q}.alpha=8; give all layers one alpha"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    tensors = lora.to_peft(TABLE, adapters(ATTENTION), 1.0) | change
    with pytest.raises(ValueError, match=message):
        lora.from_peft(TABLE, params(), {name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_an_adapter_of_another_model_is_named():
    tensors = {"transformer.joint_blocks.0.to_q.lora_A.weight": np.zeros((4, 32))}
    with pytest.raises(ValueError, match=r"no adapters of this model's layers .*joint_blocks\.0"):
        lora.from_peft(TABLE, params(), tensors)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 8}, "r=8 .* tensors of rank 4"),
        ({"alpha_pattern": {"to_q": 2}}, "alpha_pattern={'to_q': 2}, which is not supported"),
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"alphas": True}, "gives alpha twice"),
    ],
)
def test_metadata_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = lora.to_peft(TABLE, adapters(ATTENTION), 1.0)
    tensors = with_alphas(tensors) if change.pop("alphas", False) else tensors
    config = {f"transformer.{name}": value for name, value in ({"r": 4, "lora_alpha": 8} | change).items()}
    file = tmp_path / "style.safetensors"
    weights.write_safetensors(file, tensors, {"format": "pt", lora.PEFT_CONFIG: json.dumps(config)})
    with pytest.raises(ValueError, match=message):
        lora.load(file, TABLE, params())
