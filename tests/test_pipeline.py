"""The whole pipeline against diffusers, on a small random FLUX: the same noise gives the same pictures."""

import copy
import json

import diffusers
import jax
import numpy as np
import optax
import pytest
import torch
import transformers

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.convert import convert
from mixgrpo_jax.encode import encode
from mixgrpo_jax.engine.loading import host_state
from mixgrpo_jax.flow.plans.window import WindowState
from mixgrpo_jax.models import families, lora
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.rl.update import Average, init_state
from mixgrpo_jax.runtime.checkpoint import Checkpoints, finished
from mixgrpo_jax.sample import sample
from mixgrpo_jax.tasks.signs import data as signs

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
    return made


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    pipeline.save_pretrained(path)
    return path


def draw(pipeline, noise):
    """Pictures of diffusers for PROMPTS, [2, H, W, 3] uint8."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        max_sequence_length=LENGTH,
        latents=torch.from_numpy(noise),
    ).images
    return np.stack([np.asarray(image) for image in images])


def settings(folder):
    config = configs.base()
    config.model.folder, config.model.image_size, config.model.text_length = str(folder), SIZE, LENGTH
    config.evaluation.num_steps, config.evaluation.shift, config.evaluation.batch = STEPS, 0.0, 2
    config.rewards, config.watched = dict(ocr=1.0), ()
    return config


def test_sample_draws_what_diffusers_draws(pipeline, folder, tmp_path):
    tokens = (SIZE[0] // 16) * (SIZE[1] // 16)
    noise = np.random.default_rng(0).standard_normal((2, tokens, 16)).astype(np.float32)
    ours = sample(settings(folder), tmp_path, PROMPTS, noise, base=True)
    assert ours.std() > 5
    assert np.abs(ours.astype(int) - draw(pipeline, noise)).max() <= 1


def encode_signs(folder, target, length=LENGTH):
    """Cached features of a few signs for both splits; what the rewards need to know comes along."""
    for split, count in (("train", 4), ("test", 2)):
        path = target.with_name(f"{split}.jsonl")
        drawn = signs.sample_signs(split, count)
        rows = [
            {"prompt": s.prompt, "plate_rgb": signs.PALETTE[s.plate], "digits_rgb": signs.PALETTE[s.digits]}
            for s in drawn
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        encode(folder, str(path), target, split=split, max_length=length, batch=2)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_trained_on_cached_features_and_exported_to_diffusers(pipeline, folder, tmp_path, rank):
    encode_signs(folder, tmp_path / "features")
    config = settings(folder)
    config.data.name, config.data.folder = "features", str(tmp_path / "features")
    config.rewards = dict(colour=1.0)
    config.model.lora.rank, config.model.lora.alpha, config.model.lora.base = rank, 8.0, "float32"
    config.iterations, config.optimizer.learning_rate, config.averages.ema.decay = 2, 3e-3, 0.5
    config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 2, 4, 2, 4
    config.plan.num_steps, config.plan.length = 5, 2
    config.evaluation.prompts = 2
    train.train(config, tmp_path / "run")

    convert(tmp_path / "run", tmp_path / "exported", "lora" if rank else "diffusers")
    components = dict(pipeline.components)
    if rank:
        components["transformer"] = copy.deepcopy(pipeline.transformer)
        trained = diffusers.FluxPipeline(**components)
        trained.load_lora_weights(tmp_path / "exported")
    else:
        exported = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "exported")
        trained = diffusers.FluxPipeline(**components | {"transformer": exported})

    noise = np.random.default_rng(1).standard_normal((2, 15, 16)).astype(np.float32)
    ours = sample(config, tmp_path / "run", PROMPTS, noise).astype(int)
    before = sample(config, tmp_path, PROMPTS, noise, base=True)
    assert np.abs(ours - draw(trained, noise)).max() <= 1
    assert np.abs(ours - before).max() >= 2


@pytest.mark.slow
def test_hybrid_sampling_takes_the_last_steps_with_the_base(folder, tmp_path):
    config = settings(folder)
    config.model.lora.rank, config.model.lora.base = 4, "float32"
    noise = np.random.default_rng(2).standard_normal((2, 15, 16)).astype(np.float32)
    parts, params = families.load(folder)
    state = init_state(
        lora.init(LoraConfig(rank=4).on(parts.family.targets), params["transformer"], jax.random.key(0)),
        optax.sgd(0.0),
        {"ema": Average()},
    )
    moved = jax.tree.map(lambda leaf: leaf + 0.3, state.params)
    checkpoints = Checkpoints(tmp_path, 1)
    state = state._replace(params=moved, averages={"ema": moved})
    checkpoints.save(finished(1, state, host_state(WindowState(0, 0, 1))))
    checkpoints.close()

    pictures = {}
    for steps in (0, 2, STEPS, None):
        config.evaluation.trained_steps = steps
        pictures[steps] = sample(config, tmp_path, PROMPTS, noise)
    config.evaluation.trained_steps = None
    np.testing.assert_array_equal(pictures[0], sample(config, tmp_path, PROMPTS, noise, base=True))
    np.testing.assert_array_equal(pictures[STEPS], pictures[None])
    assert pictures[2].std() > 5
    assert (pictures[2] != pictures[0]).any() and (pictures[2] != pictures[None]).any()
