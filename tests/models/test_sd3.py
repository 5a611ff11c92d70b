import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import sd3
from mixgrpo_jax.models.sd3.model import SD3Config
from mixgrpo_jax.runtime import hlo


def sizes(**overrides):
    given = dict(
        sample_size=12,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        attention_head_dim=20,
        num_attention_heads=3,
        joint_attention_dim=28,
        caption_projection_dim=60,
        pooled_projection_dim=14,
        pos_embed_max_size=9,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return SD3Config(**(given | overrides))


SMALL = sizes(num_layers=3, attention_head_dim=16, num_attention_heads=2, caption_projection_dim=32)
CONFIGS = {
    "dual": sizes(),
    "plain": sizes(dual_attention_layers=(), qk_norm=None),
    "normed": sizes(dual_attention_layers=(), num_layers=1),
    "dual without norm": sizes(qk_norm=None, num_layers=3),
}
PARITY = [("dual", (5, 8), 7), ("plain", (9, 3), 3), ("normed", (4, 4), 2), ("dual without norm", (1, 7), 5)]

apply = jax.jit(sd3.apply, static_argnums=(0, 6), static_argnames=("dtype", "remat", "attention"))


@functools.cache
def random_params(config):
    """Every parameter random: fresh ones have zero modulations, and a velocity of zero would be equal to anything."""
    rng = np.random.default_rng(0)

    def normal(leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else leaf.shape[-1]
        return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)

    return jax.tree.map(normal, jax.eval_shape(functools.partial(sd3.init, config), jax.random.key(0)))


def random_inputs(config, grid, text_tokens, batch=2):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return (
        normal(batch, grid[0] * grid[1], config.channels),
        np.linspace(0.9375, 0.125, batch, dtype=np.float32),
        normal(batch, text_tokens, config.joint_attention_dim),
        normal(batch, config.pooled_projection_dim),
        grid,
    )


def run_torch(model, inputs, dtype=None):
    import torch

    from mixgrpo_jax.models.nn.patches import pack, unpack

    x, timestep, text, pooled, (rows, cols) = inputs
    latents = np.array(unpack(x, 2 * rows, 2 * cols)).transpose(0, 3, 1, 2)
    given = [torch.tensor(value).to(dtype or torch.float32) for value in (latents, text, pooled)]
    with torch.no_grad():
        v = model(*given, torch.tensor(1000 * timestep)).sample.to(torch.float32).numpy()
    return np.asarray(pack(v.transpose(0, 2, 3, 1)))


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def transformer_class():
    return pytest.importorskip("diffusers").SD3Transformer2DModel


@pytest.mark.parametrize("name, grid, text_tokens", PARITY)
def test_diffusers_weights_give_the_same_velocity_both_ways(transformer_class, tmp_path, name, grid, text_tokens):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config, inputs = CONFIGS[name], random_inputs(CONFIGS[name], grid, text_tokens)
    reference = transformer_class(**vars(config)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    reference.save_pretrained(tmp_path / "theirs")
    loaded, params = sd3.TRANSFORMER.load_folder(tmp_path / "theirs")
    assert loaded == config
    expected = run_torch(reference, inputs)
    assert np.abs(expected).mean() > 0.01
    assert relative_error(apply(config, params, *inputs), expected) < 1e-5
    sd3.TRANSFORMER.save_folder(tmp_path / "ours", config, params)
    np.testing.assert_array_equal(run_torch(transformer_class.from_pretrained(tmp_path / "ours"), inputs), expected)


def test_bf16_error_is_that_of_torch(transformer_class, tmp_path):
    torch = pytest.importorskip("torch")
    config, inputs = CONFIGS["dual"], random_inputs(CONFIGS["dual"], (5, 8), 7)
    sd3.TRANSFORMER.save_folder(tmp_path, config, random_params(config))
    exact = run_torch(transformer_class.from_pretrained(tmp_path), inputs)
    low = run_torch(transformer_class.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), inputs, torch.bfloat16)
    ours = apply(config, random_params(config), *inputs, dtype=jnp.bfloat16)
    assert 1e-4 < relative_error(ours, exact) < 2 * relative_error(low, exact)


def test_fresh_positions_are_those_of_diffusers(transformer_class):
    reference = transformer_class(**vars(CONFIGS["normed"]))
    fresh = sd3.init(CONFIGS["normed"], jax.random.key(0))
    np.testing.assert_allclose(fresh["position_table"], reference.pos_embed.pos_embed, atol=1e-6)


def test_gradients_reach_all_but_the_positions():
    inputs = random_inputs(SMALL, (2, 3), 4)

    @functools.partial(jax.jit, static_argnames="remat")
    @jax.grad
    def gradients(params, remat):
        return jnp.mean((sd3.apply(SMALL, params, *inputs, remat=remat) - inputs[0]) ** 2)

    stored, recomputed = (gradients(random_params(SMALL), remat=remat) for remat in ("none", "block"))
    assert not np.asarray(stored.pop("position_table")).any()
    unread = [stored["last_blocks"]["text"]["attention"].pop(name) for name in ("q", "q_norm")]  # nobody asks for them
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(unread))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(stored))
    del recomputed["position_table"], recomputed["last_blocks"]["text"]["attention"]["q"]
    del recomputed["last_blocks"]["text"]["attention"]["q_norm"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), stored, recomputed)


@pytest.mark.parametrize(
    "config, total",
    [(sd3.sd3_medium(), 2_084_951_104), (sd3.sd35_medium(), 2_469_663_936), (sd3.sd35_large(), 8_146_280_768)],
)
def test_released_models_have_their_sizes(config, total):
    shapes = jax.eval_shape(functools.partial(sd3.init, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"qk_norm": None}, r"unexpected tensors: transformer_blocks\.0\.attn\.norm_added_k"),
        ({"dual_attention_layers": [1]}, r"dual_attention_layers=\(1,\) must be the first ones"),
        ({"dual_attention_layers": [0]}, r"unexpected tensors: transformer_blocks\.1\.attn2"),
        ({"num_layers": 4}, r"missing tensors: transformer_blocks\.2\.attn\.to_add_out"),
        ({"out_channels": 6}, "out_channels=6"),
        ({"pos_embed_max_size": 8}, r"pos_embed.pos_embed has shape \(1, 81, 32\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(tmp_path, change, message):
    sd3.TRANSFORMER.save_folder(tmp_path, SMALL, random_params(SMALL))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        sd3.TRANSFORMER.load_folder(tmp_path)


def test_a_picture_larger_than_the_positions_is_refused():
    with pytest.raises(ValueError, match=r"10 x 2 tokens.*pos_embed_max_size=9"):
        sd3.apply(SMALL, random_params(SMALL), *random_inputs(SMALL, (10, 2), 4))


def test_flops_are_those_the_compiler_counts():
    config = sd3.sd3_small()
    inputs = random_inputs(config, (12, 16), 32, batch=1)
    compiled = jax.jit(lambda params: sd3.apply(config, params, *inputs)).lower(random_params(config)).compile()
    counted = hlo.cost(compiled.as_text()).flops
    assert sd3.flops(config, image_tokens=12 * 16, text_tokens=32) == pytest.approx(counted, rel=0.05)
