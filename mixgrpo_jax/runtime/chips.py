"""TPUs by kind: what a device of them computes, holds and moves, and slices that can be had."""

import math
import re
from typing import NamedTuple

import jax

from mixgrpo_jax.runtime.metrics import PEAK_FLOPS


class Chip(NamedTuple):
    """A JAX device: a chip, and of tpu7x one of a chip's two cores.

    `flops` are peak dense bf16 FLOP/s, and `clock` Hz, at which the compiler's cycles make that peak: its estimates of
    a plain product come to 90% to 98% of it (benchmarks/RESULTS.md). `hbm` is what a program may fill, by the compiler.
    The other figures are Google Cloud's: the memory's bytes/s; the bytes/s that a device receives with all its links
    busy, half of the bidirectional bandwidth; and its part of the data-centre network between slices in bytes/s, the
    page of each kind's "DCN bandwidth per chip" or pod (v4's is v5p's: no figure is given). `slices` grow from the
    smallest to the largest of one pod that is tried.
    """

    flops: float
    clock: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    slices: tuple[str, ...]


GIB, GB, GHZ = 2.0**30, 1e9, 1e9
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS = {
    "v4": Chip(PEAK_FLOPS["TPU v4"], 1.05 * GHZ, 30.75 * GIB, 1228 * GB, 300 * GB, 6.25 * GB, CUBES),
    "v5e": Chip(PEAK_FLOPS["TPU v5 lite"], 1.5 * GHZ, 15.75 * GIB, 819 * GB, 200 * GB, 3.125 * GB, SQUARES),
    "v5p": Chip(PEAK_FLOPS["TPU v5p"], 1.75 * GHZ, 95.73 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, CUBES),
    "v6e": Chip(PEAK_FLOPS["TPU v6 lite"], 1.75 * GHZ, 31.24 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, SQUARES),
    "tpu7x": Chip(PEAK_FLOPS["TPU7x"], 2.2 * GHZ, 94.74 * GIB, 3690 * GB, 300 * GB, 6.25 * GB, CUBES),
}


# What `jax.Device.device_kind` calls them.
NAMES = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def memory(device: jax.Device) -> float | None:
    """Bytes of a device that a program may fill, of a TPU that is not here too; None on a CPU."""
    if name := NAMES.get(device.device_kind):
        return CHIPS[name].hbm
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None


def parse(topology: str) -> tuple[int, str, str]:
    """(slices, kind, shape) of "[Nx]KIND:AxB[xC]": N slices of a shape, 1 by default.

    >>> parse("v5e:4x8"), parse("2xv5p:4x4x4")
    ((1, 'v5e', '4x8'), (2, 'v5p', '4x4x4'))

    Raises ValueError for another form, or an unknown kind.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)+)", topology)
    if not found or found[2] not in CHIPS:
        raise ValueError(
            f"topology={topology!r}: give [Nx]KIND:AxB[xC], as v5p:4x4x4 or 2xv5p:4x4x4, with KIND one of "
            f"{', '.join(CHIPS)}"
        )
    return int(found[1] or 1), found[2], found[3]


def chip(topology: str) -> Chip:
    """The chip of slices "[Nx]KIND:AxB[xC]". Raises ValueError for another form, or an unknown kind."""
    return CHIPS[parse(topology)[1]]


def size(topology: str) -> int:
    """Chips of slices "[Nx]KIND:AxB[xC]", all together. Raises ValueError for another form, or an unknown kind."""
    slices, _, shape = parse(topology)
    return slices * math.prod(int(side) for side in shape.split("x"))
