import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixgrpo_jax.models import vae
from mixgrpo_jax.models.flux.policy import flux1_vae
from mixgrpo_jax.models.vae import VAEConfig

SMALL = VAEConfig(block_out_channels=(4, 8), latent_channels=3, norm_num_groups=2)
CONFIGS = {
    "quant convs": SMALL,
    "flux": vae.vae_tiny(block_out_channels=(4, 8), layers_per_block=2, latent_channels=5, norm_num_groups=2),
    "flux2": dataclasses.replace(
        vae.flux2_vae(),
        block_out_channels=(4, 8),
        decoder_block_out_channels=(6, 10),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=2,
        batch_norm_eps=0.1,
    ),
    "no attention": VAEConfig(
        in_channels=1,
        out_channels=2,
        block_out_channels=(6, 3, 3),
        norm_num_groups=3,
        use_quant_conv=False,
        mid_block_add_attention=False,
    ),
}
FLUX2_FIELDS = {"patch_size", "batch_norm_eps", "decoder_block_out_channels"}
PARITY = [("quant convs", (5, 3)), ("flux", (3, 4)), ("flux2", (4, 6)), ("no attention", (1, 7))]


# Most of the time here goes into compiling, which is twice as fast without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
encode = jit(vae.encode, static_argnums=0, static_argnames="dtype")
decode = jit(vae.decode, static_argnums=0, static_argnames="dtype")
tiled_decode = jit(vae.tiled_decode, static_argnums=0, static_argnames=("tile", "overlap"))


@jit
@functools.partial(jax.grad, argnums=(0, 1))
def gradients(params, latents):
    return jnp.mean((vae.decode(SMALL, params, latents) - 1) ** 2)


@functools.cache
def random_params(config):
    """Every parameter random: fresh biases are zero and fresh norms are one, and would hide an error."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(size=leaf.shape, scale=np.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)
        return rng.uniform(0.5, 1, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(functools.partial(vae.init, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_images(config, grid, batch=2):
    sides = [config.downsampling * side for side in grid]
    return np.random.default_rng(1).uniform(-1, 1, (batch, *sides, config.in_channels)).astype(np.float32)


def random_latents(config, grid, batch=2):
    return np.random.default_rng(2).normal(size=(batch, *grid, config.latent_channels)).astype(np.float32)


def to_torch(array, dtype=None):
    import torch

    return torch.tensor(np.asarray(array).transpose(0, 3, 1, 2)).to(dtype or torch.float32)


def to_numpy(tensor):
    return tensor.detach().float().numpy().transpose(0, 2, 3, 1)


def run_torch(model, config, images, latents, dtype=None):
    """Mean and log-variance of images, and images of latents, as the reference's pipelines scale them."""
    moments = model.encode(to_torch(images, dtype)).latent_dist
    z = to_torch(latents) / config.scaling_factor + (config.shift_factor or 0)
    decoded = model.decode(z.to(dtype or z.dtype)).sample
    return [to_numpy(tensor) for tensor in (moments.mean, moments.logvar, decoded)]


def run(config, params, images, latents, dtype=jnp.float32):
    return [*encode(config, params, images, dtype=dtype), decode(config, params, latents, dtype=dtype)]


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


def autoencoder_class(config):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL if config.batch_norm_eps is None else diffusers.AutoencoderKLFlux2


def random_reference(config):
    torch, reference_class = pytest.importorskip("torch"), autoencoder_class(config)
    torch.manual_seed(0)
    stages = len(config.block_out_channels)
    kinds = dict(down_block_types=stages * ["DownEncoderBlock2D"], up_block_types=stages * ["UpDecoderBlock2D"])
    foreign = vae.weights.FOREIGN[reference_class.__name__]
    sizes = {name: size for name, size in vars(config).items() if name not in foreign}
    reference = reference_class(**sizes, **kinds).eval()
    statistics = [tensor for tensor in reference.buffers() if tensor.ndim]
    for parameter in [*reference.parameters(), *statistics]:
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1)
    return reference


@pytest.mark.parametrize("name, grid", PARITY)
def test_diffusers_weights_give_the_same_moments_and_images(tmp_path, name, grid):
    config = CONFIGS[name]
    reference = random_reference(config)
    reference.save_pretrained(tmp_path)
    loaded, params = vae.load_folder(tmp_path)
    assert loaded == config
    inputs = random_images(config, grid), random_latents(config, grid)
    for actual, expected in zip(run(config, params, *inputs), run_torch(reference, config, *inputs)):
        assert actual.shape == expected.shape
        assert np.std(expected) > 0.01
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("name, grid", PARITY)
def test_diffusers_opens_what_we_save(tmp_path, name, grid):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    vae.save_folder(tmp_path, config, params)
    inputs = random_images(config, grid), random_latents(config, grid)
    reference, report = autoencoder_class(config).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for actual, expected in zip(run(config, params, *inputs), run_torch(reference, config, *inputs)):
        assert relative_error(actual, expected) < 1e-5


def test_bf16_error_is_that_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    vae.save_folder(tmp_path, SMALL, random_params(SMALL))
    inputs = random_images(SMALL, (5, 3)), random_latents(SMALL, (5, 3))
    exact = run_torch(autoencoder_class(SMALL).from_pretrained(tmp_path), SMALL, *inputs)
    low = autoencoder_class(SMALL).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    theirs = run_torch(low, SMALL, *inputs, torch.bfloat16)
    ours = run(SMALL, random_params(SMALL), *inputs, jnp.bfloat16)
    for actual, reference, expected in zip(ours, theirs, exact):
        assert actual.dtype == jnp.float32
        assert 1e-4 < relative_error(actual, expected) < 2 * relative_error(reference, expected)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["quant convs", "flux2"])
def test_saved_parameters_come_back_bit_identical(tmp_path, name, dtype):
    config = CONFIGS[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    vae.save_folder(tmp_path, config, params)
    loaded, restored = vae.load_folder(tmp_path)
    assert loaded == config
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(restored))


def test_load_folder_casts_to_the_dtype_asked_for(tmp_path):
    vae.save_folder(tmp_path, SMALL, random_params(SMALL))
    _, params = vae.load_folder(tmp_path, dtype=jnp.bfloat16)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(SMALL))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, expected)


def test_older_names_of_the_attention_are_read(tmp_path):
    vae.save_folder(tmp_path, SMALL, random_params(SMALL))
    tensors = load_file(tmp_path / vae.weights.FILE_NAME)
    for old, new in vae.weights.RENAMED.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, tmp_path / vae.weights.FILE_NAME)
    jax.tree.map(np.testing.assert_array_equal, vae.load_folder(tmp_path)[1], random_params(SMALL))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "AutoencoderDC"}, r"config\.json has _class_name='AutoencoderDC'.*KL or AutoencoderKLFlux2"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "AttnUpDecoderBlock2D"),
        ({"latents_mean": [0.0]}, r"latents_mean=\[0.0\]"),
        ({"norm_num_groups": 3}, r"block_out_channels=\(4, 8\) must be multiples of norm_num_groups=3"),
        ({"layers_per_block": 2}, r"missing tensors: decoder\.up_blocks\.0\.resnets\.2"),
        ({"use_quant_conv": False}, r"unexpected tensors: quant_conv\.bias"),
        ({"mid_block_add_attention": False}, r"unexpected tensors: decoder\.mid_block\.attentions\.0"),
        ({"patch_size": [1, 1]}, r"patch_size=\[1, 1\], and this model needs \[2, 2\]"),
        ({"batch_norm_eps": None}, "_class_name='AutoencoderKLFlux2'"),
        ({"decoder_block_out_channels": [6, 9]}, r"decoder_block_out_channels=\(6, 9\) must be multiples"),
        ({"decoder_block_out_channels": None}, r"decoder.conv_in.bias has shape \(10,\).*expects \(8,\)"),
        ({"in_channels": 4}, r"encoder.conv_in.weight has shape \(4, 3, 3, 3\).*expects \(4, 4, 3, 3\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(tmp_path, change, message):
    config = CONFIGS["flux2"] if change.keys() & FLUX2_FIELDS else SMALL
    vae.save_folder(tmp_path, config, random_params(config))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        vae.load_folder(tmp_path)


@pytest.mark.parametrize("config, size", [(flux1_vae(), 83_819_683), (vae.flux2_vae(), 84_046_371)])
def test_released_autoencoders_have_their_published_sizes(config, size):
    shapes = jax.eval_shape(functools.partial(vae.init, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == size
    assert config.downsampling == vae.vae_tiny().downsampling == 8


def test_absent_fields_have_the_defaults_of_the_class(tmp_path):
    defaults = inspect.signature(autoencoder_class(vae.flux2_vae()).__init__).parameters
    kinds = ("act_fn", "down_block_types", "up_block_types", "patch_size")
    fields = {name: defaults[name].default for name in kinds} | {"_class_name": "AutoencoderKLFlux2"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert vae.read_config(tmp_path) == vae.flux2_vae()
    shared = vars(vae.flux2_vae()).keys() & defaults.keys()
    assert {n: getattr(vae.flux2_vae(), n) or None for n in shared} == {n: defaults[n].default or None for n in shared}


@pytest.mark.parametrize("shift, expected", [(0.1159, (2 - 0.1159) * 0.3611), (None, 2 * 0.3611)])
def test_latents_are_shifted_and_scaled(shift, expected):
    config = dataclasses.replace(flux1_vae(), shift_factor=shift)
    np.testing.assert_allclose(vae.to_latents(config, jnp.full(3, 2.0)), expected, rtol=1e-6)


@pytest.mark.slow  # compiles a random generator for each shape
def test_a_fresh_decoder_keeps_the_scale_of_its_latents():
    config = VAEConfig(block_out_channels=(4,), norm_num_groups=2, scaling_factor=1.0)
    images = decode(config, vae.init(config, jax.random.key(0)), random_latents(config, (16, 16)))
    assert 0.2 < np.std(images) < 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda params: vae.encode(SMALL, params, jnp.zeros((1, 6, 5, 3))), "images are 6 x 5.*multiples of 2"),
        (lambda params: vae.encode(SMALL, params, jnp.zeros((1, 4, 4, 4))), r"\(1, 4, 4, 4\).*in_channels=3"),
        (lambda params: vae.decode(SMALL, params, jnp.zeros((1, 4, 16))), r"\(1, 4, 16\).*latent_channels=3"),
        (lambda params: vae.tiled_decode(SMALL, params, jnp.zeros((1, 8, 8, 3)), tile=8, overlap=0.6), "overlap=0.6"),
        (lambda params: vae.tiled_decode(SMALL, params, jnp.zeros((1, 8, 8, 3)), tile=8, overlap=0.1), "overlap=0.1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_params(SMALL))


def test_a_sample_does_not_see_the_others_in_its_batch():
    latents = random_latents(SMALL, (5, 3))
    other = np.concatenate([latents[:1] / 2, latents[1:]])
    images, changed = (np.asarray(decode(SMALL, random_params(SMALL), batch)) for batch in (latents, other))
    np.testing.assert_array_equal(images[1], changed[1])
    assert np.abs(images[0] - changed[0]).max() > 1e-2


@pytest.mark.parametrize("latents", [random_latents(SMALL, (5, 3)), np.zeros((2, 5, 3, 3), np.float32)])
def test_gradients_through_decode_are_finite_even_without_variance(latents):
    by_params, by_latents = gradients(random_params(SMALL), latents)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_params))
    assert np.isfinite(by_latents).all() and np.abs(by_latents).max() > 0


def test_one_tile_is_decode():
    latents = random_latents(SMALL, (5, 3))
    expected = decode(SMALL, random_params(SMALL), latents)
    assert relative_error(tiled_decode(SMALL, random_params(SMALL), latents, tile=5), expected) < 1e-6


def test_tiles_blend_as_in_diffusers(tmp_path):
    """Down a strip of two tiles; diffusers would add a third, of the last overlap alone, which is left out."""
    vae.save_folder(tmp_path, SMALL, random_params(SMALL))
    reference = autoencoder_class(SMALL).from_pretrained(tmp_path)
    reference.tile_latent_min_size, reference.tile_sample_min_size = 8, 16
    latents = random_latents(SMALL, (14, 5))
    z = to_torch(latents) / SMALL.scaling_factor
    whole, expected = (to_numpy(call(z).sample)[:, :24] for call in (reference.decode, reference.tiled_decode))
    actual = tiled_decode(SMALL, random_params(SMALL), latents, tile=8)[:, :24]
    assert relative_error(actual, expected) < 1e-5
    assert relative_error(whole, expected) > 1e-3


@pytest.mark.parametrize("sides, tile, overlap", [((20, 13), 12, 0.25), ((16, 11), 8, 0.5)])
def test_tiles_leave_no_seam_in_what_does_not_depend_on_them(monkeypatch, sides, tile, overlap):
    """With a decoder that sees one latent at a time, tiling changes nothing."""

    def pointwise(config, params, latents, dtype):
        return latents.repeat(2, axis=1).repeat(2, axis=2)[..., :3]

    monkeypatch.setattr(vae.model, "decode", pointwise)
    latents = random_latents(SMALL, sides)
    tiled = vae.tiled_decode(SMALL, {}, latents, tile=tile, overlap=overlap)
    np.testing.assert_allclose(tiled, pointwise(SMALL, {}, latents, None), rtol=1e-5, atol=1e-6)
