"""The clock that `estimate` takes seconds by: what share of a chip's peak a plain product reaches, alone on it.

    TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu python -m benchmarks.clock

Compiles bf16 products of the shapes below for each kind of TPU, without one, and prints FLOPs over what the compiler's
cycles at the kind's clock take of peak.
"""

import jax
import jax.numpy as jnp

from mixgrpo_jax.estimate import slice_devices
from mixgrpo_jax.runtime import chips, schedule

SHAPES = ((4096, 3072, 12288), (2048, 3072, 12288), (4096, 4096, 4096), (8192, 8192, 8192))
ROOM = {
    "xla_tpu_scoped_vmem_limit_kib": "65536"
}  # of vector memory for a product's tiles, which is more than by default


def of_peak(kind: str, shape: tuple[int, int, int], options: dict[str, str] | None = None) -> float:
    """Share of a chip's peak that a bf16 product [m, k] x [k, n], shape = (m, k, n), takes by the compiler's cycles."""
    chip = chips.CHIPS[kind]
    place = jax.sharding.SingleDeviceSharding(slice_devices(f"{kind}:{chip.slices[0]}")[0])
    m, k, n = shape
    left, right = (jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=place) for size in ((m, k), (k, n)))
    text = jax.jit(jnp.matmul).lower(left, right).compile(options).as_text()
    return 2 * m * k * n / (chip.flops * schedule.read(text).seconds(chip)["total"])


def main() -> None:  # noqa: D103
    print("| kind | clock, GHz |", *(f"{' x '.join(map(str, shape))} |" for shape in SHAPES), "the first, more room |")
    print("|" + "---|" * (len(SHAPES) + 3))
    for kind, chip in chips.CHIPS.items():
        shares = [of_peak(kind, shape) for shape in SHAPES] + [of_peak(kind, SHAPES[0], ROOM)]
        print(f"| {kind} | {chip.clock / 1e9:g} |", *(f"{share:.1%} |" for share in shares), flush=True)


if __name__ == "__main__":
    main()
