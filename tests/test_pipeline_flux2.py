"""The whole pipeline against diffusers, on a small random FLUX.2 [klein]: the same noise, the same pictures."""

import copy
import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mixgrpo_jax import config as configs
from mixgrpo_jax.convert import convert
from mixgrpo_jax.data import features as store
from mixgrpo_jax.encode import encode
from mixgrpo_jax.flow.schedules import empirical_shift
from mixgrpo_jax.models import families
from mixgrpo_jax.models.flux2.policy import FAMILY
from mixgrpo_jax.sample import sample
from mixgrpo_jax.train import train
from tests.models.test_qwen3 import chat_tokenizer
from tests.test_pipeline import PROMPTS, SIZE, STEPS, encode_signs, tokenizer

LENGTH, WIDTH = 40, 16
GUIDANCE = 4.0
GRID = SIZE[0] // 16, SIZE[1] // 16


def make_pipeline(distilled=False):
    """A random pipeline of diffusers' own classes, in fp32."""
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=28, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8,
        )
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return diffusers.Flux2KleinPipeline(scheduler, vae, encoder, chat_tokenizer(), transformer, is_distilled=distilled)


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux2")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((2, GRID[0] * GRID[1], 16)).astype(np.float32)


def draw(pipeline, noise, guidance=GUIDANCE):
    """Pictures of diffusers for PROMPTS, [2, H, W, 3] uint8, by its own scheduler's sigmas."""
    pipeline.set_progress_bar_config(disable=True)
    latents = np.ascontiguousarray(noise.reshape(2, *GRID, -1).transpose(0, 3, 1, 2))
    images = pipeline(
        prompt=PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
        latents=torch.from_numpy(latents),
    ).images
    return np.stack([np.asarray(image) for image in images])


def settings(folder, guidance=GUIDANCE):
    config = configs.base()
    config.model.folder, config.model.image_size, config.model.text_length = str(folder), SIZE, LENGTH
    config.model.guidance = guidance
    config.evaluation.num_steps, config.evaluation.batch = STEPS, 2
    config.evaluation.shift = empirical_shift(GRID[0] * GRID[1], STEPS)
    config.rewards, config.watched = dict(ocr=1.0), ()
    return config


def test_features_are_those_of_the_pipeline(pipeline, folder):
    parts, params = families.load(folder)
    text = parts.family.text(parts, LENGTH, jnp.float32)
    ours = jax.jit(text.features)(params, text.tokenize(PROMPTS))
    with torch.no_grad():
        given = (pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)[0] for prompts in (PROMPTS, ["", ""]))
        theirs = dict(zip(("text", "negative_text"), given))
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected.numpy()) / np.linalg.norm(expected)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0], ids=["base", "distilled"])
def test_sample_draws_what_diffusers_draws(pipeline, folder, noise, tmp_path, guidance):
    ours = sample(settings(folder, guidance), tmp_path, PROMPTS, noise, base=True)
    assert ours.std() > 5
    theirs = make_pipeline(distilled=True) if guidance == 1 else pipeline  # which ignores the scale
    assert np.abs(ours.astype(int) - draw(theirs, noise)).max() <= 1
