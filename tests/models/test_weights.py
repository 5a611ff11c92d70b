import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from mixgrpo_jax.models import weights
from mixgrpo_jax.models.weights import Rule, linear

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


def test_shards_are_found_by_their_index(tmp_path):
    weights.write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"a": np.zeros(1)})
    weights.write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {"b": np.ones(2)})
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    tensors = weights.read_safetensors(tmp_path)
    assert len(tensors) == 2
    np.testing.assert_array_equal(tensors["b"], np.ones(2))


def test_a_folder_must_hold_one_set_of_weights(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        weights.read_safetensors(tmp_path)
    for name in ("model.safetensors", "model.fp16.safetensors"):
        weights.write_safetensors(tmp_path / name, {"a": np.zeros(1)})
    with pytest.raises(ValueError, match=r"found model\.fp16\.safetensors, model\.safetensors"):
        weights.read_safetensors(tmp_path)
