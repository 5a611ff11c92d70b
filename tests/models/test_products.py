from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program

ON_EIGHT = """
import functools
import jax, jax.numpy as jnp, numpy as np
from mixgrpo_jax.models import flux, lora
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.models.nn import products
from mixgrpo_jax.models.nn.patches import image_ids
from mixgrpo_jax.runtime import hlo, mesh as meshes

config = flux.flux_small()
rng = np.random.default_rng(0)
shapes = flux.init(config, jax.random.key(0))
params = jax.tree.map(lambda p: rng.normal(size=p.shape, scale=0.05).astype(np.float32), shapes)
x, text, pooled = (rng.normal(size=(8, *size)).astype(np.float32) for size in ((23, 96), (12, 128), (128,)))
options = LoraConfig(rank=4).on(FAMILY.targets)
adapters = jax.tree.map(lambda a: a + 0.05, lora.init(options, params, jax.random.key(1)))
base = lora.freeze(params, "int8")

def loss(params, dtype="float32"):
    ids, own = image_ids(1, 23), dict(remat="dots", reduce_dtype=jnp.dtype(dtype))
    v = flux.apply(config, params, x, 0.5, text, pooled, 3.5, ids, **own)
    return jnp.square(v).mean()

def adapted(adapters):
    return loss(lora.attach(base, adapters, 0.5))

def distance(a, b):
    a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

alone = [jax.jit(jax.grad(f))(p) for f, p in ((loss, params), (adapted, adapters))]
for sizes in ({"data": 2, "fsdp": 4}, {"fsdp": 4, "context": 2}, {"fsdp": 2, "tensor": 4}):
    mesh = meshes.make_mesh({"data": 1} | sizes)
    products.TOGETHER = 4  # so that a gather along fsdp and context takes a step for each
    with jax.set_mesh(mesh):
        for f, p, expected in ((loss, params, alone[0]), (adapted, adapters, alone[1])):
            place = meshes.shardings(p, FAMILY.rules, mesh)
            program = jax.jit(jax.grad(f), out_shardings=place).lower(jax.device_put(p, place)).compile()
            assert distance(program(jax.device_put(p, place)), expected) < 1e-5, (sizes, f)
            if f is loss and "tensor" not in sizes:
                counts = hlo.cost(program.as_text()).collectives
                print(counts["reduce-scatter"][0], counts["all-gather"][0], counts["all-reduce"][0])
"""

KERNELS, MODULATIONS = 2 * 14 + 2 * 6, 2 * 2 + 2 * 1  # of two blocks of each kind


def test_gradients_on_a_mesh_are_those_of_one_device_and_each_kernel_is_reduced_once():
    lines = run_program(ON_EIGHT, **virtual_devices(8)).splitlines()
    over_data, over_context = ([float(n) for n in line.split()] for line in lines)
    # Along fsdp, and along context where tokens are cut: a modulation has none.
    assert (over_data[0], over_context[0]) == (KERNELS, 2 * KERNELS - MODULATIONS)
    for steps, (_, gathers, sums) in enumerate((over_data, over_context), 1):
        assert gathers < 3 * steps * KERNELS  # a pass, the pass that is recomputed, and what is no kernel
        assert sums < KERNELS / 2  # of biases and norms, together
