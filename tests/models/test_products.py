from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program

ON_EIGHT = """
import functools
import jax, jax.numpy as jnp, numpy as np
from mixgrpo_jax.models import flux, lora
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.models.nn.patches import image_ids
from mixgrpo_jax.runtime import hlo, mesh as meshes

config = flux.flux_small()
rng = np.random.default_rng(0)
params = jax.tree.map(lambda p: rng.normal(size=p.shape, scale=0.05).astype(np.float32), flux.init(config, jax.random.key(0)))
x, text, pooled = (rng.normal(size=(8, *size)).astype(np.float32) for size in ((24, 96), (12, 128), (128,)))
options = LoraConfig(rank=4).on(FAMILY.targets)
adapters = jax.tree.map(lambda a: a + 0.05, lora.init(options, params, jax.random.key(1)))
base = lora.freeze(params, "int8")

def loss(params, dtype="float32"):
    v = flux.apply(config, params, x, 0.5, text, pooled, 3.5, image_ids(2, 12), remat="dots", reduce_dtype=jnp.dtype(dtype))
    return jnp.square(v).mean()

def adapted(adapters):
    return loss(lora.attach(base, adapters, 0.5))

def distance(a, b):
    a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

alone = [jax.jit(jax.grad(f))(p) for f, p in ((loss, params), (adapted, adapters))]
for sizes in ({"data": 2, "fsdp": 4}, {"fsdp": 4, "context": 2}, {"fsdp": 2, "tensor": 4}):
    mesh = meshes.make_mesh({"data": 1} | sizes)
    with jax.set_mesh(mesh):
        for f, p, expected in ((loss, params, alone[0]), (adapted, adapters, alone[1])):
            place = meshes.shardings(p, FAMILY.rules, mesh)
            program = jax.jit(jax.grad(f), out_shardings=place).lower(jax.device_put(p, place)).compile()
            assert distance(program(jax.device_put(p, place)), expected) < 1e-5, (sizes, f)
            if f is loss and "tensor" not in sizes:
                counts = hlo.cost(program.as_text()).collectives
                kernels = 2 * (2 * 7 + 6)  # of all blocks
                print(counts["reduce-scatter"][0] / kernels, counts["all-gather"][0] / kernels)
"""


def test_gradients_on_a_mesh_are_those_of_one_device_and_each_kernel_is_reduced_once():
    for line in run_program(ON_EIGHT, **virtual_devices(8)).splitlines():
        scattered, gathers = map(float, line.split())
        assert scattered == 1
        assert gathers <= 3  # a pass, the pass that is recomputed, and what is not a kernel
