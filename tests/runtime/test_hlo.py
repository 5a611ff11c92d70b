import jax
import jax.numpy as jnp
import pytest

from mixgrpo_jax.runtime import hlo
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_a_scans_products_count_as_often_as_they_run():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    cost = hlo.cost(compiled(scanned, (8, 32), (5, 32, 32)))
    assert cost.flops == 5 * 2 * 8 * 32 * 32
    assert cost.bytes == 5 * 4 * (8 * 32 + 32 * 32 + 8 * 32)
    assert cost.collectives == {}


def test_nested_scans_and_batched_products():
    def inner(x, w):
        return jnp.einsum("bij,bjk->bik", x, w), None

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, w)[0], None), x, length=3)[0]

    assert hlo.cost(compiled(outer, (4, 16, 16), (2, 4, 16, 16))).flops == 3 * 2 * 2 * 4 * 16**3


def gated(x, w, count):
    def step(x, element):
        i, w = element
        return jax.lax.cond(i < count[0], lambda x: jnp.tanh(x @ w), lambda x: x, x), None

    return jax.lax.scan(step, x, (jnp.arange(5), w))[0]


def test_a_gates_branch_counts_by_its_share():
    text = compiled(gated, (8, 32), (5, 32, 32), (1,))
    assert hlo.cost(text, [0.4]).flops == 2 * 2 * 8 * 32 * 32
    assert hlo.cost(text).flops == 5 * 2 * 8 * 32 * 32
    with pytest.raises(ValueError, match="has 1 conditionals, and shares are given for 2"):
        hlo.cost(text, [0.4, 0.4])


def test_a_loop_that_data_end_is_refused():
    text = compiled(lambda x, n: jax.lax.while_loop(lambda c: c.sum() < n[0], lambda c: c * 2, x), (4,), (1,))
    with pytest.raises(ValueError, match="has no constant trip count"):
        hlo.cost(text)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_counts_the_elements_under_its_window(stride):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (stride,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    side = (9 - 3) // stride + 1
    assert hlo.cost(compiled(convolve, (2, 9, 9, 4), (3, 3, 4, 8))).flops == 2 * 2 * side**2 * 9 * 4 * 8


# A TPU has no batched products: the batch is a spatial axis whose window meets one element at each place, and the trip
# count has to be read from the loop: here from 1 to 15 by steps of 2.
TPU = """
%body (p: (s32[], bf16[2,16,4,64])) -> (s32[], bf16[2,16,4,64]) {
  %p = (s32[]{:T(128)}, bf16[2,16,4,64]{3,1,2,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[2,16,4,64]{3,1,2,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %y = bf16[2,4,16,16]{3,2,1,0} convolution(%x, %x), window={WINDOW}, dim_labels=0b1f_0o1i->01bf
  %start = (bf16[2,16,4,64]{3,1,2,0}, bf16[8,16,4,64]{3,1,2,0}) all-gather-start(%x), GROUPS, dimensions={0}
  %done = bf16[8,16,4,64]{3,1,2,0} all-gather-done(%start)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %result = (s32[]{:T(128)}, bf16[2,16,4,64]{3,1,2,0:T(8,128)(2,1)}) tuple(%next, %x)
}
%condition (p: (s32[], bf16[2,16,4,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(15)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}
ENTRY %main (x: bf16[2,16,4,64]) -> (s32[], bf16[2,16,4,64]) {
  %x = bf16[2,16,4,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %init = (s32[]{:T(128)}, bf16[2,16,4,64]{3,1,2,0:T(8,128)(2,1)}) tuple(%start, %x)
  ROOT %loop = (s32[]{:T(128)}, bf16[2,16,4,64]{3,1,2,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body
}
""".replace("WINDOW", "size=2x4 stride=1x3 lhs_dilate=2x4").replace("GROUPS", "replica_groups=mesh['a'=2,'b'=4] {'b'}")


def test_the_way_a_tpu_writes_it():
    cost = hlo.cost(TPU)
    assert cost.flops == 7 * 2 * (2 * 4) * 16 * 16 * 64
    assert cost.collectives == {"all-gather": (7, 7 * 3 * 2 * 2 * 16 * 4 * 64)}


ON_EIGHT = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from mixgrpo_jax.runtime import hlo, mesh as meshes
mesh = meshes.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})

def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

whole = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P("fsdp")))
cost = hlo.cost(whole.lower(array(64, 32), array(32, 16)).compile().as_text())
assert cost.flops == 2 * 8 * 32 * 16, cost
assert cost.collectives == {"all-gather": (1, 4 * 32 * 16 * 7 / 8)}, cost
summed = jax.jit(lambda x: x.sum(0), out_shardings=meshes.replicated(mesh))
cost = hlo.cost(summed.lower(array(64, 32)).compile().as_text())
assert cost.collectives == {"all-reduce": (1, 2 * 4 * 32 * 7 / 8)}, cost
"""


def test_collectives_over_eight_devices():
    run_program(ON_EIGHT, **virtual_devices(8))
