"""Where activations and parameters lie on a mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")
TOKEN_AXES = ("context",)
HEAD_AXES = ("tensor",)

# Column-parallel into a block, row-parallel out of it; everything else is only cut by fsdp and context. The first axis
# of a block's parameter is the block's index, over which the scan runs: it stays whole.
CUT = ("fsdp", "context")
RULES = (  # of the names that our models share
    (r"blocks/(.*/)?(q|k|v|qkv_mlp|mlp_in|mlp_gate|modulation)/kernel", P(None, CUT, "tensor")),
    (r"blocks/(.*/)?(q|k|v|qkv_mlp|mlp_in|mlp_gate|modulation)/bias", P(None, "tensor")),
    (r"blocks/(.*/)?(attention_out|mlp_out|out)/kernel", P(None, ("tensor", *CUT))),
    (r"linear_1/kernel", P(CUT, "tensor")),
    (r"linear_2/kernel", P("tensor", CUT)),
    (r"embedding", P(CUT, None)),
    (r"blocks/.*/a$", P(None, CUT, None)),  # adapters
    (r"blocks/.*/b$", P(None, None, CUT)),
)


def spread(tree: Any) -> Any:
    """Arrays [B, S, ...] laid out on `jax.set_mesh`'s mesh: samples over its axes data and fsdp, tokens over context.

    Axes that do not divide their dimension are left out. Left alone, a compiler that sees parameters cut along the
    inner axis of a product may keep them where they are, let every device compute all samples, and add the parts up.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def place(x: jax.Array) -> jax.Array:
        spec = [dividing(mesh, axes, size) or P.UNCONSTRAINED for axes, size in zip((BATCH_AXES, TOKEN_AXES), x.shape)]
        rest = [P.UNCONSTRAINED] * (x.ndim - len(spec))
        return jax.lax.with_sharding_constraint(x, P(*spec, *rest))

    return tree if mesh.empty else jax.tree.map(place, tree)


def one_by_one(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function` of samples [B, ...], one of each device's at a time: it holds no more than one needs."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape[axis] for axis in dividing(mesh, BATCH_AXES, len(x)))
    turns = jnp.moveaxis(x.reshape(ways, -1, *x.shape[1:]), 1, 0)
    y = jax.lax.map(lambda samples: function(spread(samples)), turns)
    return jnp.moveaxis(y, 0, 1).reshape(len(x), *y.shape[2:])


def dividing(mesh: AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those of the axes that the mesh has and the compiler is left, if together they divide size; else none."""
    axes = tuple(axis for axis in axes if axis in mesh.shape and axis not in mesh.manual_axes)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
