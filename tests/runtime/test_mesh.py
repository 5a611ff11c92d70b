from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models import flux
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.nn.placement import CUT
from mixgrpo_jax.runtime import mesh as meshes


class FakeMesh:
    """Sizes are all that the rules look at."""

    def __init__(self):
        self.shape = {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}


def specs(tree, monkeypatch):
    monkeypatch.setattr(meshes, "NamedSharding", lambda mesh, spec: spec)
    placed = meshes.shardings(tree, FAMILY.rules, FakeMesh())
    leaves = jax.tree_util.tree_leaves_with_path(placed, is_leaf=lambda x: isinstance(x, P))
    return {meshes.path_name(path): spec for path, spec in leaves}


def test_every_large_parameter_of_flux_is_cut_by_fsdp(monkeypatch):
    tree = jax.eval_shape(lambda: flux.init(flux.flux1_dev(), jax.random.key(0)))
    shapes = {meshes.path_name(p): a.shape for p, a in jax.tree_util.tree_leaves_with_path(tree)}
    placed = specs(tree, monkeypatch)
    for name, shape in shapes.items():
        if name.endswith("kernel") and min(shape[-2:]) >= 256:
            axes = [axis for axes in placed[name] if axes for axis in ((axes,) if isinstance(axes, str) else axes)]
            assert {*CUT, "tensor"} <= set(axes), name
    assert placed["double_blocks/image/attention/q/kernel"] == P(None, CUT, "tensor")
    assert placed["single_blocks/out/kernel"] == P(None, ("tensor", *CUT))
    assert placed["single_blocks/attention/q_norm/scale"] == P()


def test_a_dimension_that_does_not_divide_stays_whole(monkeypatch):
    tree = {"blocks": {"q": {"kernel": jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)}}}
    assert specs(tree, monkeypatch)["blocks/q/kernel"] == P(None, None, "tensor")


def test_sizes_must_fill_the_devices():
    assert dict(meshes.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}).shape)["fsdp"] == 1
    with pytest.raises(
        ValueError, match=r"mesh.data=1, mesh.fsdp=3, mesh.context=1, mesh.tensor=1 do not fill .* set one axis to -1"
    ):
        meshes.make_mesh({"data": 1, "fsdp": 3, "tensor": 1})


def tpus(count, slices=1):
    """Chips of v5e slices, in a row each."""
    return [
        SimpleNamespace(
            id=i,
            platform="tpu",
            device_kind="TPU v5 lite",
            coords=(i % (count // slices), 0, 0),
            core_on_chip=0,
            process_index=i // 4,
            slice_index=i // (count // slices),
        )
        for i in range(count)
    ]


def arranged(monkeypatch, *args):
    monkeypatch.setattr(meshes, "Mesh", lambda grid, axes, axis_types: grid)
    return meshes.make_mesh(*args)


@pytest.mark.parametrize(
    ("sizes", "samples", "shape"),
    [
        (dict(fsdp=-1, tensor=-1), 96, (1, 8, 1, 1)),
        (dict(fsdp=-1, tensor=-1), 12, (1, 4, 1, 2)),
        (dict(fsdp=-1, context=-1), 12, (1, 4, 2, 1)),
        (dict(data=2, fsdp=-1, tensor=-1), 12, (2, 2, 1, 2)),
        (dict(data=-1, tensor=-1), 3, (1, 1, 1, 8)),
        (dict(data=-1), 3, (8, 1, 1, 1)),
    ],
)
def test_tensor_takes_what_samples_do_not_divide_over(monkeypatch, sizes, samples, shape):
    assert arranged(monkeypatch, sizes, tpus(8), samples).shape == shape


def test_data_alone_spans_slices(monkeypatch):
    grid = arranged(monkeypatch, dict(data=4, fsdp=2, tensor=2), tpus(16, slices=2))
    by_data = [{device.slice_index for device in row.flat} for row in grid]
    assert by_data == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match=r"mesh.data=1 is no multiple of the 2 slices, .* choose mesh.data=2"):
        arranged(monkeypatch, dict(fsdp=-1), tpus(16, slices=2))


def test_a_shorter_fsdp_keeps_the_devices_in_their_order():
    mesh = SimpleNamespace(devices=np.arange(16).reshape(2, 4, 1, 2))
    with pytest.raises(ValueError, match=r"mesh.rollout_fsdp=3 does not divide mesh.fsdp=4: choose a divisor"):
        meshes.with_fsdp(mesh, 3)
    one = meshes.make_mesh({})
    assert dict(meshes.with_fsdp(one, 1).shape) == dict(one.shape) | {"copies": 1}
