import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.models.nn.placement import spread
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program

ON_EIGHT = """
import functools
import jax, jax.numpy as jnp
from mixgrpo_jax.models import flux
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.nn import placement
from mixgrpo_jax.models.nn.patches import image_ids
from mixgrpo_jax.runtime import hlo, mesh as meshes
mesh = meshes.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
config = flux.flux_small()
shapes = jax.eval_shape(functools.partial(flux.init, config), jax.random.key(0))
params = meshes.placed(shapes, meshes.shardings(shapes, FAMILY.rules, mesh))

def apply(params, x, text, pooled):
    return flux.apply(config, params, x, 0.5, text, pooled, 3.5, image_ids(2, 12))

def array(*shape):
    return jax.ShapeDtypeStruct((16, *shape), jnp.float32)

with jax.set_mesh(mesh):
    lowered = jax.jit(apply).lower(params, array(24, 96), array(12, 128), array(128))
cost = hlo.cost(lowered.compile().as_text())
print(8 * cost.flops / (16 * flux.flops(config, 24, 12)))

seen = []
def square(x):
    seen.append(len(x))
    return x * x

x = jnp.arange(72.0).reshape(24, 3)
with jax.set_mesh(mesh):
    decode = jax.jit(functools.partial(placement.one_by_one, square), out_shardings=meshes.batch_sharding(mesh, 24))
    compiled = decode.lower(jax.device_put(x, meshes.batch_sharding(mesh, 24))).compile()
    for n in (24, 7):  # that divide over the devices, or not
        assert (jax.jit(functools.partial(placement.one_by_one, square))(x[:n]) == x[:n] ** 2).all()
assert seen == [8, 8, 1], seen
assert not hlo.cost(compiled.as_text()).collectives
"""


def test_each_device_computes_its_own_samples_and_may_take_them_one_by_one():
    assert 0.99 < float(run_program(ON_EIGHT, **virtual_devices(8))) < 1.03


def test_without_a_mesh_nothing_moves():
    x = {"a": jnp.ones((3, 2)), "b": jnp.arange(3)}
    jax.tree.map(np.testing.assert_array_equal, jax.jit(spread)(x), x)
