import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import flux2
from mixgrpo_jax.models.flux2.model import Flux2Config
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.patches import image_ids
from mixgrpo_jax.runtime import hlo


def sizes(**overrides):
    given = dict(
        in_channels=12,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=20,
        num_attention_heads=3,
        joint_attention_dim=28,
        mlp_ratio=3.0,
        axes_dims_rope=(2, 6, 8, 4),
        guidance_embeds=False,
    )
    return Flux2Config(**(given | overrides))


SMALL = sizes(num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4,) * 4)
CONFIGS = {
    "klein": sizes(),
    "guided": sizes(guidance_embeds=True, in_channels=7, mlp_ratio=2.5, rope_theta=500, timestep_guidance_channels=34),
    "single blocks only": sizes(num_layers=0, num_attention_heads=1),
}
PARITY = [("klein", (5, 8), 7), ("klein", (3, 11), 130), ("guided", (9, 2), 3), ("single blocks only", (1, 7), 1)]

# Most of the time here goes into compiling, which is faster without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
apply = jit(flux2.apply, static_argnums=0, static_argnames=("dtype", "remat", "attention"))


@functools.cache
def random_params(config):
    """Every parameter random: fresh ones have zero modulations, and a velocity of zero would be equal to anything."""
    rng = np.random.default_rng(0)

    def normal(path, leaf):
        fan_in = leaf.shape[-2 if path[-1].key == "kernel" else -1]
        return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)

    shapes = jax.eval_shape(functools.partial(flux2.init, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(normal, shapes)


def random_inputs(config, grid, text_tokens, batch=2):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return dict(
        x=normal(batch, grid[0] * grid[1], config.in_channels),
        timestep=np.linspace(0.9375, 0.125, batch, dtype=np.float32),
        text=normal(batch, text_tokens, config.joint_attention_dim),
        guidance=np.full(batch, 3.5, np.float32) if config.guidance_embeds else None,
        image_ids=np.pad(image_ids(*grid), ((0, 0), (0, 1))),
    )


def run_torch(model, inputs, dtype=None):
    import diffusers
    import torch

    given = {name: None if value is None else torch.tensor(value) for name, value in inputs.items()}
    x, text = (given[name].to(dtype or torch.float32) for name in ("x", "text"))
    text_ids = diffusers.Flux2KleinPipeline._prepare_text_ids(text)
    rest = dict(timestep=given["timestep"], guidance=given["guidance"], img_ids=given["image_ids"], txt_ids=text_ids)
    with torch.no_grad():
        v = model(hidden_states=x, encoder_hidden_states=text, **rest).sample
    return v.to(torch.float32).numpy()


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def transformer_class():
    return pytest.importorskip("diffusers").Flux2Transformer2DModel


@pytest.mark.parametrize("name, grid, text_tokens", PARITY)
def test_diffusers_weights_give_the_same_velocity_both_ways(transformer_class, tmp_path, name, grid, text_tokens):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config, inputs = CONFIGS[name], random_inputs(CONFIGS[name], grid, text_tokens)
    reference = transformer_class(**vars(config)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    reference.save_pretrained(tmp_path / "theirs")
    loaded, params = flux2.TRANSFORMER.load_folder(tmp_path / "theirs")
    assert loaded == config
    expected = run_torch(reference, inputs)
    assert np.abs(expected).mean() > 0.01
    assert relative_error(apply(config, params, **inputs), expected) < 1e-5
    flux2.TRANSFORMER.save_folder(tmp_path / "ours", config, params)
    np.testing.assert_array_equal(run_torch(transformer_class.from_pretrained(tmp_path / "ours"), inputs), expected)


@pytest.mark.parametrize("name, grid, text_tokens", [PARITY[0], PARITY[2]])
def test_bf16_error_is_that_of_torch(transformer_class, tmp_path, name, grid, text_tokens):
    torch = pytest.importorskip("torch")
    config, inputs = CONFIGS[name], random_inputs(CONFIGS[name], grid, text_tokens)
    # PyTorch rounds 1000 sigma and 1000 guidance to bf16: exact here.
    inputs["timestep"] = np.array([0.5, 0.125], np.float32)
    inputs["guidance"] = np.full(2, 4, np.float32) if config.guidance_embeds else None
    flux2.TRANSFORMER.save_folder(tmp_path, config, random_params(config))
    exact = run_torch(transformer_class.from_pretrained(tmp_path), inputs)
    low = run_torch(transformer_class.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), inputs, torch.bfloat16)
    ours = apply(config, random_params(config), **inputs, dtype=jnp.bfloat16)
    assert 1e-4 < relative_error(ours, exact) < 2 * relative_error(low, exact)


def test_gradients_reach_everything_and_are_the_same_recomputed():
    inputs = random_inputs(SMALL, (2, 3), 4)

    @functools.partial(jit, static_argnames="remat")
    @jax.grad
    def gradients(params, remat):
        return jnp.mean((flux2.apply(SMALL, params, **inputs, remat=remat) - inputs["x"]) ** 2)

    stored, recomputed = (gradients(random_params(SMALL), remat=remat) for remat in ("none", "block"))
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(stored))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), stored, recomputed)


def test_features_before_tokens_is_the_same_velocity(monkeypatch):
    inputs, params = random_inputs(SMALL, (2, 3), 4), random_params(SMALL)
    expected = apply(SMALL, params, **inputs)
    monkeypatch.setattr(layers, "form", lambda length, *_: (length + 6, True))  # of a TPU's kernel
    again = jit(functools.partial(flux2.apply, SMALL))
    np.testing.assert_allclose(again(params, **inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config, total",
    [
        (flux2.flux2_klein_4b(), 3_875_544_576),
        (flux2.flux2_klein_9b(), 9_078_581_248),
        (flux2.flux2_dev(), 32_223_281_152),
    ],
)
def test_released_models_have_their_sizes(config, total):
    shapes = jax.eval_shape(functools.partial(flux2.init, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"guidance_embeds": True}, "missing tensors: time_guidance_embed.guidance_embedder"),
        ({"num_layers": 2}, r"missing tensors: transformer_blocks\.1\.attn"),
        ({"num_single_layers": 1}, r"unexpected tensors: single_transformer_blocks\.1\.attn"),
        ({"mlp_ratio": 4.0}, r"linear_in.weight has shape \(192, 32\).*expects \(256, 32\)"),
        ({"out_channels": 6}, "out_channels=6"),
        ({"eps": 1e-5}, "eps=1e-05"),
        ({"axes_dims_rope": [8, 4, 4]}, r"axes_dims_rope=\(8, 4, 4\) must be 4 even numbers"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(tmp_path, change, message):
    flux2.TRANSFORMER.save_folder(tmp_path, SMALL, random_params(SMALL))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        flux2.TRANSFORMER.load_folder(tmp_path)


def test_of_fused_layers_the_queries_and_keys_alone_are_reordered(tmp_path):
    config, params = SMALL, random_params(SMALL)
    flux2.TRANSFORMER.save_folder(tmp_path, config, params)
    theirs = weights.read_safetensors(tmp_path)["single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"][()].T
    ours, turned = params["single_blocks"]["attention"]["qkv_mlp"]["kernel"][1], 2 * config.width
    np.testing.assert_array_equal(ours[:, :turned], weights.halves(theirs[:, :turned], config.attention_head_dim))
    np.testing.assert_array_equal(ours[:, turned:], theirs[:, turned:])
    on_device = weights.reorder(jnp.asarray(ours), weights.neighbours, config.attention_head_dim, turned)
    np.testing.assert_array_equal(on_device, theirs)
    part = flux2.TRANSFORMER.open_source(tmp_path).params["single_blocks"]["attention"]["qkv_mlp"]["kernel"]
    np.testing.assert_array_equal(part[1:, :, turned - 5 : turned + 3], ours[None, :, turned - 5 : turned + 3])


@pytest.mark.parametrize("guidance", [None, 3.5])
def test_a_guidance_scale_is_for_models_that_embed_it(guidance):
    config = sizes(guidance_embeds=guidance is None)
    inputs = random_inputs(config, (2, 3), 4) | {"guidance": guidance}
    with pytest.raises(ValueError, match=f"guidance={guidance} with guidance_embeds={config.guidance_embeds}"):
        flux2.apply(config, random_params(config), **inputs)


def test_flops_are_those_the_compiler_counts():
    config = flux2.flux2_small(guidance_embeds=True)
    inputs = random_inputs(config, (12, 16), 32, batch=1)
    compiled = jax.jit(lambda params: flux2.apply(config, params, **inputs)).lower(random_params(config)).compile()
    counted = hlo.cost(compiled.as_text()).flops
    assert flux2.flops(config, image_tokens=12 * 16, text_tokens=32) == pytest.approx(counted, rel=0.05)
