"""The whole pipeline against diffusers, on a small random FLUX: the same noise gives the same pictures."""

import diffusers
import numpy as np
import pytest
import torch
import transformers

from mixgrpo_jax import config as configs
from mixgrpo_jax.data import signs
from mixgrpo_jax.sample import sample

SIZE, STEPS, LENGTH = (48, 80), 4, 12
PROMPTS = ["a blue sign that says 4270 in white", "a pink sign that says 8 in black"]


def tokenizer(max_length):
    """A tokenizer of the signs' words with room for CLIP's or T5's length."""
    made = signs.build_tokenizer()
    made.model_max_length = max_length
    return made


def make_pipeline():
    """A random FLUX pipeline of diffusers' own classes, in fp32."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=20, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, eos_token_id=1, pad_token_id=0, bos_token_id=2,
        )
    )  # fmt: skip
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=64, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
        )
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return diffusers.FluxPipeline(scheduler, vae, clip, tokenizer(16), t5, tokenizer(LENGTH), transformer)


@pytest.fixture(scope="module")
def pipeline():
    made = make_pipeline()
    made.text_encoder_2.eval()  # or it drops activations
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    pipeline.save_pretrained(path)
    return path


def settings(folder):
    config = configs.base()
    config.model.folder, config.model.image_size, config.model.text_length = str(folder), SIZE, LENGTH
    config.evaluation.num_steps, config.evaluation.shift, config.evaluation.batch = STEPS, 0.0, 2
    config.rewards, config.watched = dict(ocr=1.0), ()
    return config


def test_sample_draws_what_diffusers_draws(pipeline, folder, tmp_path):
    tokens = (SIZE[0] // 16) * (SIZE[1] // 16)
    noise = np.random.default_rng(0).standard_normal((2, tokens, 16)).astype(np.float32)
    theirs = pipeline(
        PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        max_sequence_length=LENGTH,
        latents=torch.from_numpy(noise),
        output_type="pil",
    ).images
    ours = sample(settings(folder), tmp_path, PROMPTS, noise)
    theirs = np.stack([np.asarray(image) for image in theirs])
    assert ours.std() > 5
    assert np.abs(ours.astype(int) - theirs).max() <= 1
