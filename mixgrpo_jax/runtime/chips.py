"""TPUs by kind: what a device of them computes, holds and moves, and slices that can be had."""

import math
from typing import NamedTuple

from mixgrpo_jax.runtime.metrics import PEAK_FLOPS


class Chip(NamedTuple):
    """A JAX device: a chip, and of tpu7x one of a chip's two cores.

    `hbm` is what a program may fill, by the compiler. The other figures are Google Cloud's: peak dense bf16 FLOP/s, the
    memory's bytes/s, and the bytes/s that a device receives when all its links are busy, half of the bidirectional
    bandwidth. `slices` grow from the smallest to the largest of one pod that is tried.
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


def chip(topology: str) -> Chip:
    """The chip of a slice "KIND:AxB[xC]". Raises ValueError for an unknown kind."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not shape:
        raise ValueError(f"topology={topology!r}: give KIND:AxB[xC], as v5p:4x4x4, with KIND one of {', '.join(CHIPS)}")
    return CHIPS[kind]


def size(topology: str) -> int:
    """Chips of a slice "KIND:AxB[xC]"."""
    return math.prod(int(side) for side in topology.partition(":")[2].split("x"))
