"""Families whose guidance is inside the velocity: the same on a mesh, and no sample changes its device."""

import json
import pkgutil

import jax
import jax.numpy as jnp
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.models import families
from mixgrpo_jax.runtime.mesh import virtual_devices
from mixgrpo_jax.tasks.signs.data import build_tokenizer
from tests.python import run_program

ON_EIGHT = """
import json, pkgutil, sys, types
import jax, jax.numpy as jnp, numpy as np
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.runtime import hlo, mesh as meshes

name, small, changes, guidance, meshes_of_eight = json.loads(sys.argv[1])
family = pkgutil.resolve_name(f"mixgrpo_jax.models.{name}.policy:FAMILY")
changes = {field: tuple(value) if isinstance(value, list) else value for field, value in changes.items()}
transformer = pkgutil.resolve_name(f"mixgrpo_jax.models.{name}:{small}")(**changes)
parts = Parts(family, family.small() | {"transformer": transformer})
options = dict(image_size=(16, 60), dtype="float32", text_length=12, attention="xla", reduce_dtype="float32")
policy = family.make(parts, types.SimpleNamespace(**options, guidance=guidance, negative_prompt="", remat="dots"))
rng = np.random.default_rng(0)
normal = lambda shape, scale=1.0: rng.normal(size=shape.shape, scale=scale).astype(np.float32)
shapes = jax.eval_shape(lambda key: family.transformer.init(transformer, key), jax.random.key(0))
params = jax.tree.map(lambda leaf: normal(leaf, 0.05), shapes)
x = normal(np.empty((8, *policy.latent_shape)))
cond = jax.tree.map(normal, policy.cond_shapes(8))

def loss(params, x, cond):
    return jnp.square(policy.velocity(params, x, 0.5, cond)).mean()

fast = {"xla_backend_optimization_level": 0}
alone = jax.jit(jax.grad(loss), compiler_options=fast)(params, x, cond)
for sizes in meshes_of_eight:
    mesh = meshes.make_mesh({"data": 1} | sizes)
    with jax.set_mesh(mesh):
        place, batch = meshes.shardings(params, family.rules, mesh), meshes.batch_sharding(mesh, 8)
        placed = jax.device_put(params, place), *jax.device_put((x, cond), batch)
        program = jax.jit(jax.grad(loss), out_shardings=place, compiler_options=fast).lower(*placed).compile()
        gradients, worst = program(*placed), 0.0
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone)):
            worst = max(worst, float(jnp.abs(ours - theirs).max() / (jnp.abs(theirs).max() + 1e-6)))
        assert worst < 1e-4, (sizes, worst)
        if "data" in sizes:
            print(hlo.cost(program.as_text()).collectives.get("all-to-all", (0, 0))[0])
"""

SD3 = "sd3", "sd3_small", dict(num_layers=3, dual_attention_layers=(0,)), 4.5, ({"fsdp": 4, "context": 2},)
FLUX2 = "flux2", "flux2_small", dict(num_layers=1, num_single_layers=1), 4.0, ({"fsdp": 2, "context": 2, "tensor": 2},)


@pytest.mark.parametrize(
    "name, small, changes, guidance, others", [SD3, pytest.param(*FLUX2, marks=pytest.mark.slow)], ids=["sd3", "flux2"]
)
def test_guided_gradients_on_a_mesh_are_those_of_one_device_and_no_sample_moves(name, small, changes, guidance, others):
    given = json.dumps([name, small, changes, guidance, [{"data": 2, "fsdp": 4}, *others]])
    assert float(run_program(ON_EIGHT, given, **virtual_devices(8))) == 0


@pytest.mark.parametrize("name", ["sd3", "flux2"])
def test_the_small_family_draws_without_a_vae(name):
    family, prompts = pkgutil.resolve_name(f"mixgrpo_jax.models.{name}.policy:FAMILY"), ["a red sign", "a blue sign"]
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 32
    parts = families.Parts(family, family.small(), dict.fromkeys(family.encoders.values(), tokenizer))
    policy = family.make(parts, configs.resolve(configs.base()).model)
    shapes = families.shapes(parts, text=True)
    cond = jax.eval_shape(policy.features, shapes, policy.tokenize(prompts))
    v = jax.eval_shape(policy.velocity, shapes["transformer"], jnp.zeros((2, *policy.latent_shape)), 0.5, cond)
    assert v.shape == (2, *policy.latent_shape)
