"""What the compiler is asked for beside its defaults, by the kind of device, and where its programs are kept.

Options go with each program.
"""

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from mixgrpo_jax.runtime.files import absolute, in_bucket, place, replaced

Options = dict[str, str | bool]

TPU: Options = {
    # No loop of small products in place of a gather and one product: cut 32 ways, each has so few rows that most of the
    # matrix unit idles, and the whole result is read and written once a part. In MiB, from where on it is done.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Gathers run beside products, in steps of several fusions; by default each is waited for.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
}
# What a fusion may take of the fast memory, for larger tiles; 16 MiB by default, or 32. By the compiler's cycles a
# normalised product and its way back take 8% less on v5e, 12% on v5p, 15% on v6e, 11% on tpu7x; more memory is no gain.
VMEM: Options = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
GPU: Options = {
    # Collectives run beside what does not wait for them.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # In a scan over blocks, too: a block's weights are gathered while the one before it computes.
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
}

# By what `jax.Device.device_kind` begins with; the first that does decides.
KINDS: dict[str, Options] = {
    "TPU v4": TPU,  # which has 16 MiB of it
    "TPU v5 lite": TPU | VMEM,
    "TPU v5": TPU | VMEM,
    "TPU v6 lite": TPU | VMEM,
    "TPU7x": TPU
    | VMEM
    | {
        # With it on, libtpu 0.0.42 aborts on FLUX.1's sharded update.
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "false",
    },
}


KEPT_FROM = 0.1  # seconds of compiling from which a program is kept: smaller ones are made sooner than fetched


def keep_beside(workdir: str | os.PathLike) -> None:
    """Keep compiled programs in jax_cache/ beside a workdir, unless JAX_COMPILATION_CACHE_DIR says where.

    Must come before the first is compiled. Any number of processes and runs may share the folder.
    """
    _write_whole()
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    workdir = absolute(workdir)
    beside = workdir if str(workdir.parent).endswith("://") else workdir.parent
    jax.config.update("jax_compilation_cache_dir", str(beside / "jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM)
    if in_bucket(workdir):  # XLA's own files beside them know no buckets
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _write_whole() -> None:
    """Have JAX write programs whole: a part that a kill leaves would be met by every later run, and never mended."""
    with contextlib.suppress(ImportError):  # a later JAX may have them elsewhere
        from jax._src import compilation_cache
        from jax._src.lru_cache import LRUCache

        class Whole(LRUCache):
            def put(self, key: str, value: bytes) -> None:
                path = place(self.path) / f"{key}-cache"
                if self.eviction_enabled:
                    super().put(key, value)
                elif not path.exists():
                    with replaced(path) as draft:
                        draft.write_bytes(value)

        compilation_cache.LRUCache = Whole  # type: ignore[misc]


def options(devices: Iterable[jax.Device]) -> Options:
    """`compiler_options` for `jax.jit` of programs on these devices, all of a kind: none on a CPU.

    The devices need not be here. What this version of the compiler does not know is left out, and a warning names it.
    """
    devices = list(devices)
    own = (device for device in devices if device.process_index == jax.process_index())
    return dict(_known(next(own, devices[0])))


def describe(devices: Iterable[jax.Device]) -> str:
    """The options as a line of text."""
    devices = list(devices)
    flags = ", ".join(f"{name}={value}" for name, value in options(devices).items())
    return f"compiler options for {devices[0].device_kind}: {flags or 'its defaults'}"


@functools.cache
def _known(device: jax.Device) -> Options:
    """The options of the device's kind with which a trivial program compiles."""
    by_kind = next((found for kind, found in KINDS.items() if device.device_kind.startswith(kind)), {})
    result = dict(GPU if device.platform == "gpu" else by_kind)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    while result:
        try:
            jax.jit(jnp.negative, compiler_options=result).lower(scalar).compile()
            break
        except jax.errors.JaxRuntimeError as error:
            refused = next((name for name in result if re.search(rf"\b{name}\b", str(error))), None)
            if "INVALID_ARGUMENT" not in str(error) or refused is None:
                raise
            warnings.warn(
                f"{device.device_kind}'s compiler does not take {refused}={result.pop(refused)}", stacklevel=2
            )
    return result
