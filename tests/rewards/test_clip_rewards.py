"""Rewards by CLIP, against the originals' steps: their files, their preprocessing, their scale."""

import dataclasses
import functools
import html

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mixgrpo_jax.models import clip
from mixgrpo_jax.rewards import clip_text, probe
from mixgrpo_jax.rewards.clip import Similarity, clipscore, hps, pickscore
from mixgrpo_jax.rewards.preprocess import MEAN, STD
from mixgrpo_jax.rewards.scoring import score_all
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.models.test_clip_model import expected_embeddings, hf_model, make_config, open_clip_model
from tests.python import run_program
from tests.rewards.test_preprocess import by_pil, by_torch, pictures

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

EXACT = make_config((64, 2, 1), (160, 2, 2), "gelu", 24, 56, 14, vocab=64, length=16)
QUICK = make_config((48, 2, 2), (40, 2, 5), "quick_gelu", 24, 45, 9, vocab=64, length=16)
FP32 = dict(dtype="float32")  # as a config says it
PROMPTS = ["A red Sun", "two cats & a dog 12", "x " * 40]
IMAGES = pictures(80, 80, count=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder of a CLIP tokenizer without merges: a token for each letter and digit, within a word or at its end."""
    folder = tmp_path_factory.mktemp("tokenizer")
    characters = "abcdefghijklmnopqrstuvwxyz"
    words = [*characters, *(f"{c}</w>" for c in characters), *(f"{c}</w>" for c in "0123456789")]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


def torch_file(path, model, **extra):
    torch.save({"state_dict": model.state_dict(), **extra} if extra else model.state_dict(), path)
    return path


def tokens_of(folder, config, prompts=PROMPTS):
    return clip_text.load_tokenizer(folder, config.text)(prompts)


def cosines(model, pixels, tokens):
    """Of pixels from 0 to 255 after the resize."""
    image, text = expected_embeddings(model, ((pixels / 255 - MEAN) / STD).astype(np.float32), tokens)
    return (image * text).sum(-1)


def scores(reward, images=IMAGES, prompts=PROMPTS):
    return score_all([reward], images, prompts, [{}] * len(prompts))[reward.name].value


def test_hps_is_the_cosine_of_the_picture_resized_as_floats(tmp_path, tokenizer):
    model, size = open_clip_model(EXACT), EXACT.vision.image_size
    path = torch_file(tmp_path / "HPS_v2.1_compressed.pt", model, epoch=3)
    reward = hps(path, tokenizer, config=EXACT, **FP32)
    assert (reward.name, reward.where) == ("hps", "device")
    expected = cosines(model, by_torch(IMAGES, size, "cubic"), tokens_of(tokenizer, EXACT))
    np.testing.assert_allclose(scores(reward), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalise, shift, divisor", [(None, 0, 1), ("flow_grpo", 0, 26), ("mixgrpo", 18, 8)])
def test_pickscore_is_the_scaled_cosine_of_the_picture_as_pil_resizes_it(
    tmp_path, tokenizer, normalise, shift, divisor
):
    model, size = hf_model(EXACT), EXACT.vision.image_size
    model.save_pretrained(tmp_path)
    reward = pickscore(tmp_path, tokenizer, normalise=normalise, config=EXACT, **FP32)
    images = pictures(80, 100, count=3)
    cosine = cosines(model, by_pil(images, size, "crop", "cubic"), tokens_of(tokenizer, EXACT))
    expected = (float(model.logit_scale.exp()) * cosine - shift) / divisor
    np.testing.assert_allclose(scores(reward, images), expected, rtol=1e-4, atol=1e-4)


def test_clipscore_of_dfn_is_the_cosine_of_the_squashed_picture(tmp_path, tokenizer):
    model = open_clip_model(QUICK)
    path = torch_file(tmp_path / "open_clip_pytorch_model.bin", model)
    images = pictures(60, 90, count=3)
    pixels = by_pil(images, QUICK.vision.image_size, "squash", "cubic")
    expected = cosines(model, pixels, tokens_of(tokenizer, QUICK))
    ours = scores(clipscore(path, tokenizer, config=QUICK, **FP32), images)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_clipscore_of_openai_is_a_hundredth_of_the_logits_of_the_picture_resized_linearly(tmp_path, tokenizer):
    model = hf_model(QUICK)
    model.save_pretrained(tmp_path)
    cosine = cosines(model, by_torch(IMAGES, QUICK.vision.image_size, "linear"), tokens_of(tokenizer, QUICK))
    expected = float(model.logit_scale.exp()) * cosine / 100
    ours = scores(clipscore(tmp_path, tokenizer, model="openai", config=QUICK, **FP32))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_both_layouts_of_a_model_give_one_score(tmp_path, tokenizer):
    """PickScore's weights by open_clip's names, and as a single file."""
    model = open_clip_model(EXACT)
    pickled = torch_file(tmp_path / "model.pt", model)
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    one, other = (
        scores(pickscore(path, tokenizer, config=EXACT, **FP32)) for path in (pickled, tmp_path / "model.safetensors")
    )
    np.testing.assert_array_equal(one, other)


def test_bf16_is_the_default_and_stays_near(tmp_path, tokenizer):
    hf_model(EXACT).save_pretrained(tmp_path)
    exact, half = (pickscore(tmp_path, tokenizer, config=EXACT, **options) for options in (FP32, {}))
    assert half.score.params["vision"]["positions"].dtype == jnp.bfloat16
    difference = np.abs(scores(half) - scores(exact))
    assert 0 < difference.max() < 0.5


def fresh(config=EXACT, seed=0):
    """Random parameters, away from the symmetries of fresh ones."""
    params = clip.init(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


SCORES = {
    "hps": Similarity(EXACT, rounded=False, dtype=jnp.float32),
    "pickscore": Similarity(EXACT, scaled=True, shift=18.0, divisor=8.0, dtype=jnp.float32),
    "dfn": Similarity(QUICK, resize="squash", dtype=jnp.float32),
    "openai": Similarity(QUICK, method="linear", rounded=False, scaled=True, divisor=100.0, dtype=jnp.float32),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("hps", "dfn") else name for name in SCORES]
)
def test_gradients_with_respect_to_the_picture_are_those_of_finite_differences(name):
    score = SCORES[name]
    params = fresh(score.config)
    tokens = np.random.default_rng(0).integers(0, 63, (2, 16)).astype(np.int32)
    tokens[:, 7] = 63
    images = pictures(64, 72, count=2).astype(np.float32)
    function = jax.jit(lambda x: score(params, x, tokens))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(score(params, x, tokens))))(images)
    for i in range(2):
        slope = np.linalg.norm(gradient[i])
        step = np.zeros_like(images)
        step[i] = 60 * gradient[i] / slope
        ahead, behind = function(images + step), function(images - step)
        np.testing.assert_allclose((ahead - behind)[i] / 120, slope, rtol=2e-2)
        np.testing.assert_allclose((ahead - behind)[1 - i], 0, atol=1e-5)


def test_a_batch_is_scored_as_its_pictures_one_by_one(tmp_path, tokenizer):
    hf_model(EXACT).save_pretrained(tmp_path)
    reward = pickscore(tmp_path, tokenizer, config=EXACT, **FP32)
    apart = [scores(reward, IMAGES[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(scores(reward), apart, rtol=1e-5)


@pytest.mark.slow
def test_pictures_that_are_sharded_over_a_batch_score_the_same():
    code = """
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from mixgrpo_jax.rewards.on_device import OnDevice
        from tests.rewards import test_clip_rewards as t

        mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        images, prompts = t.pictures(64, 64, count=8), [""] * 8
        score = OnDevice(t.SCORES["pickscore"], t.fresh(), lambda prompts, _: np.full((len(prompts), 16), 63, np.int32))
        whole = score(images, prompts, [])
        sharded = score(jax.device_put(images, NamedSharding(mesh, P(("data", "fsdp")))), prompts, [])
        with jax.set_mesh(mesh):
            dealt = score(images, prompts, [])
            few = score(images[:3], prompts[:3], [])
        for parts in (sharded, dealt):
            assert len(parts.sharding.device_set) == 4 and not parts.is_fully_replicated
        print(max(np.abs(parts - whole).max() for parts in (sharded, dealt)), np.ptp(whole))
        np.testing.assert_allclose(few, whole[:3], rtol=1e-5)

        program, shapes = score.lower(8, (64, 64), mesh)
        params = jax.device_put(score.params, jax.tree.map(lambda shape: shape.sharding, shapes))
        again = program.compile()(params, jax.device_put(images, sharded.sharding), score.inputs(prompts, []))
        np.testing.assert_array_equal(again, sharded)
        held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(params))
        assert held < 0.3 * sum(a.nbytes for a in jax.tree.leaves(params)), held
    """
    difference, spread = map(float, run_program(code, **virtual_devices(4)).split())
    assert difference < 1e-5 < 1e-3 < spread


def test_the_probe_lets_the_right_weights_pass_and_stops_others(tmp_path, tokenizer):
    hf_model(EXACT).save_pretrained(tmp_path)
    build = functools.partial(pickscore, tmp_path, tokenizer, config=EXACT, **FP32)
    (known,) = scores(build(), probe.picture()[None], [probe.PROMPT])
    build(probe=float(known))
    build(probe=float(known) * 1.05, tolerance=0.1)
    with pytest.raises(ValueError, match=rf"reward 'pickscore' scores the probe {known:.5g}, and 0.2731 was expected"):
        build(probe=0.2731)


PICTURE = 4252910014


def test_the_probes_picture_is_what_it_was():
    picture = probe.picture()
    assert picture.shape == (256, 320, 3) and picture.dtype == np.uint8
    weights = np.arange(picture.size).reshape(picture.shape) % 251 + 1
    assert int((picture * weights).sum()) == PICTURE


def test_open_clips_text_is_mended_before(tokenizer):
    clean = clip_text.mended
    text = "  caf\u00c3\u00a9 \u201cred\u201d &amp;amp; blue "
    assert clean(text) == 'caf\u00e9 "red" & blue'
    assert html.unescape(clean(text)) == clean(text)


def test_ids_are_lower_case_padded_and_cut(tokenizer):
    ids = tokens_of(tokenizer, EXACT, ["Ab", "ab", "a" * 40, ""])
    assert ids.dtype == np.int32 and ids.shape == (4, 16)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert ids[0, :4].tolist() == [62, 0, 27, 63]
    assert ids[2, -1] == 63 and 63 not in ids[2, :-1]
    assert ids[3, :2].tolist() == [62, 63]


def test_what_does_not_fit_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"tokenizer='.*absent': there is no such file or folder"):
        pickscore(tmp_path, tmp_path / "absent", config=EXACT)
    with pytest.raises(ValueError, match=r"there is no CLIP tokenizer in .*vocab.json"):
        pickscore(tmp_path, tmp_path, config=EXACT)
    other = dataclasses.replace(EXACT, text=dataclasses.replace(EXACT.text, vocab_size=60, eos_token_id=59))
    with pytest.raises(ValueError, match=r"has 64 tokens and ends text by 63.*vocab_size=60 and eos_token_id=59"):
        pickscore(tmp_path, tokenizer, config=other)
    with pytest.raises(ValueError, match="normalise='z' is unknown"):
        pickscore(tmp_path, tokenizer, normalise="z")
    with pytest.raises(ValueError, match="model='vit' is unknown"):
        clipscore(tmp_path, tokenizer, model="vit", config=QUICK)
    path = torch_file(tmp_path / "model.pt", open_clip_model(QUICK))
    with pytest.raises(ValueError, match=r"has shape .* config expects"):
        hps(path, tokenizer, config=EXACT)
