"""A small model's speed on a TPU as counts, by the compiler: a layout or a sharding that costs a third is seen here."""

import json
import os

import pytest

from tests.python import run_program

pytest.importorskip("libtpu", reason="the TPU's compiler is in libtpu")

# Of an evaluation with two single-stream blocks alone, with two double-stream ones as well, and of that one's gradient.
# On v5p:2x2x1 with fsdp=4: the least share of products in all cycles, and at most so many collectives by kind, and GiB
# received a device. Tighten them when a program gets better. Sizes are whole tiles; libtpu 0.0.42.1.
BOUNDS = {
    "single": {"products": 0.55, "all-gather": 17, "all-reduce": 2, "collective-permute": 0, "GiB": 0.046},
    "evaluate": {"products": 0.46, "all-gather": 45, "all-reduce": 2, "collective-permute": 0, "GiB": 0.152},
    "gradient": {"products": 0.47, "all-gather": 90, "reduce-scatter": 40, "all-reduce": 8, "collective-permute": 12}
    | {"GiB": 0.65},
}

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from mixgrpo_jax import estimate
from mixgrpo_jax.models.flux import model
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.nn import attention
from mixgrpo_jax.runtime import hlo, schedule, mesh as meshes

mesh = meshes.make_mesh({"fsdp": 4}, estimate.slice_devices("v5p:2x2x1"))
sizes = dict(num_attention_heads=8, attention_head_dim=128, axes_dims_rope=(16, 56, 56), in_channels=64)
sizes |= dict(joint_attention_dim=512, guidance_embeds=False)
config = model.flux_small(**sizes, num_layers=0 if sys.argv[1] == "single" else 2)
params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
params = meshes.placed(params, meshes.shardings(params, FAMILY.rules, mesh))
ids = jnp.stack(jnp.indices((1, 28, 32)), -1).reshape(-1, 3)

def rows(*shape):
    return jax.ShapeDtypeStruct((8, *shape), jnp.bfloat16, sharding=meshes.batch_sharding(mesh, 8))

def evaluate(params, x, text, pooled, remat="none"):
    options = dict(dtype=jnp.bfloat16, attention="splash", remat=remat)
    return model.apply(config, params, x, 0.5, text, pooled, None, ids, **options)

def gradient(params, *inputs):
    return jax.grad(lambda params: jnp.square(evaluate(params, *inputs, remat="block")).mean())(params)

with jax.set_mesh(mesh):
    function = gradient if sys.argv[1] == "gradient" else evaluate
    lowered = jax.jit(function).lower(params, rows(896, 64), rows(128, 512), rows(128))
text = lowered.compile().as_text()
cycles, cost = schedule.read(text).cycles, hlo.cost(text, kernel=attention.kernel_flops)
counts = {kind: count for kind, (count, _) in cost.collectives.items()}
print(json.dumps(counts | {"products": cycles["products"] / sum(cycles.values()), "GiB": cost.moved / 2**30}))
"""
LIBRARY = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # others may be compiling, too


@pytest.mark.parametrize(
    "name", ["single", *(pytest.param(n, marks=pytest.mark.slow) for n in ("evaluate", "gradient"))]
)
def test_products_take_their_share_and_weights_are_gathered_once_a_use(name):
    assert "JAX_OPTIMIZATION_LEVEL" not in os.environ, "cycles are those of the default level"
    found = json.loads(run_program(PROGRAM, name, JAX_PLATFORMS="cpu", **LIBRARY))
    bounds = dict(BOUNDS[name])
    assert found["products"] >= bounds.pop("products"), found
    assert all(found.get(kind, 0) <= most for kind, most in bounds.items()), found


SLICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mixgrpo_jax import estimate
from mixgrpo_jax.runtime import hlo, schedule, chips

devices = sorted(estimate.slice_devices("2xv5p:2x2x1"), key=lambda device: device.slice_index)
mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "fsdp"))
rows = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
summed = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P("fsdp")))
text = summed.lower(rows).compile().as_text()
cost = hlo.cost(text)
print(cost.across / 2**20, cost.moved / 2**20, schedule.read(text).seconds(chips.chip("2xv5p:2x2x1"))["waiting across"])
"""


def test_what_two_slices_exchange_is_told_apart():
    """Each of four chips sums its quarter of 4 MiB with its like in the other slice, over the slower network."""
    across, inside, seconds = map(float, run_program(SLICES, JAX_PLATFORMS="cpu", **LIBRARY).split())
    assert across == 1 and inside >= 3
    assert seconds == pytest.approx(2**20 / 6.25e9)
