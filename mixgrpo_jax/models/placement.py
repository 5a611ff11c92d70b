"""Where activations lie on a mesh."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def spread(tree: Any) -> Any:
    """Arrays [B, ...] with their samples over the axes data and fsdp of `jax.set_mesh`'s mesh, where these divide B.

    Left alone, a compiler that sees parameters cut along the inner axis of a product may keep them where they are, let
    every device compute all samples, and add the parts up.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def place(x: jax.Array) -> jax.Array:
        axes = dividing(mesh, BATCH_AXES, x.shape[0])
        rest = [P.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, P(axes, *rest)) if axes else x

    return jax.tree.map(place, tree)


def dividing(mesh: AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those of the axes that the mesh has, if together they divide size; else none."""
    axes = tuple(axis for axis in axes if axis in mesh.shape)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
