import types

import jax
import ml_dtypes
import numpy as np
import pytest

from mixgrpo_jax.models import families, flux
from mixgrpo_jax.models.flux import release
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.io import weights

WIDTH, HEAD = 64, 32


def released(double=2, single=3, guidance=True, dtype=np.float32, prefix=""):
    """A file of FLUX.1's original names, at width 64."""
    rng = np.random.default_rng(0)
    tensors = {}

    def linear(name, d_in, d_out):
        tensors[f"{name}.weight"] = rng.normal(size=(d_out, d_in)).astype(dtype)
        tensors[f"{name}.bias"] = rng.normal(size=d_out).astype(dtype)

    def norms(name):
        for kind in ("query", "key"):
            tensors[f"{name}.{kind}_norm.scale"] = rng.normal(size=HEAD).astype(dtype)

    linear("img_in", 12, WIDTH)
    linear("txt_in", 20, WIDTH)
    sizes = {"time_in": 256, "vector_in": 10} | ({"guidance_in": 256} if guidance else {})
    for name, size in sizes.items():
        linear(f"{name}.in_layer", size, WIDTH)
        linear(f"{name}.out_layer", WIDTH, WIDTH)
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", WIDTH, 6 * WIDTH)
            linear(f"{block}_attn.qkv", WIDTH, 3 * WIDTH)
            norms(f"{block}_attn.norm")
            linear(f"{block}_attn.proj", WIDTH, WIDTH)
            linear(f"{block}_mlp.0", WIDTH, 4 * WIDTH)
            linear(f"{block}_mlp.2", 4 * WIDTH, WIDTH)
    for i in range(single):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", WIDTH, 3 * WIDTH)
        linear(f"{block}.linear1", WIDTH, 7 * WIDTH)
        norms(f"{block}.norm")
        linear(f"{block}.linear2", 5 * WIDTH, WIDTH)
    linear("final_layer.linear", WIDTH, 12)
    linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def diffusers_conversion(tensors):
    """What diffusers makes of an original file; its own function is written for the released width alone."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.loaders.single_file_utils")
    function = module.convert_flux_transformer_checkpoint_to_diffusers
    constants = tuple(WIDTH if value == 3072 else value for value in function.__code__.co_consts)
    assert WIDTH in constants
    narrow = types.FunctionType(function.__code__.replace(co_consts=constants), module.__dict__)
    converted = narrow({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    return {name: tensor.numpy() for name, tensor in converted.items()}


@pytest.mark.parametrize("guidance", [True, False])
def test_tensors_are_those_that_diffusers_makes(tmp_path, guidance):
    tensors = released(guidance=guidance)
    weights.write_safetensors(tmp_path / "flux.safetensors", tensors)
    config, params = flux.TRANSFORMER.load_folder(tmp_path / "flux.safetensors")
    ours, theirs = weights.export(flux.TRANSFORMER.table(config), params), diffusers_conversion(tensors)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, strict=True)
    assert config == flux.FluxConfig(
        in_channels=12,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD,
        joint_attention_dim=20,
        pooled_projection_dim=10,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 14, 14),
    )


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_prefix_sets_the_transformer_apart_from_the_rest_of_the_file(tmp_path, prefix):
    plain, bundle = tmp_path / "plain.safetensors", tmp_path / "bundle.safetensors"
    weights.write_safetensors(plain, released(dtype=ml_dtypes.bfloat16))
    other = {"vae.decoder.conv_in.weight": np.zeros((2, 2)), "text_encoders.t5xxl.shared.weight": np.zeros((2, 2))}
    weights.write_safetensors(bundle, other | released(dtype=ml_dtypes.bfloat16, prefix=prefix))
    (config, params), (other_config, others) = flux.TRANSFORMER.load_folder(plain), flux.TRANSFORMER.load_folder(bundle)
    assert config == other_config
    assert families.of(plain) is families.of(bundle) is FAMILY
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, others)


def test_the_published_sizes_are_found():
    config = flux.flux1_dev()
    table, skeleton = release.table(config), flux.TRANSFORMER.skeleton(config)
    fused = {rule.ours: rule for rule in table}
    paths = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(skeleton)}
    structs = {}
    for path, leaf in paths.items():
        rule = fused[path]
        shape = rule.their_shape(leaf.shape[1:] if rule.stacked else leaf.shape)
        structs |= {name: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for name in rule.names(leaf.shape)}
    assert structs["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    assert structs["double_blocks.18.img_attn.qkv.weight"].shape == (9216, 3072)
    assert structs["final_layer.adaLN_modulation.1.weight"].shape == (6144, 3072)
    assert len(structs) == 780 and sum(np.prod(s.shape) for s in structs.values()) == 11_901_408_320
    assert release.config_of(structs) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_in.weight": np.zeros((WIDTH, 24))}, "img_in takes 24 channels and final_layer gives 12"),
        ({"double_blocks.1.txt_attn.qkv.bias": None}, r"missing tensors: double_blocks\.1\.txt_attn\.qkv\.bias;"),
        ({"distilled_guidance_layer.in_proj.weight": np.zeros(3)}, r"unexpected tensors: distilled_guidance_layer"),
        ({"single_blocks.2.linear1.weight": np.zeros((5 * WIDTH, WIDTH))}, r"linear1\.weight has shape.*expects \(448"),
        ({"img_in.weight": np.zeros((WIDTH, 12), np.int8)}, r"img_in\.weight of .* is int8: quantised"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, message):
    tensors = {name: tensor for name, tensor in (released() | change).items() if tensor is not None}
    weights.write_safetensors(tmp_path / "flux.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        flux.TRANSFORMER.load_folder(tmp_path / "flux.safetensors")


@pytest.mark.parametrize("name", ["x_embedder.weight", "transformer.x_embedder.lora_A.weight"])
def test_a_file_of_other_names_is_refused(tmp_path, name):
    weights.write_safetensors(tmp_path / "other.safetensors", {name: np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"has no tensor img_in\.weight, it is no original release of FLUX\.1"):
        flux.TRANSFORMER.load_folder(tmp_path / "other.safetensors")
    assert not release.recognises(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is no original release of a known model.*the folder"):
        families.of(tmp_path / "other.safetensors")
