"""A made-up family, which this module alone knows, does what the package's own does."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixgrpo_jax import config as configs
from mixgrpo_jax.convert import convert
from mixgrpo_jax.encode import load_encoders
from mixgrpo_jax.engine.loading import load_policy, mesh_of
from mixgrpo_jax.models import families, lora, lora_files, t5
from mixgrpo_jax.models.codec import PixelCodec
from mixgrpo_jax.models.families import Family, Part, Parts, Text
from mixgrpo_jax.models.io.transformer import Transformer
from mixgrpo_jax.models.io.weights import linear
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.models.trainable import make_trainable
from mixgrpo_jax.tasks.signs.data import build_tokenizer
from tests.python import run_program

NAME = "MadeUpTransformer2DModel"
PROMPTS = ["a blue sign that says 4270 in white", "a red sign that says 7 in white"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 96
    text_width: int = 128
    head: int = 24


def init(config, key):
    keys = jax.random.split(key)
    shapes = {"proj": (config.width, config.width), "text_proj": (config.text_width, config.width)}
    return {
        name: {"kernel": jax.random.normal(key, shape) / shape[0] ** 0.5, "bias": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys, shapes.items())
    }


def table(config):
    return [*linear("p", "proj"), *linear("t", "text_proj", rotary=config.head)]


def check(folder, config, fields):
    if fields.get("depth", 1) != 1:
        raise ValueError(f"{folder}: depth={fields['depth']} is not supported")


def text(parts, length, dtype, negative=""):
    encoder, tokenizer = parts.configs["text_encoder"], parts.tokenizers["tokenizer"]

    def features(params, tokens):
        return {"pooled": t5.apply(encoder, params["text_encoder"], tokens["ids"], dtype).mean(1)}

    def tokenize(prompts, cut=False):
        rows = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=cut)["input_ids"]
        return {"ids": np.asarray(rows, np.int32)}

    return Text(features, tokenize, {"text_encoder": length})


def make(parts, config, remat=None):
    codec = PixelCodec(tuple(config.image_size))
    features, tokenize, limits, _ = text(parts, config.text_length, jnp.dtype(config.dtype))

    def predict(params, x, cond):
        return x @ params["proj"]["kernel"] + (cond @ params["text_proj"]["kernel"])[:, None]

    def velocity(params, x, sigma, cond):
        without = predict(params, x, jnp.zeros_like(cond["pooled"]))
        return without + config.guidance * (predict(params, x, cond["pooled"]) - without)

    return Policy(
        velocity,
        features,
        tokenize,
        lambda prompts: {"ids": jax.ShapeDtypeStruct((prompts, limits["text_encoder"]), jnp.int32)},
        lambda prompts: {"pooled": jax.ShapeDtypeStruct((prompts, 128), jnp.bfloat16)},
        codec,
        flops=2.0 * 24 * 96 * 96,
        evaluations=2,
    )


FAMILY = Family(
    transformer=Transformer(NAME, Sizes, init, table, {"depth": 1}, check),
    parts={"text_encoder": Part(t5, "tokenizer")},
    rules=((r"proj/kernel", P("fsdp", None)),),
    targets="proj",
    text=text,
    make=make,
    small=lambda: {"transformer": Sizes(), "text_encoder": t5.t5_tiny(vocab_size=64)},
    architectures={"made-up": lambda: {"transformer": Sizes(), "text_encoder": t5.t5_tiny()}},
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(sys.modules, "made_up", sys.modules[__name__])
    monkeypatch.setitem(families.FAMILIES, NAME, "made_up:FAMILY")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made_up")
    parts = Parts(FAMILY, FAMILY.small(), {"tokenizer": build_tokenizer()})
    families.save(folder, parts, jax.tree.map(np.asarray, families.init(parts, jax.random.key(0))))
    return folder


def test_it_loads_makes_a_policy_saves_and_loads_back(folder, tmp_path):
    parts, params = families.load(folder)
    assert parts.family is FAMILY and parts.configs == FAMILY.small()
    assert json.loads((folder / "transformer" / "config.json").read_text())["_class_name"] == NAME
    policy = parts.family.make(parts, configs.base().model)
    cond = policy.features(params, policy.tokenize(PROMPTS))
    x = jax.random.normal(jax.random.key(1), (2, *policy.latent_shape))
    kernels = {name: layer["kernel"] for name, layer in params["transformer"].items()}
    expected = x @ kernels["proj"] + 3.5 * (cond["pooled"] @ kernels["text_proj"])[:, None]
    np.testing.assert_allclose(policy.velocity(params["transformer"], x, 0.5, cond), expected, rtol=1e-3, atol=1e-3)
    assert policy.evaluations == 2 and policy.decode(params, x).shape == (2, 16, 48, 3)

    families.save(tmp_path / "again", parts, params)
    again, loaded = families.load(tmp_path / "again")
    assert again.configs == parts.configs
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), loaded, params)
    assert families.read_parts(folder).configs == parts.configs
    assert again.tokenizers["tokenizer"](PROMPTS) == parts.tokenizers["tokenizer"](PROMPTS)


def test_its_rules_and_targets_are_its_own(folder):
    seen = []
    parts, params = families.load(folder, place=lambda tree, rules: seen.append(rules) or jax.tree.map(placed, tree))
    assert seen == [FAMILY.rules] * 2
    made = make_trainable(parts, params["transformer"], LoraConfig(rank=2), jax.random.key(0), keep_base=False)
    assert made.params.keys() == {"proj"}
    made = make_trainable(parts, params["transformer"], LoraConfig(rank=2, targets=".*"), jax.random.key(0), False)
    assert made.params.keys() == {"proj", "text_proj"}


def placed(leaf):
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_commands_take_it(folder, tmp_path):
    convert(folder, tmp_path / "ours", "orbax", dtype="bfloat16")
    convert(tmp_path / "ours", tmp_path / "back", "diffusers", dtype="float32")
    config, params = FAMILY.transformer.load_folder(tmp_path / "back")
    _, before = FAMILY.transformer.load_folder(folder / "transformer")
    assert config == Sizes()
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), before)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, rounded)
    lora_files.save(tmp_path, table(Sizes()), lora.init(LoraConfig(2, targets="proj"), params, jax.random.key(0)), 1)
    assert lora_files.load(tmp_path, FAMILY.transformer.rules(Sizes()), params).keys() == {"proj"}

    parts, encoders = load_encoders(folder)
    assert parts.family is FAMILY and encoders.keys() == {"text_encoder"}
    assert "made-up" in families.architectures() and "flux1-dev" in families.architectures()
    assert families.architectures()["made-up"]().configs["transformer"] == Sizes()
    small = families.small_parts(folder, build_tokenizer())
    assert small.family is FAMILY and small.tokenizers.keys() == {"tokenizer"}


def test_encoders_alone_are_those_of_the_family_that_has_such_ones(folder, tmp_path):
    with pytest.raises(ValueError, match=rf"no model's text encoders \(Flux.* needs .*; {NAME} needs text_encoder/"):
        families.of_encoders(tmp_path)
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).symlink_to(folder / name)
    assert families.of_encoders(tmp_path) is FAMILY


def test_a_schedule_that_is_not_the_models_own_is_said(folder, tmp_path, capsys):
    (copy := tmp_path / "copy").mkdir()
    for part in folder.iterdir():
        (copy / part.name).symlink_to(part)
    (file := copy / families.SCHEDULER).parent.mkdir()
    config = configs.base()
    config.model.folder = str(copy)
    settings = configs.resolve(config)
    dev, schnell = dict(shift=3.0, use_dynamic_shifting=True), dict(shift=1.0, use_dynamic_shifting=False)
    for scheduler, fields in ((dev, []), (schnell, ["plan", "evaluation"]), (dict(shift=3.0), [])):
        file.write_text(json.dumps(scheduler))
        load_policy(settings, mesh_of(settings))
        said = [f"WARNING: {field}.shift=3.0, and {file} has shift=1.0: " for field in fields]
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(said) and all(map(str.startswith, lines, said))


def test_what_is_of_no_family_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.delitem(families.FAMILIES, NAME)
    message = rf"transformer/config.json has _class_name='{NAME}', no known family; choose from Flux"
    for open_folder in (
        families.load,
        families.read_parts,
        functools.partial(convert, target=tmp_path / "x", to="orbax"),
    ):
        with pytest.raises(ValueError, match=message):
            open_folder(folder)
    with pytest.raises(ValueError, match="there is no nowhere: give a transformer's folder"):
        families.of("nowhere")


def test_unsupported_configs_and_files_are_refused_by_the_family(folder, tmp_path):
    FAMILY.transformer.save_folder(
        tmp_path, Sizes(), init(Sizes(), jax.random.key(0)), fields={"_class_name": NAME, "depth": 2}
    )
    with pytest.raises(ValueError, match="depth=2 is not supported"):
        FAMILY.transformer.load_folder(tmp_path)
    with pytest.raises(ValueError, match=rf"is a file: a {NAME} is opened by the folder"):
        FAMILY.transformer.load_folder(tmp_path / "diffusion_pytorch_model.safetensors")


SETTINGS = """
import sys
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.models.nn.attention import ATTENTION_BACKENDS
from mixgrpo_jax.models.nn.remat import REMAT
print(*sys.modules)
"""


def test_settings_bring_no_model():
    brought = run_program(SETTINGS).split()
    ours = {name for name in brought if name.startswith("mixgrpo_jax.models.")}
    assert {name.split(".")[2] for name in ours} == {"lora_config", "nn"}
    assert not {"transformers", "flax.nnx"} & set(brought)


def test_a_family_is_imported_when_it_is_named():
    brought = run_program("import sys, mixgrpo_jax.models.trainable as t; print(*sys.modules)").split()
    assert "mixgrpo_jax.models.families" in brought and "transformers" not in brought
    assert not [name for name in brought if name.startswith(("mixgrpo_jax.models.flux", "mixgrpo_jax.models.t5"))]
