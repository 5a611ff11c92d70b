"""Products with a layer's kernel, whole or cut over devices: it is gathered where it is used."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models.nn.placement import BATCH_AXES, CUT, RULES, TOKEN_AXES, dividing

Cut = tuple[tuple[str, ...], ...]  # the mesh's axes that cut each of an array's
TOGETHER = 32  # devices that a gather takes in one step


def joined(parts: tuple[jax.Array, ...], kernel: Any) -> jax.Array:
    """The product of parts [..., d], which are not joined along the last axis, and a kernel [d_in, d_out]."""
    if not isinstance(kernel, jax.Array | np.ndarray):
        return kernel.joined(*parts)
    return functools.reduce(jnp.add, (x @ w for x, w in zip(parts, _rows(kernel, parts))))


def tokens_last(x: jax.Array, kernel: Any) -> jax.Array:
    """[B, S, d_in] by a kernel [d_in, d_out] -> [B, d_out, S]."""
    if not isinstance(kernel, jax.Array | np.ndarray):
        return kernel.tokens_last(x)
    return jnp.matmul(kernel.T, x.swapaxes(1, 2))


def gathered(block: Any, dtype: Any, reduce_dtype: Any) -> Any:
    """A block's parameters as its products read them: in their dtype, and cut over the axis tensor alone.

    Each kernel is gathered once, where its block runs. Left alone, a compiler cuts each product into as many small ones
    as the kernel has parts, and sends these around. A kernel's gradient is summed over devices in `reduce_dtype`, and
    each device receives its part of the sum alone; None is of a program without gradients, where parameters have few
    parts if any, whatever the mesh says.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return block

    def gather(path: Any, leaf: jax.Array) -> Any:
        name = "blocks/" + "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        spec = next((spec for regex, spec in RULES if re.search(regex, name)), P(None))
        axes = [(a,) if isinstance(a, str) else a or () for a in spec[1:]]
        used = (dividing(mesh, a, size) for a, size in zip(axes, leaf.shape))
        cut = tuple(tuple(axis for axis in a if mesh.shape[axis] > 1) for a in used)
        kernel, read = name.endswith("kernel/value"), re.search("(kernel|bias)/value$", name)
        own = dtype if read and leaf.dtype == jnp.float32 else leaf.dtype
        cuts = reduce_dtype is not None and mesh.shape.get("tensor", 1) == 1
        if kernel and cuts and leaf.dtype in (jnp.float32, jnp.bfloat16):
            return CutKernel(leaf, cut, own, reduce_dtype)
        return jax.lax.with_sharding_constraint(leaf.astype(own), _whole(cut))

    return jax.tree_util.tree_map_with_path(gather, block)


def _whole(cut: Cut) -> P:
    return P(*(tuple(axis for axis in axes if axis not in CUT) for axes in cut))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CutKernel:
    """A kernel [d_in, d_out] cut over fsdp and context, as an operand of products that gather it; see `gathered`."""

    leaf: jax.Array
    cut: Cut = dataclasses.field(metadata=dict(static=True))
    dtype: Any = dataclasses.field(metadata=dict(static=True))
    reduce_dtype: Any = dataclasses.field(metadata=dict(static=True))

    __array_ufunc__ = None  # a NumPy array on the left leaves the product to __rmatmul__

    def __getitem__(self, index: Any) -> "CutKernel":
        if index is not Ellipsis:
            raise TypeError(f"a cut kernel has no part [{index}]: see `joined`")
        return self

    def astype(self, dtype: Any) -> "CutKernel":
        """The kernel as products in dtype read it."""
        return dataclasses.replace(self, dtype=dtype)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.joined(x)

    def joined(self, *parts: jax.Array) -> jax.Array:
        """[part, ...] @ kernel, with parts [..., d] that are not joined: [..., d_out]."""
        return _product(parts, self.leaf, self.cut, self.dtype, self.reduce_dtype, False)

    def tokens_last(self, x: jax.Array) -> jax.Array:
        """[B, S, d_in] -> [B, d_out, S]."""
        return _product((x,), self.leaf, self.cut, self.dtype, self.reduce_dtype, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _product(parts: Any, leaf: jax.Array, cut: Cut, dtype: Any, reduce_dtype: Any, last: bool) -> jax.Array:
    return _product_forward(parts, leaf, cut, dtype, reduce_dtype, last)[0]


def _product_forward(parts: Any, leaf: jax.Array, cut: Cut, dtype: Any, reduce_dtype: Any, last: bool) -> Any:
    kernel = _gather(leaf.astype(dtype), cut)
    y = tokens_last(parts[0], kernel) if last else joined(parts, kernel)
    return y, (parts, kernel, jnp.zeros(0, leaf.dtype))


def _product_backward(cut: Cut, dtype: Any, reduce_dtype: Any, last: bool, kept: Any, gradient: jax.Array) -> Any:
    parts, kernel, like = kept
    if last:
        gradient = gradient.swapaxes(1, 2)
    of_parts = tuple(gradient @ w.T for w in _rows(kernel, parts))
    return of_parts, _summed(parts, gradient, cut, reduce_dtype).astype(like.dtype)


_product.defvjp(_product_forward, _product_backward)


def _rows(kernel: Any, parts: Any) -> list[jax.Array]:
    """The rows that meet each part."""
    ends = np.cumsum([x.shape[-1] for x in parts])
    return [kernel[end - x.shape[-1] : end] for x, end in zip(parts, ends)]


def _gather(kernel: jax.Array, cut: Cut) -> jax.Array:
    """The whole kernel [d_in, d_out] on each device.

    Over more devices than `TOGETHER` in steps, see `_steps`: in one, a TPU's compiler would make it an all-reduce.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = [name for axes in cut for name in axes]
    if math.prod(mesh.shape[name] for name in names) <= TOGETHER or set(names) & set(mesh.manual_axes):
        return jax.lax.with_sharding_constraint(kernel, _whole(cut))

    left = set(mesh.axis_names) - set(mesh.manual_axes)

    def on_device(part: jax.Array) -> jax.Array:
        for axis, axes in enumerate(cut):
            for name in reversed(axes):
                for groups in reversed(_steps(mesh.shape[name])):
                    part = jax.lax.all_gather(part, name, axis=axis, axis_index_groups=groups, tiled=True)
        return part

    return jax.shard_map(on_device, in_specs=P(*cut), out_specs=_whole(cut), axis_names=left, check_vma=False)(kernel)


def _summed(parts: Any, gradient: jax.Array, cut: Cut, dtype: Any) -> jax.Array:
    """A kernel's gradient [d_in, d_out], cut: each device's own sum, then one over devices that leaves it its part."""
    mesh = jax.sharding.get_abstract_mesh()
    batch = dividing(mesh, BATCH_AXES, len(gradient))
    tokens = dividing(mesh, TOKEN_AXES, gradient.shape[1]) if gradient.ndim == 3 else ()

    def own(parts: Any, gradient: jax.Array) -> jax.Array:
        inner = tuple(range(gradient.ndim - 1))
        sums = [
            jax.lax.dot_general(x, gradient, ((inner, inner), ((), ())), preferred_element_type=dtype) for x in parts
        ]
        return jnp.concatenate(sums) if len(sums) > 1 else sums[0]

    def on_device(parts: Any, gradient: jax.Array) -> jax.Array:
        total, axes = own(parts, gradient), set(batch + tokens)
        for axis, names in enumerate(cut):
            for name in names:  # devices that share samples have the same sums
                part = _scattered if name in axes else _part
                total = part(total, name, mesh.shape[name], axis)
        axes -= {name for names in cut for name in names}
        return jax.lax.psum(total, tuple(sorted(axes))) if axes else total

    spread_over = P(batch, tokens) if tokens else P(batch)
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    given: Any = dict(in_specs=(spread_over, spread_over), out_specs=P(*cut), axis_names=left, check_vma=False)
    return jax.shard_map(on_device, **given)(parts, gradient)


def _part(x: jax.Array, name: str, size: int, axis: int) -> jax.Array:
    """Each device's part of x along an array's axis."""
    length = x.shape[axis] // size
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * length, length, axis)


def _scattered(x: jax.Array, name: str, size: int, axis: int) -> jax.Array:
    """The sum of x over a mesh axis, of which each device keeps its part along an array's axis.

    In steps, see `_steps`: in one, a TPU's compiler would have every device receive the whole sum.
    """
    for groups in _steps(size):
        x = jax.lax.psum_scatter(x, name, scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return x


def _steps(size: int) -> list[list[list[int]] | None]:
    """The groups of a mesh axis over which a sum is scattered: those far apart, and then neighbours."""
    near = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0) if size > 4 else size
    devices = np.arange(size).reshape(-1, near)
    return [
        None if groups.shape[1] == size else groups.tolist() for groups in (devices.T, devices) if groups.shape[1] > 1
    ]
