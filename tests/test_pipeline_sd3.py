"""The whole pipeline against diffusers, on a small random Stable Diffusion 3: the same noise, the same pictures."""

import copy
import dataclasses

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
from mixgrpo_jax.models import families
from mixgrpo_jax.models.nn.patches import unpack
from mixgrpo_jax.runtime import metrics
from mixgrpo_jax.runtime.mesh import virtual_devices
from mixgrpo_jax.sample import sample
from mixgrpo_jax.train import train
from tests.python import ROOT, run_program
from tests.test_pipeline import PROMPTS, SIZE, STEPS, encode_signs, tokenizer

LENGTH, CLIP_LENGTH = 12, 16
GUIDANCE, NEGATIVE = 4.5, "a pink sign"


def random_clip(width, projection, activation):
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=width, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH, eos_token_id=1, pad_token_id=0, bos_token_id=2,
            projection_dim=projection, hidden_act=activation,
        )
    )  # fmt: skip


def make_pipeline(t5):
    """A random pipeline of diffusers' own classes, in fp32."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=22,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=64, d_model=40, d_kv=8, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
        )
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        random_clip(12, 8, "quick_gelu"),
        tokenizer(CLIP_LENGTH),
        random_clip(20, 14, "gelu"),
        tokenizer(CLIP_LENGTH),
        encoder.eval() if t5 else None,  # or it drops activations
        tokenizer(LENGTH) if t5 else None,
    )


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline(t5=True)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def noise():
    tokens = (SIZE[0] // 16) * (SIZE[1] // 16)
    return np.random.default_rng(0).standard_normal((2, tokens, 16)).astype(np.float32)


def draw(pipeline, noise, guidance=GUIDANCE, negative=""):
    """Pictures of diffusers for PROMPTS, [2, H, W, 3] uint8, by its own scheduler's sigmas."""
    pipeline.set_progress_bar_config(disable=True)
    latents = np.array(unpack(noise, SIZE[0] // 8, SIZE[1] // 8)).transpose(0, 3, 1, 2)
    images = pipeline(
        PROMPTS,
        negative_prompt=[negative] * len(PROMPTS),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        max_sequence_length=LENGTH,
        latents=torch.from_numpy(np.ascontiguousarray(latents)),
    ).images
    return np.stack([np.asarray(image) for image in images])


def settings(folder, guidance=GUIDANCE, negative=""):
    config = configs.base()
    config.model.folder, config.model.image_size, config.model.text_length = str(folder), SIZE, LENGTH
    config.model.guidance, config.model.negative_prompt = guidance, negative
    config.evaluation.num_steps, config.evaluation.spacing, config.evaluation.batch = STEPS, "linspace", 2
    config.rewards, config.watched = dict(ocr=1.0), ()
    return config


def training(folder, **changes):
    """Two iterations of 2 prompts x 4."""
    config = settings(folder, **changes)
    config.rewards = dict(colour=1.0)
    config.iterations, config.optimizer.learning_rate, config.averages.ema.decay = 2, 3e-3, 0.5
    config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 2, 4, 2, 4
    config.plan.num_steps, config.plan.length, config.plan.spacing = 5, 2, "linspace"
    config.evaluation.prompts = 2
    return config


@pytest.mark.parametrize("t5", [True, False], ids=["with T5", "without T5"])
def test_features_are_those_of_the_pipeline(pipeline, folder, tmp_path, t5):
    if not t5:
        pipeline, folder = make_pipeline(t5), tmp_path
        pipeline.save_pretrained(folder)
    parts, params = families.load(folder)
    features, tokenize, *_ = parts.family.text(parts, LENGTH, jnp.float32, NEGATIVE)
    ours = jax.jit(features)(params, tokenize(PROMPTS))
    with torch.no_grad():
        text, negative, pooled, negative_pooled = pipeline.encode_prompt(
            PROMPTS, PROMPTS, PROMPTS, negative_prompt=[NEGATIVE] * 2, max_sequence_length=LENGTH
        )
    theirs = {"text": text, "pooled": pooled, "negative_text": negative, "negative_pooled": negative_pooled}
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected.numpy()) / np.linalg.norm(expected)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("guidance, negative", [(GUIDANCE, NEGATIVE), (1.0, "")])
def test_sample_draws_what_diffusers_draws(pipeline, folder, noise, tmp_path, guidance, negative):
    ours = sample(settings(folder, guidance, negative), tmp_path, PROMPTS, noise, base=True)
    assert ours.std() > 5
    assert np.abs(ours.astype(int) - draw(pipeline, noise, guidance, negative)).max() <= 1


def test_an_evaluation_with_guidance_counts_twice_and_is_that_of_two_calls(folder, noise):
    parts, params = families.load(folder, text=False)
    parts = dataclasses.replace(parts, configs=families.read_parts(folder).configs)
    models = (configs.resolve(settings(folder, scale)).model for scale in (GUIDANCE, 1.0))
    guided, plain = (parts.family.make(parts, model) for model in models)
    assert (guided.evaluations, plain.evaluations) == (2, 1)
    rng = np.random.default_rng(1)
    cond = {name: rng.normal(size=shape.shape).astype(np.float32) for name, shape in guided.cond_shapes(2).items()}
    negative = {name: cond[f"negative_{name}"] for name in ("text", "pooled")}
    v = jax.jit(guided.velocity)(params["transformer"], noise, 0.5, cond)
    alone = jax.jit(plain.velocity)
    own = {name: cond[name] for name in negative}
    with_text, without = (alone(params["transformer"], noise, 0.5, told) for told in (own, negative))
    np.testing.assert_allclose(v, without + GUIDANCE * (with_text - without), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_trained_on_cached_features_with_guidance_and_exported_to_diffusers(pipeline, folder, noise, tmp_path, rank):
    encode_signs(folder, tmp_path / "features")
    config = training(folder)
    config.data.name, config.data.folder = "features", str(tmp_path / "features")
    config.model.lora.rank, config.model.lora.alpha, config.model.lora.base = rank, 8.0, "float32"
    train(config, tmp_path / "run")

    convert(tmp_path / "run", tmp_path / "exported", "lora" if rank else "diffusers")
    components = dict(pipeline.components)
    if rank:
        components["transformer"] = copy.deepcopy(pipeline.transformer)
        trained = diffusers.StableDiffusion3Pipeline(**components)
        trained.load_lora_weights(tmp_path / "exported")
    else:
        exported = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "exported")
        before, after = (model.pos_embed.pos_embed for model in (pipeline.transformer, exported))
        assert torch.equal(before, after)  # which nothing trains
        trained = diffusers.StableDiffusion3Pipeline(**components | {"transformer": exported})

    ours = sample(config, tmp_path / "run", PROMPTS, noise).astype(int)
    before = sample(config, tmp_path, PROMPTS, noise, base=True)
    assert np.abs(ours - draw(trained, noise)).max() <= 1
    assert np.abs(ours - before).max() >= 2
    if rank:  # in again
        config.model.lora.init_from = str(tmp_path / "exported")
        config.evaluation.average = ""
        assert np.abs(sample(config, tmp_path, PROMPTS, noise, base=True) - ours).max() <= 1


ON_EIGHT = """
import sys
from mixgrpo_jax.train import train
from tests.test_pipeline_sd3 import NEGATIVE, training
config = training(sys.argv[1], negative=NEGATIVE)
config.batch.updates, config.mesh.data, config.mesh.fsdp = 1, 2, 4
train(config, sys.argv[2])
"""


@pytest.mark.slow
def test_the_guided_ratio_is_one_on_one_device_and_on_eight(folder, tmp_path):
    config = training(folder, negative=NEGATIVE)
    config.batch.updates = 1
    train(config, tmp_path / "one")
    run_program(ON_EIGHT, folder, tmp_path / "eight", cwd=ROOT, **virtual_devices(8))
    one, eight = (metrics.read(tmp_path / name / "metrics.jsonl")[1:] for name in ("one", "eight"))
    for ours, theirs in zip(one, eight, strict=True):
        assert max(line["ratio/max_deviation"] for line in (ours, theirs)) < 1e-6
        assert ours["nfe/rollout"] == theirs["nfe/rollout"] and ours["nfe/gradient"] == 2 * 8 * 2
        for name in ("reward/colour/mean", "loss/total", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_cached_features_hold_the_negative_prompt_once(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = dict(prompts=str(tmp_path / "prompts.txt"), max_length=LENGTH, batch=2)
    encode(folder, target=tmp_path / "kept", **given)
    encode(folder, target=tmp_path / "dropped", padding="drop", **given)
    kept, dropped = (store.load("train", tmp_path / name)[1]["features"] for name in ("kept", "dropped"))
    assert kept["text"].shape == kept["negative_text"].shape == dropped["text"].shape == (CLIP_LENGTH + LENGTH, 40)
    np.testing.assert_array_equal(kept["negative_text"], dropped["negative_text"])
    own = CLIP_LENGTH + store.load("train", tmp_path / "kept")[1]["length"]
    np.testing.assert_array_equal(kept["text"][:own], dropped["text"][:own])
    assert kept["text"][own:].any() and not dropped["text"][own:].any()

    with pytest.raises(ValueError, match=r"manifest-train\.json has negative_prompt='', now negative_prompt='a pink"):
        encode(folder, target=tmp_path / "kept", negative_prompt=NEGATIVE, **given)
    config = settings(folder, negative=NEGATIVE)
    config.data.name, config.data.folder, config.batch.prompts = "features", str(tmp_path / "kept"), 2
    with pytest.raises(
        ValueError, match=r"kept' is encoded with negative_prompt='', and model.negative_prompt='a pink"
    ):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "lacking, message",
    [
        (["text_encoder_2"], "has no text_encoder_2/; expected"),
        (["text_encoder", "tokenizer"], "has no text_encoder/, tokenizer/; expected"),
        (["tokenizer_2"], "has no tokenizer_2/; expected"),
        (["tokenizer_3"], "has no tokenizer_3/; expected"),  # beside its encoder, which may be absent
        (["transformer"], "has no transformer/; expected"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(folder, tmp_path, lacking, message):
    for part in folder.iterdir():
        if part.name not in lacking:
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(ValueError, match=rf"model\.folder='{tmp_path}' {message}.*fetch what it lacks"):
        families.load(tmp_path)
