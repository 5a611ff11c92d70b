import functools
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixgrpo_jax import encode as command
from mixgrpo_jax.data import features
from mixgrpo_jax.data.filters import Filters
from mixgrpo_jax.encode import encode
from mixgrpo_jax.models import t5
from mixgrpo_jax.models.clip import text as clip
from mixgrpo_jax.models.families import SHIPPED
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.scoring import score_all
from mixgrpo_jax.runtime.mesh import virtual_devices
from mixgrpo_jax.tasks.signs import data as signs

LENGTH, CLIP_LENGTH = 12, 10
T5 = t5.t5_tiny(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_heads=2)
CLIP = clip.clip_tiny(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=48,
    num_attention_heads=2,
    max_position_embeddings=CLIP_LENGTH,
    eos_token_id=1,
)
SIGNS = [sign.prompt for sign in signs.sample_signs("train", 8)]
LONG = "a blue sign that says 4270 4270 4270 in white"  # 20 tokens of T5, 21 of CLIP
PROMPTS = [SIGNS[0], LONG, *SIGNS[1:7], SIGNS[0], SIGNS[7], "a sign"]  # 11, one of them twice
SIZES = dict(batch=4, shard_size=4)


def clip_tokenizer():
    """A word-level tokenizer with the special tokens of CLIP's: it starts, ends and pads as that one does."""
    special = ["<|startoftext|>", "<|endoftext|>", "<unk>"]
    words = ["a", "sign", "that", "says", "in", *signs.PALETTE, *"0123456789"]
    vocabulary = {token: i for i, token in enumerate(special + words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    parts = tokenizers.pre_tokenizers
    model.pre_tokenizer = parts.Sequence([parts.Whitespace(), parts.Digits(individual_digits=True)])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], 0), (special[1], 1)]
    )
    names = dict(bos_token=special[0], eos_token=special[1], pad_token=special[1], unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=CLIP_LENGTH, **names)


def random_params(encoder, config, seed=0):
    leaves, tree = jax.tree.flatten(jax.eval_shape(functools.partial(encoder.init, config), jax.random.key(0)))
    rng = np.random.default_rng(seed)
    random = [rng.normal(size=leaf.shape, scale=leaf.shape[-1] ** -0.5).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, random)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    t5.save_folder(folder / "text_encoder_2", T5, random_params(t5, T5))
    clip.save_folder(folder / "text_encoder", CLIP, random_params(clip, CLIP))
    signs.build_tokenizer().save_pretrained(folder / "tokenizer_2")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """The tests' sources of one architecture have the same parameters, so that one program serves them."""
    programs, make = {}, command.make_launch

    def make_once(text, params, batch):
        key = *sorted(text.limits.items()), batch
        if key not in programs:
            programs[key] = make(text, params, batch)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "make_launch", make_once)
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return str(path)


@pytest.fixture(scope="module")
def encoded(source, prompts, tmp_path_factory):
    """A folder encoded in one go, with a shorter last shard."""
    folder = tmp_path_factory.mktemp("encoded") / "features"
    encode(source, prompts, folder, **SIZES)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stacked(folder, split="train"):
    return features.collate(list(features.load(split, folder)))


def reference(source, texts):
    """Features by calls of the two encoders in bfloat16, as bits."""
    tokens = {}
    for name, limit in (("tokenizer_2", LENGTH), ("tokenizer", CLIP_LENGTH)):
        tokenizer = AutoTokenizer.from_pretrained(source / name)
        padded = tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="np")
        tokens[name] = padded["input_ids"]
    bf16 = jnp.bfloat16
    text = jax.jit(t5.apply, static_argnums=(0, 3))(
        *t5.load_folder(source / "text_encoder_2", bf16), tokens["tokenizer_2"], bf16
    )
    pooled = jax.jit(clip.apply, static_argnums=(0, 3))(
        *clip.load_folder(source / "text_encoder", bf16), tokens["tokenizer"], bf16
    ).pooled
    return {"text": np.asarray(text), "pooled": np.asarray(pooled)}


def assert_bits(actual, expected):
    assert actual.dtype == expected.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(actual.view(np.uint16), expected.view(np.uint16))


def test_features_are_the_encoders_own_bit_for_bit_in_the_order_of_the_prompts(source, encoded):
    batch = stacked(encoded)
    assert batch["prompt"] == PROMPTS
    for start in range(0, 8, 4):  # whole batches, as the command has them
        expected = reference(source, PROMPTS[start : start + 4])
        for name, array in expected.items():
            assert_bits(batch["features"][name][start : start + 4], array)
    assert batch["length"][:3].tolist() == [8 + sum(c.isdigit() for c in SIGNS[0]), LENGTH, batch["length"][2]]
    assert (batch["length"] <= LENGTH).all() and batch["length"][-1] == 3


def test_a_filled_up_batch_changes_nothing(source, encoded):
    batch = stacked(encoded)["features"]
    last = [*PROMPTS[8:], PROMPTS[8]]  # three prompts are left for a batch of four
    for name, array in reference(source, last).items():
        assert_bits(batch[name][8:], array[:3])
    assert_bits(batch["text"][8], batch["text"][0])  # the same prompt, in another shard


def test_features_are_those_of_the_flux_pipeline(source, encoded):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    import transformers

    def pipeline(dtype):
        parts = {
            "text_encoder": transformers.CLIPTextModel.from_pretrained(source / "text_encoder", dtype=dtype),
            "text_encoder_2": transformers.T5EncoderModel.from_pretrained(source / "text_encoder_2", dtype=dtype),
            "tokenizer": AutoTokenizer.from_pretrained(source / "tokenizer"),
            "tokenizer_2": AutoTokenizer.from_pretrained(source / "tokenizer_2"),
        }
        return diffusers.FluxPipeline(scheduler=None, vae=None, transformer=None, **parts)

    def encode_prompt(dtype):
        with torch.no_grad():
            text, pooled, _ = pipeline(dtype).encode_prompt(PROMPTS, None, "cpu", max_sequence_length=LENGTH)
        return {"text": text.float().numpy(), "pooled": pooled.float().numpy()}

    exact, theirs, ours = encode_prompt(torch.float32), encode_prompt(torch.bfloat16), stacked(encoded)["features"]
    for name, expected in exact.items():

        def error(actual, expected=expected):
            return np.linalg.norm(np.asarray(actual, np.float32) - expected) / np.linalg.norm(expected)

        assert ours[name].shape == expected.shape
        assert 1e-4 < error(ours[name]) < 2 * error(theirs[name]) < 0.05


def test_dropped_padding_keeps_the_features_of_the_tokens(source, prompts, encoded, tmp_path):
    encode(source, prompts, tmp_path, padding="drop", **SIZES)
    kept, dropped = stacked(encoded), stacked(tmp_path)
    assert_bits(dropped["features"]["pooled"], kept["features"]["pooled"])
    real = np.arange(LENGTH) < kept["length"][:, None]
    assert_bits(dropped["features"]["text"][real], kept["features"]["text"][real])
    assert not real.all() and not dropped["features"]["text"][~real].any() and kept["features"]["text"][~real].any()


def test_without_clip_the_mean_of_the_tokens_is_pooled_and_a_shorter_length_cuts_them(prompts, tmp_path):
    encode("", prompts, tmp_path, max_length=7, batch=11)  # the checkpoint that ships with the package
    batch = stacked(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "tokenizer_2")
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=7, truncation=True, return_tensors="np")["input_ids"]
    config, params = t5.load_folder(SHIPPED / "text_encoder_2", jnp.bfloat16)
    text = jax.jit(t5.apply, static_argnums=(0, 3))(config, params, tokens, jnp.bfloat16)
    assert_bits(batch["features"]["text"], np.asarray(text))
    assert batch["length"].tolist() == [7] * 10 + [3]
    for row, pooled, length in zip(text.astype(jnp.float32), batch["features"]["pooled"], batch["length"]):
        np.testing.assert_allclose(pooled.astype(np.float32), row[:length].mean(0), atol=0.02)


METADATA = {
    "tag": "counting",
    "include": [{"class": "fox", "count": 2, "position": ["left of", 0]}, {"class": "ein Löwe 狮"}],
    "exclude": [],
    "nested": {"b": {"z": None, "a": True}, "a": 1},
    "numbers": [0, -1, 2**63, 0.1, 1e-300, 1.0],
    "": 'quotes " and \\ and \u2028',
}


def test_metadata_reach_a_reward_as_the_file_has_them(source, tmp_path):
    (tmp_path / "dataset").mkdir()
    records = [{"prompt": text, "id": i} | METADATA for i, text in enumerate(SIGNS[:3])]
    (tmp_path / "dataset" / "test_metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    encode(source, str(tmp_path / "dataset"), tmp_path / "out", split="test", **SIZES)
    batch = features.batches(features.load("test", tmp_path / "out"), 0, 3)[1]

    def score(images, prompts, metadata):
        for prompt, found in zip(prompts, metadata):
            i = SIGNS.index(prompt)
            assert json.dumps(found) == json.dumps({"id": i} | METADATA)  # of the same types, in the same order
        return np.array([m["id"] for m in metadata])

    scores = score_all([Reward("ids", "host", score)], np.zeros((3, 2, 2, 3)), batch["prompt"], batch["metadata"])
    assert sorted(scores["ids"].value) == [0, 1, 2]


def test_the_prompt_may_be_in_another_field(source, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"caption": SIGNS[0], "prompt": 3}))
    encode(source, str(tmp_path / "p.jsonl"), tmp_path / "out", field="caption", **SIZES)
    (element,) = features.load("train", tmp_path / "out")
    assert element["prompt"] == SIGNS[0] and element["metadata"] == {"prompt": 3}


def test_what_filters_drop_is_not_encoded(source, prompts, tmp_path, capsys):
    encode(source, prompts, tmp_path, filters=Filters(min_words=8), **SIZES)
    kept = [prompt for prompt in PROMPTS if len(prompt.split()) >= 8]
    assert 0 < len(kept) < len(PROMPTS) and stacked(tmp_path)["prompt"] == kept
    assert f"{len(kept)} of {len(PROMPTS)} prompts are kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"manifest-train\.json has prompts="):
        encode(source, prompts, tmp_path, **SIZES)


def test_an_interrupted_command_leaves_whole_shards_and_goes_on_to_the_same_bytes(
    source, prompts, encoded, tmp_path, monkeypatch
):
    tokenized = []
    tokenize = command.tokenize

    def interrupted(text, texts):
        tokenized.append(list(texts))
        if len(tokenized) == 4:  # one call is for the shapes; the next two are of shards 0 and 1
            raise KeyboardInterrupt
        return tokenize(text, texts)

    monkeypatch.setattr(command, "tokenize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(source, prompts, tmp_path, **SIZES)
    assert sorted(files(tmp_path)) == ["features-train.array_record-00000-of-00003", "manifest-train.json"]
    with pytest.raises(ValueError, match="no finished split"):
        features.load("train", tmp_path)

    tokenized.clear()
    monkeypatch.setattr(command, "tokenize", lambda *args: tokenized.append(list(args[1])) or tokenize(*args))
    encode(source, prompts, tmp_path, **SIZES)
    assert tokenized[1:] == [PROMPTS[4:8], [*PROMPTS[8:], PROMPTS[8]]]
    assert files(tmp_path) == files(encoded)

    tokenized.clear()
    encode(source, prompts, tmp_path, **SIZES)
    assert len(tokenized) == 1 and files(tmp_path) == files(encoded)


def test_two_processes_share_the_shards(source, prompts, encoded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process, written in ((1, [1]), (0, [0, 1, 2])):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        split = encode(source, prompts, tmp_path, **SIZES)
        assert sorted(set(range(3)) - set(split.missing())) == written
        assert ("2 of 3 shards are left to other processes" in capsys.readouterr().out) == (process == 1)
    assert files(tmp_path) == files(encoded)


def test_the_arithmetic_and_what_is_cut_are_printed(source, prompts, tmp_path, capsys):
    encode(source, prompts, tmp_path, **SIZES)
    out = capsys.readouterr().out
    assert "text_encoder_2: 1 of 11 prompts are cut at 12 tokens" in out
    cut = sum(sum(c.isdigit() for c in prompt) > 1 for prompt in PROMPTS)  # beside seven words and two ends
    assert f"text_encoder: {cut} of 11 prompts are cut at 10 tokens" in out
    assert "11 prompts x (12 x 32 + 24) x 2 bytes = 11 x 816 bytes = 8.976 kB in 3 files" in out
    encode(source, prompts, tmp_path, **SIZES)
    assert "0 bytes to be written" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(batch=0), "batch=0 .* multiple of 1"),
        (
            dict(source="nowhere"),
            "source='nowhere': there is no such file or folder, and on the hub a model is named owner/model",
        ),
        (
            dict(source=os.curdir),
            r"source='.*' has no model's text encoders \(Flux\w+ needs text_encoder_2/.*; SD3\w+ needs .*\)",
        ),
        (dict(max_length=0), "max_length=0"),
        (dict(padding="cut"), "padding='cut'"),
        (dict(negative_prompt="grey"), "negative_prompt='grey': FLUX.1 .* takes none; leave it empty"),
        (dict(shard_size=0), "shard_size=0"),
        (dict(split="train[:3]"), "split='train"),
        (dict(prompts="nowhere.txt"), r"prompts='nowhere\.txt'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(source, prompts, tmp_path, change, message):
    arguments = dict(source=source, prompts=prompts, target=tmp_path / "out", **SIZES) | change
    with pytest.raises(ValueError, match=message):
        encode(**arguments)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(source, prompts, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 9000, 9000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"has 9 kB free, and 9\.065 kB are to be written.*padding=drop"):
        encode(source, prompts, tmp_path / "a" / "b", **SIZES)
    assert not (tmp_path / "a").exists()
    encode(source, prompts, tmp_path / "a" / "b", padding="drop", **SIZES)


def test_a_target_begun_with_something_else_is_refused(source, prompts, encoded, tmp_path):
    before = files(encoded)
    other = tmp_path / "prompts.txt"
    other.write_text("\n".join(PROMPTS[::-1]))
    changed = tmp_path / "pipeline"
    shutil.copytree(source, changed)
    t5.save_folder(changed / "text_encoder_2", T5, random_params(t5, T5, seed=9))
    for change, field in (
        (dict(prompts=str(other)), "prompts"),
        (dict(source=changed), "source"),
        (dict(padding="drop"), "padding"),
        (dict(max_length=11), "max_length"),
        (dict(shard_size=8), "shard_size"),
    ):
        with pytest.raises(ValueError, match=rf"manifest-train\.json has {field}="):
            encode(**(dict(source=source, prompts=prompts, target=encoded, **SIZES) | change))
    assert files(encoded) == before


def test_a_moved_source_is_the_same_source(source, prompts, encoded, tmp_path):
    shutil.copytree(source, tmp_path / "pipeline")
    (tmp_path / "pipeline" / "README.md").write_text("another file beside the encoders")
    before = files(encoded)
    encode(tmp_path / "pipeline", prompts, encoded, **SIZES)
    assert files(encoded) == before


def test_an_encoder_needs_its_tokenizer(source, prompts, tmp_path):
    shutil.copytree(source, tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "tokenizer")
    with pytest.raises(ValueError, match="has no tokenizer/"):
        encode(tmp_path / "pipeline", prompts, tmp_path / "out")


@pytest.mark.slow
def test_the_command_on_eight_devices_gives_the_same_features(source, prompts, encoded, tmp_path):
    environment = os.environ | virtual_devices(8)
    arguments = dict(source=source, prompts=prompts, target=tmp_path, batch=8, shard_size=8)
    line = [sys.executable, "-m", "mixgrpo_jax.encode", *(f"--{name}={value}" for name, value in arguments.items())]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, one = stacked(tmp_path), stacked(encoded)
    assert ours["prompt"] == one["prompt"]
    for name, expected in one["features"].items():
        # Another batch a device: another order of summation, and with it the last bits of bfloat16.
        actual, expected = (array.astype(np.float32) for array in (ours["features"][name], expected))
        assert np.linalg.norm(actual - expected) < 0.01 * np.linalg.norm(expected)
