import dataclasses
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from mixgrpo_jax import convert as converter
from mixgrpo_jax.convert import convert
from mixgrpo_jax.engine.loading import VERSION
from mixgrpo_jax.models import flux, lora, lora_files
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.rl.update import init_state
from mixgrpo_jax.runtime.checkpoint import Checkpoints, finished
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.models.test_release import released
from tests.python import run_program

CONFIG = flux.flux_small(
    in_channels=12,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=20,
    pooled_projection_dim=10,
    axes_dims_rope=(4, 14, 14),
)
LORA = LoraConfig(rank=2, alpha=3.0, targets=r"double_blocks/.*/q|image_in")
FIELDS = {"_diffusers_version": "0.30.0.dev0", "out_channels": None, "_name_or_path": "a"}


def random_params(seed=0, dtype=np.float32, like=None):
    rng = np.random.default_rng(seed)
    like = flux.TRANSFORMER.skeleton(CONFIG) if like is None else like
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), like)


def save_transformer(folder, dtype=np.float32, shard_size=10**10):
    fields = {"_class_name": "FluxTransformer2DModel", "patch_size": 1} | FIELDS | dataclasses.asdict(CONFIG)
    flux.TRANSFORMER.save_folder(folder, CONFIG, random_params(dtype=dtype), fields=fields, shard_size=shard_size)
    return folder


def tensors_of(folder):
    return {name: np.array(tensor) for name, tensor in weights.read_safetensors(folder).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], strict=True)


@pytest.mark.parametrize("dtype, shard_size, files", [(ml_dtypes.bfloat16, 10**10, 1), (np.float32, 10**6, 3)])
def test_a_round_trip_gives_every_bit_back(tmp_path, capsys, dtype, shard_size, files):
    source = save_transformer(tmp_path / "pipeline" / "transformer", dtype, shard_size)
    convert(tmp_path / "pipeline", tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "back", "diffusers", shard_size=shard_size)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    assert config_of(tmp_path / "back") == config_of(source) == config_of(tmp_path / "ours")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == len(list(source.glob("*.safetensors"))) >= files
    assert (tmp_path / "back" / "diffusion_pytorch_model.safetensors.index.json").exists() == (files > 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "pipeline"]
    assert "back: " in (printed := capsys.readouterr().out) and "MB/s), peak memory" in printed


def test_diffusers_opens_what_we_write_and_we_what_it_writes(tmp_path):
    torch = pytest.importorskip("torch")
    model_class = pytest.importorskip("diffusers").FluxTransformer2DModel
    torch.manual_seed(0)
    model = model_class(patch_size=1, **dataclasses.asdict(CONFIG)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    assert (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors.index.json").exists()
    convert(tmp_path / "theirs", tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "back", "diffusers", shard_size=300_000)
    back = model_class.from_pretrained(tmp_path / "back", torch_dtype=torch.bfloat16)
    assert config_of(tmp_path / "back") == config_of(tmp_path / "theirs")
    expected = model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("to", ["diffusers", "orbax"])
def test_the_original_file_is_read(tmp_path, to):
    weights.write_safetensors(tmp_path / "flux.safetensors", released())
    convert(tmp_path / "flux.safetensors", tmp_path / "out", to)
    config, params = flux.TRANSFORMER.load_folder(tmp_path / "out")
    expected_config, expected = flux.TRANSFORMER.load_folder(tmp_path / "flux.safetensors")
    assert config == expected_config == CONFIG
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, expected)


def test_dtype_is_that_asked_for(tmp_path):
    source = save_transformer(tmp_path / "source")
    convert(source, tmp_path / "ours", "orbax", dtype="bfloat16")
    convert(tmp_path / "ours", tmp_path / "back", "diffusers", dtype="float32")
    rounded = {name: t.astype(ml_dtypes.bfloat16).astype(np.float32) for name, t in tensors_of(source).items()}
    assert_same(tensors_of(tmp_path / "back"), rounded)


class FirstState(NamedTuple):
    """The train state of version 1."""

    params: Any
    opt_state: Any
    ema: Any
    step: Any


def in_neighbours(tree):
    """Trained parameters as versions 1 and 2 of the checkpoints had them."""
    table = flux.TRANSFORMER.table(CONFIG)
    return weights.reordered([*table, *lora_files.rules(table)], tree, weights.neighbours)


def save_run(workdir, base, settings, trained, averages, version=VERSION):
    """A run's workdir, as train leaves it, of this version of the checkpoints or of another; it evaluates the first."""
    if version < 3:
        trained, averages = in_neighbours(trained), {name: in_neighbours(tree) for name, tree in averages.items()}
    state = init_state(jax.tree.map(jnp.asarray, trained), optax.adam(1e-3))
    state = state._replace(averages=jax.tree.map(jnp.asarray, averages))
    host = {"version": version, "planned": {}}
    rules = {"evaluation": {"average": next(iter(averages), "")}}
    if version == 1:
        state, host = FirstState(state.params, state.opt_state, state.averages.get("ema"), state.step), {"window": {}}
        rules = {"optimizer": {"ema_decay": 0.9 if averages else 0.0}}
    checkpoints = Checkpoints(workdir, 1)
    checkpoints.save(finished(1, jax.tree.map(jnp.zeros_like, state), {}))
    checkpoints.save(finished(2, state, host)._replace(sums={}) if version < 3 else finished(2, state, host))
    checkpoints.close()
    model = {"folder": str(base.parent), "transformer": "", "lora": dataclasses.asdict(settings)}
    (workdir / "config.json").write_text(json.dumps({"seed": 0, "model": model} | rules))
    return workdir


def random_adapters(seed, config=LORA):
    params = flux.TRANSFORMER.skeleton(CONFIG)
    return random_params(seed, like=jax.eval_shape(lambda key: lora.init(config, params, key), jax.random.key(0)))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    base = save_transformer(folder / "base" / "transformer", ml_dtypes.bfloat16)
    averages = {"ema": random_params(2), "old": random_params(3)}
    return save_run(folder / "run", base, LoraConfig(), random_params(1), averages)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    base = save_transformer(folder / "base" / "transformer", ml_dtypes.bfloat16)
    return save_run(folder / "run", base, LORA, random_adapters(1), {"ema": random_adapters(2)})


@pytest.mark.parametrize(
    "to, which, seed",
    [("diffusers", "", 2), ("diffusers", "raw", 1), ("orbax", "ema", 2), ("diffusers", "old", 3)],
)
def test_a_run_gives_its_newest_parameters(tmp_path, full_run, to, which, seed):
    convert(full_run, tmp_path / "out", to, which=which)
    _, params = flux.TRANSFORMER.load_folder(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, random_params(seed))
    assert config_of(tmp_path / "out").items() >= FIELDS.items()


def test_a_run_without_an_average_gives_its_parameters(tmp_path, full_run):
    base = pathlib.Path(config_of(full_run)["model"]["folder"]) / "transformer"
    for version in (1, 2, VERSION):
        run = save_run(tmp_path / f"run{version}", base, LoraConfig(), random_params(1), {}, version)
        convert(run, tmp_path / f"out{version}", "diffusers")
        _, params = flux.TRANSFORMER.load_folder(tmp_path / f"out{version}")
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, random_params(1))
        with pytest.raises(ValueError, match="--weights='ema': the run keeps no such average; choose from raw"):
            convert(run, tmp_path / "refused", "diffusers", which="ema")


@pytest.mark.parametrize("version, which, seed", [(1, "", 2), (1, "ema", 2), (1, "raw", 1), (2, "", 2), (2, "raw", 1)])
def test_a_run_of_an_earlier_version_is_read(tmp_path, full_run, version, which, seed):
    base = pathlib.Path(config_of(full_run)["model"]["folder"]) / "transformer"
    run = save_run(tmp_path / "run", base, LoraConfig(), random_params(1), {"ema": random_params(2)}, version)
    convert(run, tmp_path / "out", "diffusers", which=which)
    _, params = flux.TRANSFORMER.load_folder(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, random_params(seed))


def test_a_run_of_a_later_version_is_refused_by_name(tmp_path, full_run):
    base = pathlib.Path(config_of(full_run)["model"]["folder"]) / "transformer"
    run = save_run(tmp_path / "run", base, LoraConfig(), random_params(1), {}, version=99)
    with pytest.raises(ValueError, match=r"checkpoints/2 is version 99 of mixgrpo_jax's checkpoints.*install a later"):
        convert(run, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype, to", [("", "diffusers"), ("float32", "orbax")])
def test_adapters_are_merged_into_their_base(tmp_path, lora_run, dtype, to):
    convert(lora_run, tmp_path / "out", to, merge=True, dtype=dtype)
    _, params = flux.TRANSFORMER.load_folder(tmp_path / "out")
    base = random_params(dtype=ml_dtypes.bfloat16)
    exact = lora.merge(jax.tree.map(lambda leaf: leaf.astype(np.float32), base), random_adapters(2), LORA.scale)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype or ml_dtypes.bfloat16), exact)
    if dtype:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, expected)
    else:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, expected)
    assert np.abs(params["image_in"]["kernel"].astype(np.float32) - base["image_in"]["kernel"]).max() > 0.1


@pytest.mark.parametrize("version", [2, VERSION])
def test_adapters_are_written_as_diffusers_names_them(tmp_path, lora_run, version):
    base = pathlib.Path(config_of(lora_run)["model"]["folder"]) / "transformer"
    run = save_run(tmp_path / "run", base, LORA, random_adapters(1), {"ema": random_adapters(2)}, version)
    convert(run, tmp_path / "out", "lora", which="raw")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    skeleton = flux.TRANSFORMER.skeleton(CONFIG)
    adapters = lora_files.load(tmp_path / "out", flux.TRANSFORMER.table(CONFIG), skeleton, LORA.scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), adapters, random_adapters(1))


def kohya_file(path):
    """Every second linear layer's adapters by kohya's names of the original file, and that file with them added."""
    rng, base = np.random.default_rng(5), released()
    names = [n for n, t in sorted(base.items()) if t.ndim == 2][::2]
    whole, tensors = dict(base), {}
    for name in names:
        (d_out, d_in), stem = base[name].shape, "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((2, d_in), (d_out, 2)))
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.float32(6)}
        whole[name] = base[name] + 3 * up @ down
    weights.write_safetensors(path / "base.safetensors", base)
    weights.write_safetensors(path / "whole.safetensors", whole)
    weights.write_safetensors(path / "kohya.safetensors", tensors)
    return path / "kohya.safetensors", str(path / "base.safetensors"), path / "whole.safetensors"


def test_a_lora_file_is_merged_into_its_base_or_written_as_diffusers_names_it(tmp_path):
    file, base, whole = kohya_file(tmp_path)
    convert(file, tmp_path / "merged", "diffusers", merge=True, base=base)
    convert(file, tmp_path / "peft", "lora", base=base)
    convert(tmp_path / "peft", tmp_path / "again", "orbax", merge=True, base=base)
    _, expected = flux.TRANSFORMER.load_folder(whole)
    for name in ("merged", "again"):
        _, params = flux.TRANSFORMER.load_folder(tmp_path / name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), params, expected)
    written = tensors_of(tmp_path / "peft")
    assert {name.rpartition(".lora_")[2] for name in written} == {"A.weight", "B.weight"}
    assert all(name.startswith("transformer.") for name in written)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(to="diffusers"), "write them with --to=lora, or add --merge"),
        (dict(to="lora", dtype="float32"), "--dtype=float32: adapters are written in fp32"),
        (dict(to="lora", base=""), r"give a LoRA file's model as --base"),
        (dict(to="diffusers", base=""), r"adapters \(LoRA\).* with their --base"),
        (dict(to="lora", base="nowhere"), "--base='nowhere': there is no such file or folder"),
    ],
)
def test_a_lora_file_needs_its_base(tmp_path, options, message):
    file, base, _ = kohya_file(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path / "target", **(dict(base=base) | options))
    assert not (tmp_path / "target").exists()


def test_a_run_needs_no_other_base(tmp_path, lora_run):
    with pytest.raises(ValueError, match=r"--base='other': .* is a run's workdir, whose config.json names its base"):
        convert(lora_run, tmp_path / "target", "lora", base="other")


ON_A_MESH = """
import sys
import jax, numpy as np
from mixgrpo_jax.models import flux
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.runtime import mesh as meshes

mesh = meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
_, host = flux.TRANSFORMER.load_folder(sys.argv[1])
for path in sys.argv[1:]:
    place = lambda shapes: meshes.shardings(shapes, FAMILY.rules, mesh)
    _, params = flux.TRANSFORMER.load_folder(path, shardings=place)
    assert jax.tree.map(lambda a: a.sharding, params) == meshes.shardings(host, FAMILY.rules, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b, strict=True), params, host)
    kernel = params["single_blocks"]["mlp_in"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 64 // 4, 256 // 2)}
"""


def test_every_kind_of_source_streams_onto_a_mesh(tmp_path):
    weights.write_safetensors(tmp_path / "flux.safetensors", released(dtype=ml_dtypes.bfloat16))
    for to in ("diffusers", "orbax"):
        convert(tmp_path / "flux.safetensors", tmp_path / to, to)
    run_program(ON_A_MESH, "diffusers", "orbax", "flux.safetensors", cwd=tmp_path, **virtual_devices(8))


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def sd3(folder):
    change_json(save_transformer(folder) / "config.json", _class_name="SD3Transformer2DModel")


def t5(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["T5EncoderModel"]}))


def no_config(folder):
    (save_transformer(folder) / "config.json").unlink()


def adapters_only(folder):
    lora_files.save(folder, flux.TRANSFORMER.table(CONFIG), random_adapters(0), 1.0)


def pickled(folder):
    save_transformer(folder)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def truncated(folder):
    file = save_transformer(folder, shard_size=10**6) / "diffusion_pytorch_model-00002-of-00003.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def shard_missing(folder):
    (save_transformer(folder, shard_size=10**6) / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()


def no_orbax(folder):
    no_config(folder)
    save_transformer(folder)
    (folder / "orbax").mkdir()


def other_orbax(folder):
    convert(save_transformer(folder.with_name("diffusers")), folder, "orbax")
    change_json(folder / "config.json", num_single_layers=2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "--source='.*source': there is no such file or folder"),
        (sd3, r"source/config.json has _class_name='SD3Transformer2DModel', no known family; .*FluxTransformer2DModel"),
        (t5, r"config.json has _class_name=None, no known family; choose from FluxTransformer2DModel"),
        (no_config, "there is no .*config.json: give a model's folder"),
        (adapters_only, "holds adapters .* as --base"),
        (pickled, r"model\.bin is pickled"),
        (truncated, r"00002-of-00003\.safetensors has \d+ bytes, and its header says"),
        (shard_missing, r"index\.json names diffusion_pytorch_model-00003-of-00003\.safetensors, which is not there"),
        (no_orbax, "orbax is no Orbax checkpoint"),
        (other_orbax, r"orbax has .* of shape \(3, .*config expects \(2, "),
    ],
)
def test_a_source_that_cannot_be_is_refused_before_anything_is_written(tmp_path, make, message):
    make(tmp_path / "source")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "target", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "run, options, message",
    [
        ("lora_run", dict(to="diffusers"), "--to=lora, or add --merge"),
        ("lora_run", dict(to="lora", dtype="bfloat16"), "--dtype=bfloat16: adapters are written in fp32"),
        ("full_run", dict(to="lora"), r"model\.lora\.rank=0.*use --to=diffusers"),
        ("full_run", dict(to="diffusers", merge=True), "--merge: the run has trained all parameters"),
        ("full_run", dict(to="gguf"), "--to='gguf' is unknown: choose one of"),
        ("full_run", dict(to="orbax", dtype="float16"), "--dtype='float16' is unknown"),
        (
            "full_run",
            dict(to="orbax", which="best"),
            "--weights='best': .* no such average; .* ema, old, raw",
        ),
    ],
)
def test_options_must_fit_the_run(tmp_path, request, run, options, message):
    with pytest.raises(ValueError, match=message):
        convert(request.getfixturevalue(run), tmp_path / "target", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to, merge, message", [("lora", False, "no run's workdir"), ("orbax", True, "no adapters")])
def test_a_model_is_no_run(tmp_path, to, merge, message):
    source = save_transformer(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "target", to, merge=merge)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda run, model: model | {"folder": "elsewhere"},
            r"config\.json: model\.folder='elsewhere': there is no such file or folder.* set model\.folder in it",
        ),
        (lambda run, model: model | {"lora": model["lora"] | {"rank": 4}}, r"iteration 2, has .*/a of shape.*expects"),
        (
            lambda run, model: model | {"lora": model["lora"] | {"targets": ".*/k"}},
            "iteration 2, lacks double_blocks/.*k/a",
        ),
        (lambda run, model: shutil.rmtree(run / "checkpoints" / "2") or model, "iteration 1, has|lacks|finished"),
        (lambda run, model: None, r"there is no .*config\.json, which names the run's base"),
    ],
)
def test_a_run_must_fit_its_base(tmp_path, lora_run, change, message):
    run = shutil.copytree(lora_run, tmp_path / "run")
    if message.startswith("iteration 1"):
        shutil.rmtree(run / "checkpoints" / "1")
    config = config_of(run)
    model = change(run, config["model"])
    (run / "config.json").write_text(json.dumps(config | {"model": model})) if model else (run / "config.json").unlink()
    with pytest.raises(ValueError, match=message):
        convert(run, tmp_path / "target", "lora")
    assert not (tmp_path / "target").exists()


def test_a_target_that_is_there_is_kept(tmp_path):
    source = save_transformer(tmp_path / "source")
    (tmp_path / "target").mkdir()
    convert(source, tmp_path / "target", "diffusers")
    before = tensors_of(tmp_path / "target")
    with pytest.raises(ValueError, match="is there already: give a new folder"):
        convert(source, tmp_path / "target", "diffusers", dtype="bfloat16")
    assert_same(tensors_of(tmp_path / "target"), before)


@pytest.mark.parametrize("to", ["diffusers", "orbax"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, to, error):
    source = save_transformer(tmp_path / "source")
    written = []

    def interrupt(self, num_bytes):
        written.append(num_bytes)
        if len(written) == 20:
            raise error("stopped")

    monkeypatch.setattr(converter.tqdm, "update", interrupt)
    with pytest.raises(error, match="stopped"):
        convert(source, tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_killed_conversion_left_does_not_open_and_is_cleared_away(tmp_path, monkeypatch):
    source = save_transformer(tmp_path / "source", shard_size=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_config", lambda *args: None)
        patch.setattr(converter.shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(converter.pathlib.Path, "rename", lambda *args: None)
        convert(source, tmp_path / "target", "diffusers")
    with pytest.raises(ValueError, match=r"there is no .*config\.json"):
        flux.TRANSFORMER.load_folder(tmp_path / "target.partial")
    convert(source, tmp_path / "target", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_disk_that_is_too_small_is_told(tmp_path, monkeypatch):
    source = save_transformer(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"has 1\.0 MB left, and .*target takes 2\.2 MB: make room"):
        convert(source, tmp_path / "target", "orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
