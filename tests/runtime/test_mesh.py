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
            assert CUT in placed[name] and "tensor" in placed[name], name
    assert placed["double_blocks/image/attention/q/kernel"] == P(None, CUT, "tensor")
    assert placed["single_blocks/out/kernel"] == P(None, "tensor", CUT)
    assert placed["single_blocks/attention/q_norm/scale"] == P()


def test_a_dimension_that_does_not_divide_stays_whole(monkeypatch):
    tree = {"blocks": {"q": {"kernel": jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)}}}
    assert specs(tree, monkeypatch)["blocks/q/kernel"] == P(None, None, "tensor")


def test_sizes_must_fill_the_devices():
    assert dict(meshes.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}).shape)["fsdp"] == 1
    with pytest.raises(
        ValueError, match=r"mesh data=1, fsdp=3, context=1, tensor=1 does not fill .* set one axis to -1"
    ):
        meshes.make_mesh({"data": 1, "fsdp": 3, "tensor": 1})


def test_a_shorter_fsdp_keeps_the_devices_in_their_order():
    mesh = SimpleNamespace(devices=np.arange(16).reshape(2, 4, 1, 2))
    with pytest.raises(ValueError, match=r"mesh.rollout_fsdp=3 does not divide mesh.fsdp=4: choose a divisor"):
        meshes.with_fsdp(mesh, 3)
    one = meshes.make_mesh({})
    assert dict(meshes.with_fsdp(one, 1).shape) == dict(one.shape) | {"copies": 1}
