"""The device mesh, and where each array lies on it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# an ordered list of (regex over a parameter's path, spec); the first that matches decides
Rules = Sequence[tuple[str, PartitionSpec]]


def virtual_devices(count: int) -> dict[str, str]:
    """Environment variables with which a process has so many devices on a CPU.

    XLA's concurrent scheduler can deadlock collectives on virtual devices; it is off.
    """
    flags = f"--xla_force_host_platform_device_count={count} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None, samples: int | None = None
) -> Mesh:
    """A mesh with axes data, fsdp, context, tensor, of size 1 where `sizes` does not say.

    One size may be -1: it takes the devices that the others leave. Where context or tensor is -1 beside data or fsdp,
    this one takes as many as `samples` divide over, and that one the rest. On several slices data spans them, and the
    other axes stay inside one.

    Raises:
      ValueError: sizes that do not fill the devices, or a size of data that is no multiple of the slices.
    """
    devices = list(devices or jax.devices())
    shape = [sizes.get(axis, 1) for axis in AXES]
    if shape.count(-1) == 2 and shape.index(-1) < 2 and samples:
        left = len(devices) // int(np.prod(shape))
        ways = max(1, -shape[0] * shape[1])
        fits = (n for n in range(left, 0, -1) if left % n == 0 and samples % (n * ways) == 0)
        shape[shape.index(-1)] = next(fits, left)
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = len(devices) // max(1, -int(np.prod(shape)))
    if min(shape) < 1 or np.prod(shape) != len(devices):
        asked = ", ".join(f"mesh.{axis}={sizes.get(axis, 1)}" for axis in AXES)
        raise ValueError(f"{asked} do not fill {len(devices)} devices; set one axis to -1 to fill")
    # GPUs number their hosts so, and any axis may span them.
    slices = len({device.slice_index for device in devices}) if hasattr(devices[0], "slice_index") else 1
    slices = slices if devices[0].platform == "tpu" else 1
    if shape[0] % slices:
        raise ValueError(
            f"mesh.data={shape[0]} is no multiple of the {slices} slices, which no other axis spans: choose "
            f"mesh.data={slices}"
        )
    # A slice's own axes may have to be split: tensor=2 of v5p's 4x4x4, say.
    if slices > 1:
        inside, across = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_fsdp(mesh: Mesh, fsdp: int) -> Mesh:
    """The same devices with a shorter axis fsdp, whose parts are each on neighbours: a gather, and no exchange.

    What is left of the axis is called copies, and cuts nothing. Raises ValueError where `fsdp` does not divide it.
    """
    data, old, *rest = mesh.devices.shape
    if old % fsdp:
        raise ValueError(f"mesh.rollout_fsdp={fsdp} does not divide mesh.fsdp={old}: choose a divisor")
    axes = (*AXES[:2], "copies", *AXES[2:])
    return Mesh(mesh.devices.reshape(data, fsdp, old // fsdp, *rest), axes, axis_types=(AxisType.Auto,) * len(axes))


def without_context(mesh: Mesh) -> Mesh:
    """The same devices with the axis context as the inner part of fsdp, so that parameters lie where they were."""
    data, fsdp, context, tensor = mesh.devices.shape
    return Mesh(mesh.devices.reshape(data, fsdp * context, 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def seen(x: jax.Array) -> jax.Array:
    """An array of another mesh of the same devices as one of the mesh that is set; it lies where it lay."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * x.ndim))


def describe(mesh: Mesh, rollout_fsdp: int) -> str:
    """A mesh in words."""
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"mesh of {mesh.size} devices: {axes}; in rollouts, parameters in fsdp={rollout_fsdp} parts"


def path_name(path: tuple) -> str:
    """A tree path as text: ('blocks', 'kernel') -> "blocks/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf, by the first rule whose regex is found in the leaf's path.

    Optimiser states and averages repeat the parameters' paths, so the same rules place them. A dimension that its axes
    do not divide is left whole; a leaf that no rule matches is replicated.
    """

    def place(path, leaf):
        name = path_name(path)
        spec = next((spec for regex, spec in rules if re.search(regex, name)), PartitionSpec())
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def _fit(spec, shape, mesh):
    if len(spec) > len(shape):
        return PartitionSpec()
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
    fits = [size % int(np.prod([mesh.shape[a] for a in names])) == 0 for names, size in zip(axes, shape)]
    return PartitionSpec(*(axis if fit else None for axis, fit in zip(spec, fits)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """Parts that samples are spread over: devices along data and fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, size: int, axis: int = 0) -> NamedSharding:
    """Samples over the batch axes of the mesh, where `size` of them divide; otherwise replicated."""
    spec = PartitionSpec(*[None] * axis, BATCH[0])
    return NamedSharding(mesh, spec if size % batch_ways(mesh) == 0 else PartitionSpec())


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B, ...] by `batch_sharding`. Host arrays, identical on all processes, are sharded.

    Each process uploads its slice.
    """

    def place(a):
        sharding = batch_sharding(mesh, len(a))
        return a if isinstance(a, jax.Array) else jax.make_array_from_callback(a.shape, sharding, lambda i: a[i])

    return jax.tree.map(place, tree)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays of the host, which every process has whole, as arrays that every device has whole."""
    whole = replicated(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, whole, lambda i: a[i]), tree)


def placed(tree: Any, places: Any) -> Any:
    """The shapes of a tree with its shardings, as ahead-of-time compilation takes them."""
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree, places)


def bytes_per_device(tree: Any) -> float:
    """Bytes that a tree of sharded arrays, or of their shapes, takes on each device."""
    sizes = (math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
    return float(sum(sizes))
