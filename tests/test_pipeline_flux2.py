"""The whole pipeline against diffusers, on a small random FLUX.2 [klein]: the same noise, the same pictures."""

import copy
import pathlib

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
from mixgrpo_jax.models import families, lora, lora_files, qwen3
from mixgrpo_jax.models.flux2.policy import FAMILY
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.sample import sample
from mixgrpo_jax.train import train
from tests.models.test_qwen3 import chat_tokenizer
from tests.test_pipeline import PROMPTS, SIZE, STEPS, encode_signs

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


def draw(pipeline, noise):
    """Pictures of diffusers for PROMPTS, [2, H, W, 3] uint8, by its own scheduler's sigmas."""
    pipeline.set_progress_bar_config(disable=True)
    latents = np.ascontiguousarray(noise.reshape(2, *GRID, -1).transpose(0, 3, 1, 2))
    images = pipeline(
        prompt=PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
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


@pytest.mark.parametrize("distilled", [False, True])
def test_sample_draws_what_diffusers_draws(pipeline, folder, noise, tmp_path, distilled):
    if distilled:  # it ignores the scale
        pipeline, folder = make_pipeline(distilled), tmp_path / "folder"
        pipeline.save_pretrained(folder)
    ours = sample(settings(folder), tmp_path, PROMPTS, noise, base=True)
    assert ours.std() > 5
    assert np.abs(ours.astype(int) - draw(pipeline, noise)).max() <= 1


def test_an_evaluation_with_guidance_counts_twice_and_is_that_of_two_calls(folder, noise):
    parts, params = families.load(folder, text=False)
    models = (configs.resolve(settings(folder, scale)).model for scale in (GUIDANCE, 1.0))
    guided, plain = (parts.family.make(parts, model) for model in models)
    assert (guided.evaluations, plain.evaluations) == (2, 1)
    rng = np.random.default_rng(1)
    cond = {name: rng.normal(size=shape.shape).astype(np.float32) for name, shape in guided.cond_shapes(2).items()}
    v = jax.jit(guided.velocity)(params["transformer"], noise, 0.5, cond)
    alone = jax.jit(plain.velocity)
    with_text, without = (alone(params["transformer"], noise, 0.5, {"text": cond[name]}) for name in cond)
    np.testing.assert_allclose(v, without + GUIDANCE * (with_text - without), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.slow
def test_trained_on_cached_features_with_guidance_and_exported_to_diffusers(pipeline, folder, noise, tmp_path, rank):
    encode_signs(folder, tmp_path / "features", LENGTH)
    config = settings(folder)
    config.data.name, config.data.folder = "features", str(tmp_path / "features")
    config.rewards = dict(colour=1.0)
    config.model.lora.rank, config.model.lora.alpha, config.model.lora.base = rank, 8.0, "float32"
    config.iterations, config.optimizer.learning_rate, config.averages.ema.decay = 3, 3e-3, 0.5
    config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 2, 4, 2, 4
    config.plan.num_steps, config.plan.length = 5, 2
    config.evaluation.prompts = 2
    train(config, tmp_path / "run")

    convert(tmp_path / "run", tmp_path / "exported", "lora" if rank else "diffusers")
    components = dict(pipeline.components)
    if rank:
        components["transformer"] = copy.deepcopy(pipeline.transformer)
        trained = diffusers.Flux2KleinPipeline(**components)
        trained.load_lora_weights(tmp_path / "exported")
    else:
        exported = diffusers.Flux2Transformer2DModel.from_pretrained(tmp_path / "exported")
        trained = diffusers.Flux2KleinPipeline(**components | {"transformer": exported})

    ours = sample(config, tmp_path / "run", PROMPTS, noise).astype(int)
    before = sample(config, tmp_path, PROMPTS, noise, base=True)
    assert np.abs(ours - draw(trained, noise)).max() <= 1
    assert np.abs(ours - before).max() >= 2
    if rank:  # in again
        config.model.lora.init_from = str(tmp_path / "exported")
        config.evaluation.average = ""
        assert np.abs(sample(config, tmp_path, PROMPTS, noise, base=True) - ours).max() <= 1


def test_adapters_of_all_targets_are_those_of_diffusers(pipeline, folder, noise, tmp_path):
    parts, params = families.load(folder)
    adapters = lora.init(LoraConfig(rank=3).on(FAMILY.targets), params["transformer"], jax.random.key(0))
    rng = np.random.default_rng(2)
    adapters = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), adapters)
    lora_files.save(tmp_path, parts.table, adapters, scale=2.0)
    theirs = diffusers.Flux2KleinPipeline(**pipeline.components | {"transformer": copy.deepcopy(pipeline.transformer)})
    theirs.load_lora_weights(tmp_path)
    back = lora_files.load(
        tmp_path, parts.family.transformer.rules(parts.configs["transformer"]), params["transformer"]
    )
    merged, expected = (
        lora.merge(params["transformer"], each, scale) for each, scale in ((back, 1.0), (adapters, 2.0))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, expected)
    families.save(tmp_path / "merged", parts, params | {"transformer": jax.tree.map(np.asarray, merged)})
    ours = sample(settings(tmp_path / "merged"), tmp_path, PROMPTS, noise, base=True).astype(int)
    assert np.abs(ours - draw(theirs, noise)).max() <= 1
    assert np.abs(ours - draw(pipeline, noise)).max() >= 2


def test_cached_features_have_no_pooled_ones_and_hold_the_negative_prompt_once(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    encode(folder, str(tmp_path / "prompts.txt"), tmp_path / "kept", max_length=LENGTH, batch=2)
    encode(folder, str(tmp_path / "prompts.txt"), tmp_path / "dropped", max_length=LENGTH, batch=2, padding="drop")
    kept, dropped = (store.load("train", tmp_path / name)[1] for name in ("kept", "dropped"))
    chat = chat_tokenizer()(qwen3.chats(chat_tokenizer(), PROMPTS[1:]))["input_ids"][0]
    assert kept["length"] == dropped["length"] == len(chat) < LENGTH  # the template's tokens are the prompt's own
    kept, dropped = kept["features"], dropped["features"]
    assert kept.keys() == dropped.keys() == {"text", "negative_text"}
    assert kept["text"].shape == kept["negative_text"].shape == dropped["text"].shape == (LENGTH, 3 * WIDTH)
    np.testing.assert_array_equal(kept["negative_text"], dropped["negative_text"])
    np.testing.assert_array_equal(kept["text"][: len(chat)], dropped["text"][: len(chat)])
    assert kept["text"][len(chat) :].any() and not dropped["text"][len(chat) :].any()


def linked(folder, target, **others):
    """The folder's parts, with others in the place of some; None leaves one out."""
    for part in ("transformer", "text_encoder", "tokenizer", "vae"):
        if (source := others.get(part, folder / part)) is not None:
            (target / part).symlink_to(source)
    return target


def test_another_text_encoder_than_the_transformers_is_refused(folder, tmp_path):
    qwen3.save_folder(tmp_path / "other", (other := qwen3.qwen3_tiny()), qwen3.init(other, jax.random.key(0)))
    config = settings(linked(folder, tmp_path, text_encoder=tmp_path / "other"))
    message = (
        r"joint_attention_dim=48 channels, and text_encoder/ gives 192, 3 layers of hidden_size=64.*hidden_size=16"
    )
    with pytest.raises(ValueError, match=message):
        sample(config, tmp_path, PROMPTS, base=True)


def test_a_folder_without_its_text_encoder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="has no text_encoder/"):
        families.load(linked(folder, tmp_path, text_encoder=None))


def test_a_prompt_whose_chat_does_not_fit_is_refused(folder):
    parts = families.read_parts(folder)
    with pytest.raises(ValueError, match=r"4270.* the model takes 12"):
        parts.family.text(parts, 12, jnp.float32).tokenize(PROMPTS)


def test_a_released_model_is_known_by_its_name():
    parts = families.architectures()["flux2-klein-4b"]()
    recipes = pathlib.Path(__file__).parents[1] / "configs" / "signs.py"
    config = configs.load("flux2_klein_mixgrpo", str(recipes), "1024")
    policy = FAMILY.make(parts, configs.resolve(config).model)
    assert policy.latent_shape == (4096, 128) and policy.evaluations == 2
    assert config.plan.shift == empirical_shift(4096, 10) and config.evaluation.shift == empirical_shift(4096, 50)
