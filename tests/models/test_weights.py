import json
import struct
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.weights import Rule, linear
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program

TABLE = [
    *linear("net.{i}.proj", "blocks/proj"),
    *linear("head", "head", bias=False),
    Rule("conv.weight", "conv/kernel", (2, 3, 1, 0)),
    Rule("optional.weight", "optional/scale"),
]
SKELETON = {
    "blocks": {"proj": {"kernel": np.zeros((11, 2, 3)), "bias": np.zeros((11, 3))}},
    "head": {"kernel": np.zeros((3, 4))},
    "conv": {"kernel": np.zeros((5, 7, 2, 3))},
}


def released(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"head.weight": (4, 3), "conv.weight": (3, 2, 5, 7)}
    shapes |= {f"net.{i}.proj.weight": (3, 2) for i in range(11)} | {f"net.{i}.proj.bias": (3,) for i in range(11)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_export_inverts_load(dtype):
    tensors = released(dtype)
    exported = weights.export(TABLE, weights.load(TABLE, SKELETON, tensors))
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor, strict=True)
        assert exported[name].flags.c_contiguous


def test_blocks_are_rows_in_numeric_order_and_kernels_are_transposed():
    tensors = released()
    params = weights.load(TABLE, SKELETON, tensors)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, SKELETON)
    np.testing.assert_array_equal(params["blocks"]["proj"]["kernel"][10], tensors["net.10.proj.weight"].T)
    np.testing.assert_array_equal(params["blocks"]["proj"]["bias"][2], tensors["net.2.proj.bias"])
    assert params["conv"]["kernel"][4, 6, 1, 2] == tensors["conv.weight"][2, 1, 4, 6]


def test_load_casts_and_skips_what_it_is_told_to():
    tensors = released() | {"position_ids": np.arange(3)}
    params = weights.load(TABLE, SKELETON, tensors, dtype=ml_dtypes.bfloat16, ignore=["position_ids"])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"net.3.proj.bias": None}, r"missing tensors: net\.3\.proj\.bias;"),
        ({"net.11.proj.bias": np.zeros(3)}, r"unexpected tensors: net\.11\.proj\.bias;"),
        ({"optional.weight": np.zeros(3)}, r"unexpected tensors: optional\.weight;"),
        ({"head.weight": np.zeros((3, 4))}, r"head\.weight has shape \(3, 4\).*expects \(4, 3\)"),
        ({"net.7.proj.weight": np.zeros((1, 2))}, r"net\.7\.proj\.weight has shape \(1, 2\).*expects \(3, 2\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    tensors = {name: tensor for name, tensor in (released() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        weights.load(TABLE, SKELETON, tensors)


class Headers(Mapping):
    """Tensors as their headers tell: there are no data to read. `asked` are the names that were looked at."""

    def __init__(self, tensors):
        self.structs = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in tensors.items()}
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return self.structs[name]

    def __iter__(self):
        return iter(self.structs)

    def __len__(self):
        return len(self.structs)


def test_everything_is_checked_before_data_are_read():
    assert weights.lazy_load(TABLE, SKELETON, Headers(released()))["head"]["kernel"].shape == (3, 4)
    last = {"net.10.proj.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"net\.10\.proj\.weight has shape"):
        weights.load(TABLE, SKELETON, Headers(released() | last))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn])
def test_quantised_weights_are_refused_whatever_else_is_there(tmp_path, dtype):
    tensors = released() | {"head.weight": np.zeros((4, 3), dtype), "head.SCB": np.zeros(4, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    message = rf"head\.weight of .*model\.safetensors is {np.dtype(dtype)}: quantised weights are not read, take bf16"
    with pytest.raises(ValueError, match=message):
        weights.load(TABLE, SKELETON, weights.read_safetensors(tmp_path))


def test_blocks_of_several_dtypes_need_one_to_be_given():
    tensors = released() | {"net.4.proj.bias": np.zeros(3, np.float16)}
    with pytest.raises(ValueError, match=r"net\.4\.proj\.bias is float16, and net\.0\.proj\.bias is float32: give"):
        weights.load(TABLE, SKELETON, tensors)
    assert weights.load(TABLE, SKELETON, tensors, dtype=np.float32)["blocks"]["proj"]["bias"].dtype == np.float32


@pytest.mark.parametrize(
    "index", [np.s_[:], np.s_[2:4], np.s_[9:, 1:2], np.s_[:, :, 1:3], np.s_[4:5, 0:1, 2:3], np.s_[3:3]]
)
def test_a_part_of_a_parameter_is_that_part_of_the_whole(index):
    tensors = released(ml_dtypes.bfloat16)
    whole = weights.load(TABLE, SKELETON, tensors)["blocks"]["proj"]["kernel"]
    part = weights.lazy_load(TABLE, SKELETON, tensors)["blocks"]["proj"]["kernel"][index]
    np.testing.assert_array_equal(part, whole[index], strict=True)


def test_a_part_of_a_parameter_needs_no_other_blocks():
    headers = Headers(released())
    leaf = weights.lazy_load(TABLE, SKELETON, headers)["blocks"]["proj"]["kernel"]
    headers.asked.clear()
    assert leaf[4:4].shape == (0, 2, 3) and headers.asked == []
    with pytest.raises(AttributeError, match="transpose"):
        leaf[7:9]
    assert headers.asked == ["net.7.proj.weight"]


def test_parts_of_fused_tensors():
    table = [
        *linear("qkv", "q", parts=slice(0, 1), of=4),
        *linear("qkv", "mlp", parts=slice(2, 4), of=4),
        *linear("last", "last", parts=slice(None, None, -1), of=2),
    ]
    skeleton = {name: {"kernel": np.zeros((5, d)), "bias": np.zeros(d)} for name, d in dict(q=3, mlp=6, last=8).items()}
    qkv, last = np.arange(60.0).reshape(12, 5), np.arange(40.0).reshape(8, 5)
    tensors = {"qkv.weight": qkv, "qkv.bias": qkv[:, 0], "last.weight": last, "last.bias": last[:, 0]}
    params = weights.load(table, skeleton, tensors)
    np.testing.assert_array_equal(params["q"]["kernel"], qkv[:3].T)
    np.testing.assert_array_equal(params["mlp"]["kernel"], qkv[6:].T)
    np.testing.assert_array_equal(params["last"]["bias"], np.concatenate([last[4:, 0], last[:4, 0]]))
    with pytest.raises(ValueError, match=r"qkv\.weight has shape \(9, 5\).*expects \(12, 5\)"):
        weights.load(table, skeleton, tensors | {"qkv.weight": qkv[:9]})
    with pytest.raises(ValueError, match=r"/kernel is a part of (qkv|last)\.weight: write"):
        weights.export(table, params)


def halves(x, head):
    """As the released order (x_2j, x_2j+1) of each head's channels becomes (x_j, x_j+d/2), one by one."""
    y = np.empty_like(x)
    for h in range(0, x.shape[-1], head):
        for j in range(head // 2):
            y[..., h + j], y[..., h + head // 2 + j] = x[..., h + 2 * j], x[..., h + 2 * j + 1]
    return y


ROTARY = [
    *linear("net.{i}.q", "blocks/q", rotary=6),
    Rule("net.{i}.norm", "blocks/norm", rotary=6),
    *linear("head", "head", bias=False),
]
HEADS = {"net.{i}.q.weight": (12, 5), "net.{i}.q.bias": (12,), "net.{i}.norm": (6,)}


def of_heads(dtype):
    rng = np.random.default_rng(1)
    shapes = {name.replace("{i}", str(i)): shape for name, shape in HEADS.items() for i in range(3)}
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in (shapes | {"head.weight": (4, 3)}).items()}
    blocks = {"q": {"kernel": np.zeros((3, 5, 12)), "bias": np.zeros((3, 12))}, "norm": np.zeros((3, 6))}
    return tensors, {"blocks": blocks, "head": {"kernel": np.zeros((3, 4))}}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rotary_pairs_of_neighbours_come_to_lie_half_a_head_apart_and_go_back(dtype):
    tensors, skeleton = of_heads(dtype)
    params = weights.load(ROTARY, skeleton, tensors)
    for i in range(3):
        q, norm = params["blocks"]["q"], params["blocks"]["norm"]
        np.testing.assert_array_equal(q["kernel"][i], halves(tensors[f"net.{i}.q.weight"].T, 6), strict=True)
        np.testing.assert_array_equal(q["bias"][i], halves(tensors[f"net.{i}.q.bias"], 6), strict=True)
        np.testing.assert_array_equal(norm[i], halves(tensors[f"net.{i}.norm"], 6), strict=True)
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["head.weight"].T)
    exported = weights.export(ROTARY, params)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor, strict=True)


@pytest.mark.parametrize("index", [np.s_[:], np.s_[1:], np.s_[1:, 2:4], np.s_[:, :, 3:8], np.s_[2:, :1, 5:], np.s_[3:]])
def test_a_part_of_rotary_channels_is_that_part_of_the_whole(index):
    tensors, skeleton = of_heads(ml_dtypes.bfloat16)
    lazy = weights.lazy_load(ROTARY, skeleton, tensors)
    whole = weights.load(ROTARY, skeleton, tensors)["blocks"]["q"]["kernel"]
    np.testing.assert_array_equal(lazy["blocks"]["q"]["kernel"][index], whole[index], strict=True)
    back = weights.reordered(ROTARY, lazy, weights.neighbours)
    theirs = np.stack([tensors[f"net.{i}.q.weight"].T for i in range(3)])
    np.testing.assert_array_equal(back["blocks"]["q"]["kernel"][index], theirs[index], strict=True)
    again = weights.reordered(ROTARY, back, weights.halves)
    np.testing.assert_array_equal(again["blocks"]["q"]["kernel"][index], whole[index], strict=True)


def test_rotary_channels_of_fused_tensors():
    tensors, _ = of_heads(np.float32)
    qkv = np.concatenate([np.zeros((12, 5)), tensors["net.1.q.weight"], np.zeros((12, 5))])
    table = linear("qkv", "q", bias=False, parts=slice(1, 2), of=3, rotary=6)
    kernel = weights.load(table, {"q": {"kernel": np.zeros((5, 12))}}, {"qkv.weight": qkv})["q"]["kernel"]
    np.testing.assert_array_equal(kernel, halves(tensors["net.1.q.weight"].T, 6))


ON_A_MESH = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mixgrpo_jax.models.io import weights
from tests.models.test_weights import SKELETON, TABLE, released

tensors = weights.read_safetensors("model.safetensors")
host = weights.load(TABLE, SKELETON, tensors)
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
specs = {
    "blocks": {"proj": {"kernel": P(None, "tensor"), "bias": P()}},
    "head": {"kernel": P(None, "fsdp")},
    "conv": {"kernel": P(None, None, "tensor")},
}
places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
for shardings in (places, NamedSharding(mesh, P())):
    params = weights.load(TABLE, SKELETON, tensors, shardings=shardings)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), jax.tree.map(np.asarray, params), host)
    expected = jax.tree.map(lambda _: shardings, params) if shardings is not places else places
    assert jax.tree.map(lambda a: a.sharding, params) == expected

asked = []
class Watched(dict):
    def __getitem__(self, name):
        asked.append(name)
        return super().__getitem__(name)
skeleton = {"w": np.zeros((8, 2))}
leaf = weights.lazy_load([weights.Rule("b.{i}", "w")], skeleton, Watched({f"b.{i}": np.ones(2) for i in range(8)}))
asked.clear()
weights.place(leaf, NamedSharding(mesh, P("fsdp")))
assert sorted(asked) == [f"b.{i}" for i in range(8)], "each block is read once, though two devices hold it"
"""


def test_parameters_stream_onto_a_mesh(tmp_path):
    weights.write_safetensors(tmp_path / "model.safetensors", released(ml_dtypes.bfloat16))
    run_program(ON_A_MESH, cwd=tmp_path, **virtual_devices(8))


@pytest.mark.parametrize("use", [lambda p: weights.load(TABLE, p, released()), lambda p: weights.export(TABLE, p)])
def test_a_parameter_without_a_rule_is_named(use):
    with pytest.raises(ValueError, match="no rule for tail/scale"):
        use(SKELETON | {"tail": {"scale": np.zeros(3)}})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_safetensors_round_trip(tmp_path, dtype):
    file = tmp_path / "model.safetensors"
    weights.write_safetensors(file, released(dtype))
    for read in (weights.read_safetensors(file), weights.read_safetensors(tmp_path)):
        assert set(read) == set(released())
        for name, tensor in released(dtype).items():
            np.testing.assert_array_equal(read[name], tensor, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert safe_open(file, framework="numpy").metadata() == {"format": "pt"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "model.safetensors"
    weights.write_safetensors(file, {"a": np.ones(2)}, metadata={"alpha": "8"})
    with pytest.raises(Exception, match="object"):
        weights.write_safetensors(file, {"a": np.array([object()])})
    np.testing.assert_array_equal(weights.read_safetensors(file)["a"], np.ones(2))
    assert safe_open(file, framework="numpy").metadata() == {"alpha": "8"}


def test_the_format_is_that_of_the_library(tmp_path):
    mixed = {
        "odd": np.arange(3, dtype=np.float16),
        "wide": np.arange(6.0).reshape(2, 3),
        "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
        "single": np.ones((1, 1), np.float32),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
    }
    weights.write_safetensors(tmp_path / "ours.safetensors", mixed)
    save_file(mixed, tmp_path / "theirs.safetensors")
    for read in (load_file(tmp_path / "ours.safetensors"), weights.read_safetensors(tmp_path / "theirs.safetensors")):
        assert read.keys() == mixed.keys()
        for name, tensor in mixed.items():
            np.testing.assert_array_equal(read[name], tensor, strict=True)


def test_shards_have_an_index_that_readers_follow(tmp_path):
    tensors = released()
    total = sum(tensor.nbytes for tensor in tensors.values())
    counted = []
    weights.write_shards(tmp_path, "model", tensors, shard_size=400, progress=counted.append)
    assert sum(counted) == total and len(counted) == len(tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"] == {"total_size": total}
    read = weights.read_safetensors(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor, strict=True)
        np.testing.assert_array_equal(load_file(tmp_path / index["weight_map"][name])[name], tensor, strict=True)
    small = [file for file in files if sum(t.nbytes for t in load_file(file).values()) <= 400]
    assert len(small) == 2, "only the one tensor of 840 bytes is in a larger one"


def test_one_shard_is_one_file(tmp_path):
    weights.write_shards(tmp_path, "model", released())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def damaged(file, how):
    data = file.read_bytes()
    header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]]

    def with_header(change):
        changed = header.replace(*change)
        assert changed != header
        return struct.pack("<Q", len(changed)) + changed + data[8 + len(header) :]

    file.write_bytes(
        {
            "cut in the data": lambda: data[:-5],
            "cut in the header": lambda: data[:40],
            "longer": lambda: data + b"0",
            "empty": lambda: b"",
            "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n",
            "no JSON": lambda: with_header((b'{"__', b'["__')),
            "other shape": lambda: with_header((b"[4, 3]", b"[4, 5]")),
            "other dtype": lambda: with_header((b'"F32"', b'"F4" ')),
        }[how]()
    )


@pytest.mark.parametrize(
    "how, message",
    [
        ("cut in the data", r"has \d+ bytes, and its header says \d+: download"),
        ("cut in the header", "cut short or no safetensors file: download"),
        ("longer", r"has \d+ bytes, and its header says \d+: download"),
        ("empty", r"\(0 bytes\) is cut short"),
        ("pointer", "cut short or no safetensors file: download"),
        ("no JSON", "its header is not JSON"),
        ("other shape", r"the header gives head\.weight other bytes than its shape needs"),
        ("other dtype", r" is F4, which is not supported: use weights in bf16 or fp32"),
    ],
)
def test_damaged_files_are_named(tmp_path, how, message):
    weights.write_shards(tmp_path, "model", released(), shard_size=400)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = tmp_path / index["weight_map"]["head.weight"]
    damaged(file, how)
    with pytest.raises(ValueError, match=rf"{file.name}.*{message}"):
        weights.read_safetensors(tmp_path)


def test_an_index_must_be_true(tmp_path):
    weights.write_shards(tmp_path, "model", released(), shard_size=400)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["head.bias"] = index["weight_map"]["head.weight"]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"says that model-.*\.safetensors holds head\.bias, which it does not"):
        weights.read_safetensors(tmp_path)
    (tmp_path / index["weight_map"]["head.bias"]).unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-.*\.safetensors, which is not there"):
        weights.read_safetensors(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    file = tmp_path / "diffusion_pytorch_model.bin"
    file.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is pickled.*safe_serialization=True"):
            weights.read_safetensors(path)


def test_a_prefix_selects(tmp_path):
    weights.write_safetensors(tmp_path / "model.safetensors", {"a.x": np.ones(2), "b.x": np.zeros(3)})
    read = weights.read_safetensors(tmp_path, prefix="a.")
    assert list(read) == ["x"]
    np.testing.assert_array_equal(read["x"], np.ones(2))


def test_a_folder_needs_its_config(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*config\.json: give a model's folder"):
        weights.read_config(tmp_path, {})


def test_a_folder_must_hold_one_set_of_weights(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        weights.read_safetensors(tmp_path)
    for name in ("model.safetensors", "ema.safetensors"):
        weights.write_safetensors(tmp_path / name, {"a": np.zeros(1)})
    with pytest.raises(ValueError, match=r"found ema\.safetensors, model\.safetensors"):
        weights.read_safetensors(tmp_path)


@pytest.mark.parametrize(
    "index, shard",
    [
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
        ("model.fp16.safetensors.index.json", "model-0000{}-of-00002.fp16.safetensors"),
    ],
)
def test_a_variant_is_read_in_place_of_the_main_file_and_not_beside_it(tmp_path, index, shard):
    shards = {name: shard.format(k) for k, name in ((1, "a"), (2, "b"))}
    for name, file in shards.items():
        weights.write_safetensors(tmp_path / file, {name: np.full(1, 16, np.float16)})
    (tmp_path / index).write_text(json.dumps({"weight_map": shards}))

    def read():
        return {name: (str(tensor.dtype), tensor.item()) for name, tensor in weights.read_safetensors(tmp_path).items()}

    assert read() == {"a": ("float16", 16), "b": ("float16", 16)}
    weights.write_safetensors(tmp_path / "model.bf16.safetensors", {"a": np.full(1, 3, ml_dtypes.bfloat16)})
    assert read() == {"a": ("bfloat16", 3)}
    weights.write_shards(tmp_path, "model", {"a": np.zeros(2), "b": np.ones(1)}, shard_size=16)
    assert weights.read_safetensors(tmp_path).keys() == {"a", "b"} and len(list(tmp_path.glob("model-*"))) >= 2
    assert {tensor.dtype for tensor in weights.read_safetensors(tmp_path).values()} == {np.dtype(np.float64)}
