import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import vae
from mixgrpo_jax.models.codec import PixelCodec, VAECodec
from mixgrpo_jax.models.nn.patches import image_ids, pack, unpack

SIZE = (16, 24)


def make(name):
    """A codec, parameters, and tokens whose pictures leave the scale on both sides."""
    if name == "pixels":
        codec, params = PixelCodec(SIZE), None
    else:
        config = vae.vae_tiny(block_out_channels=(4, 8), latent_channels=3, norm_num_groups=2)
        codec = VAECodec(config, SIZE, jnp.dtype(jnp.bfloat16 if "bf16" in name else jnp.float32))
        params = jax.jit(vae.init, static_argnums=0)(config, jax.random.key(0))
        params["decoder"]["conv_out"]["kernel"] *= 3
    return codec, params, jax.random.normal(jax.random.key(1), (2, int(np.prod(codec.grid)), codec.channels))


def test_the_codec_loses_nothing():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 48, 3), dtype=np.uint8)
    codec = PixelCodec((16, 48))
    tokens = codec.encode(None, jnp.asarray(images))
    assert tokens.shape == (2, np.prod(codec.grid), codec.channels) == (2, 24, 96)
    np.testing.assert_array_equal(codec.decode(None, tokens), images)
    np.testing.assert_array_equal(codec.decode(None, jnp.full((1, 24, 96), 9.0)), np.full((1, 16, 48, 3), 255))
    with pytest.raises(ValueError, match=r"model.image_size: 12 rows are not a multiple of 8"):
        PixelCodec((12, 48))


@pytest.mark.parametrize("name", ["pixels", "vae", "vae in bf16"])
def test_decoded_pictures_are_pixels_rounded_and_clipped(name):
    codec, params, tokens = make(name)
    pixels = np.asarray(codec.pixels(params, tokens))
    assert pixels.shape == (2, *SIZE, 3) and pixels.dtype == np.float32
    assert pixels.min() < 0 and pixels.max() > 255 and (pixels != pixels.round()).any()
    pictures = codec.decode(params, tokens)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures, pixels.round().clip(0, 255))


def test_pixels_are_those_of_the_autoencoder_on_the_scale_of_bytes():
    codec, params, tokens = make("vae")
    images = vae.decode(codec.config, params, unpack(tokens, 8, 12))
    np.testing.assert_allclose(codec.pixels(params, tokens), 127.5 * (images + 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["pixels", "vae"])
def test_pixels_have_the_gradient_of_finite_differences(name):
    codec, params, tokens = make(name)
    weight = jax.random.normal(jax.random.key(2), (2, *SIZE, 3))

    @jax.jit
    def scalar(tokens):
        return jnp.mean(weight * jnp.square(codec.pixels(params, tokens) / 255))

    gradient = jax.jit(jax.grad(scalar))(tokens)
    assert (np.abs(gradient).max(axis=(1, 2)) > 0).all()
    for seed in range(3):
        direction = jax.random.normal(jax.random.key(seed), tokens.shape)
        step = 3e-3
        slope = (scalar(tokens + step * direction) - scalar(tokens - step * direction)) / (2 * step)
        assert float(jnp.vdot(gradient, direction)) == pytest.approx(float(slope), rel=5e-3)


def test_tokens_are_those_of_the_flux2_pipeline(tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    pipeline = diffusers.Flux2KleinPipeline
    kinds = dict(down_block_types=2 * ["DownEncoderBlock2D"], up_block_types=2 * ["UpDecoderBlock2D"])
    sizes = dict(block_out_channels=(4, 8), latent_channels=3, norm_num_groups=2, layers_per_block=1)
    reference = diffusers.AutoencoderKLFlux2(**kinds, **sizes, batch_norm_eps=0.1)
    reference.bn.running_mean.uniform_(-1, 1)
    reference.bn.running_var.uniform_(0.1, 3)
    reference.eval().requires_grad_(False).save_pretrained(tmp_path)
    config, params = vae.load_folder(tmp_path)
    codec = VAECodec(config, SIZE, jnp.dtype(jnp.float32))
    assert codec.grid == (4, 6) and codec.channels == 12

    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    itself = types.SimpleNamespace(vae=reference, _patchify_latents=pipeline._patchify_latents)
    signed = torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
    latents = pipeline._encode_vae_image(itself, signed, None)
    expected = pipeline._pack_latents(latents).numpy()
    tokens = jax.jit(codec.encode)(params, images)
    assert np.linalg.norm(tokens - expected) < 1e-5 * np.linalg.norm(expected)

    noise = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    ids = pipeline._prepare_latent_ids(latents)
    x = pipeline._unpack_latents_with_ids(torch.tensor(noise), ids, *codec.grid)
    mean, variance = (
        statistic.view(1, -1, 1, 1) for statistic in (reference.bn.running_mean, reference.bn.running_var)
    )
    x = pipeline._unpatchify_latents(x * torch.sqrt(variance + 0.1) + mean)
    expected = (reference.decode(x).sample.numpy().transpose(0, 2, 3, 1) + 1) * 127.5
    assert np.linalg.norm(jax.jit(codec.pixels)(params, noise) - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 2, 10, 16)])
def test_pack_orders_tokens_as_diffusers_and_unpack_inverts_it(shape):
    torch = pytest.importorskip("torch")
    pipeline = pytest.importorskip("diffusers").FluxPipeline
    b, h, w, c = shape
    latents = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    expected = pipeline._pack_latents(torch.tensor(latents.transpose(0, 3, 1, 2)), b, c, h, w).numpy()
    np.testing.assert_array_equal(pack(latents), expected)
    np.testing.assert_array_equal(unpack(pack(latents), h, w), latents)
    ids = pipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
    np.testing.assert_array_equal(image_ids(h // 2, w // 2), ids.numpy())


def test_sides_that_do_not_fold_are_named():
    with pytest.raises(ValueError, match="3 x 4"):
        pack(jnp.zeros((1, 3, 4, 2)))
    with pytest.raises(ValueError, match="6 tokens do not make latents of 4 x 4"):
        unpack(jnp.zeros((1, 6, 8)), 4, 4)
