import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixgrpo_jax.models import flux, lora
from mixgrpo_jax.models.flux.model import FluxConfig
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.lora import Int8Kernel, LoraConfig
from mixgrpo_jax.models.nn.layers import Linear
from mixgrpo_jax.models.nn.patches import image_ids
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program

WIDTH, BLOCKS = 16, 3


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = Linear(4 * WIDTH, WIDTH, bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Net(nnx.Module):
    """Built as the models are: stacked blocks under a scan, between layers of their own."""

    def __init__(self, rngs):
        self.head = Linear(8, WIDTH, rngs=rngs)
        self.blocks = jax.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(rngs.params(), BLOCKS))

    def __call__(self, x):
        body = jax.checkpoint(lambda x, block: (block(x), None), prevent_cse=False)
        return jax.lax.scan(body, self.head(x), self.blocks)[0]


GRAPHDEF = nnx.split(jax.eval_shape(lambda: Net(nnx.Rngs(0))))[0]
EVERY = LoraConfig(rank=3, alpha=7.5, targets=".*")


def net(params, x):
    return nnx.merge(GRAPHDEF, params)(x)


run = jax.jit(net)


def randomised(shapes, seed, std=1.0):
    """Every leaf random, with the variance of its fan-in: zeros, as fresh adapters have them, would hide errors."""
    rng = np.random.default_rng(seed)

    def normal(path, leaf):
        fan_in = leaf.shape[-1 if path[-1].key in ("bias", "scale") else -2]
        return rng.normal(size=leaf.shape, scale=std * fan_in**-0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(normal, shapes)


@functools.cache
def net_params():
    return randomised(jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(0))))), 0)


def trained(config, params):
    """Adapters as after training."""
    return randomised(jax.eval_shape(functools.partial(lora.init, config), params, jax.random.key(0)), 1, std=0.4)


def x():
    return np.random.default_rng(2).normal(size=(2, 5, 8)).astype(np.float32)


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("targets", ["blocks/up", ".*"])
def test_fresh_adapters_change_nothing(targets):
    config = LoraConfig(rank=3, targets=targets)
    fresh = lora.init(config, net_params(), jax.random.key(0))
    np.testing.assert_array_equal(run(lora.attach(net_params(), fresh, config.scale), x()), run(net_params(), x()))
    assert lora.attach(net_params(), {}, config.scale) == net_params()


@pytest.mark.parametrize("scheme, std", [("gaussian", 1 / 8), ("kaiming_uniform", (3 * 64) ** -0.5)])
def test_adapters_are_random_in_a_and_zero_in_b(scheme, std):
    shapes = {"block": {"q": {"kernel": jax.ShapeDtypeStruct((5, 64, 48), jnp.bfloat16)}}}
    fresh = lora.init(LoraConfig(8, targets="block/q", init=scheme), shapes, jax.random.key(0))["block"]["q"]
    assert (fresh["a"].shape, fresh["b"].shape) == ((5, 64, 8), (5, 8, 48))
    assert fresh["a"].dtype == fresh["b"].dtype == jnp.float32
    assert fresh["a"].std() == pytest.approx(std, rel=0.05)
    assert not fresh["b"].any()


def test_a_layers_random_numbers_do_not_depend_on_the_other_targets():
    square = {name: {"kernel": np.zeros((8, 8))} for name in "qkv"}
    one, many = (lora.init(LoraConfig(4, targets=t), square, jax.random.key(3)) for t in ("k", ".*"))
    np.testing.assert_array_equal(one["k"]["a"], many["k"]["a"])
    assert (many["k"]["a"] != many["q"]["a"]).all()


def test_attached_adapters_equal_merged_ones():
    adapters = trained(EVERY, net_params())
    expected = run(lora.merge(net_params(), adapters, EVERY.scale), x())
    assert relative_error(run(net_params(), x()), expected) > 0.1
    assert relative_error(run(lora.attach(net_params(), adapters, EVERY.scale), x()), expected) < 1e-5


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.grad, has_aux=True)
def gradients(adapters, combine, base):
    y = net(combine(base, adapters, EVERY.scale), x())
    return jnp.mean(y**2), y


@pytest.mark.parametrize("base", lora.BASES)
def test_gradients_are_those_of_the_dense_formula(base):
    frozen = lora.freeze(net_params(), base)
    dense_base = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), frozen, is_leaf=lambda leaf: isinstance(leaf, Int8Kernel)
    )
    adapters = trained(EVERY, net_params())
    (low_rank, y), (dense, expected) = (
        gradients(adapters, *args) for args in ((lora.attach, frozen), (lora.merge, dense_base))
    )
    assert relative_error(y, expected) < 1e-5
    assert jax.tree.structure(low_rank) == jax.tree.structure(adapters)
    assert all(np.abs(leaf).max() > 0 and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low_rank))
    assert max(jax.tree.leaves(jax.tree.map(relative_error, low_rank, dense))) < 1e-5


def test_the_first_step_trains_b_alone():
    fresh = lora.init(EVERY, net_params(), jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(fresh, lora.attach, net_params())[0]):
        assert leaf.any() == (path[-1].key == "b")


def test_the_product_is_in_the_activations_dtype():
    adapted = lora.attach(net_params(), trained(EVERY, net_params()), EVERY.scale)
    kernel = adapted["head"]["kernel"]
    assert (jnp.asarray(x(), jnp.bfloat16) @ kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(x() @ kernel, jnp.asarray(x()) @ kernel, rtol=1e-5, atol=1e-5)
    assert 1e-4 < relative_error(run(adapted, x().astype(jnp.bfloat16)), run(adapted, x())) < 0.05


@pytest.mark.parametrize("base, dtype", [("float32", np.float32), ("bfloat16", jnp.bfloat16), ("int8", np.float32)])
def test_merge_adds_in_fp32_and_keeps_the_dtype(base, dtype):
    config = LoraConfig(rank=3, alpha=6, targets="blocks/up")
    frozen, adapters = lora.freeze(net_params(), base), trained(config, net_params())
    merged = lora.merge(frozen, adapters, config.scale)
    assert merged["head"]["kernel"] is frozen["head"]["kernel"]
    kernel, pair = frozen["blocks"]["up"]["kernel"].astype(np.float32), adapters["blocks"]["up"]
    exact = kernel + 2 * pair["a"].astype(np.float64) @ pair["b"]
    assert merged["blocks"]["up"]["kernel"].dtype == dtype
    np.testing.assert_allclose(merged["blocks"]["up"]["kernel"], exact.astype(dtype), rtol=1e-5, atol=1e-6)


def test_sharded_adapters_give_the_same_result():
    code = """
        import jax
        from jax.sharding import NamedSharding, PartitionSpec as P
        from mixgrpo_jax.models import lora
        from tests.models import test_lora as t

        def place(path, leaf):
            spec = P(None, "fsdp", "tensor") if leaf.ndim == 3 and min(leaf.shape[1:]) > 1 else P()
            return NamedSharding(mesh, spec)

        mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        adapters = t.trained(t.LoraConfig(4, targets=".*"), t.net_params())
        whole = lora.attach(lora.freeze(t.net_params(), "int8"), adapters, 2.0)
        sharded = jax.device_put(whole, jax.tree_util.tree_map_with_path(place, whole))
        assert len(sharded["blocks"]["up"]["kernel"].base.values.sharding.device_set) == 4
        print(t.relative_error(t.run(sharded, t.x()), t.run(whole, t.x())))
    """
    assert float(run_program(code, **virtual_devices(4))) < 1e-5


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_int8_rounds_to_half_a_step_and_takes_a_byte(place):
    params = jax.tree.map(place, net_params())
    frozen = lora.freeze(params, "int8")
    for layer in ("up", "down"):
        kernel, quantised = (np.asarray(params["blocks"][layer]["kernel"]), frozen["blocks"][layer]["kernel"])
        step = np.abs(kernel).max(axis=1, keepdims=True) / 127
        assert (np.abs(quantised.astype(np.float32) - kernel) <= 0.5001 * step).all()
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(quantised)) == kernel.size + 4 * kernel[:, 0].size
    for layer, name in (("head", "kernel"), ("head", "bias")):
        assert frozen[layer][name].dtype == jnp.bfloat16
        assert isinstance(frozen[layer][name], type(params[layer][name]))


def test_int8_keeps_the_result_and_zero_columns():
    exact = run(net_params(), x())
    assert 1e-4 < relative_error(run(lora.freeze(net_params(), "int8"), x()), exact) < 0.01
    zeros = {"blocks": {"kernel": np.zeros((2, 8, 4), np.float32)}}
    np.testing.assert_array_equal(lora.freeze(zeros, "int8")["blocks"]["kernel"].astype(np.float32), 0)


def test_int8_does_not_mind_the_order_of_channels():
    kernel = np.random.default_rng(3).normal(size=(2, 8, 12)).astype(np.float32)
    ours, theirs = (
        lora.freeze({"kernel": order(kernel, 6)}, "int8")["kernel"] for order in (weights.halves, lambda x, _: x)
    )
    np.testing.assert_array_equal(ours.values, weights.halves(theirs.values, 6))
    np.testing.assert_array_equal(ours.scale, weights.halves(theirs.scale, 6))
    np.testing.assert_array_equal(ours.astype(np.float32), weights.halves(theirs.astype(np.float32), 6))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": -1}, "lora.rank=-1"),
        ({"alpha": 0}, "lora.alpha=0"),
        ({"targets": "(q"}, r"lora.targets='\(q' is not a regular expression"),
        ({"init": "orthogonal"}, "lora.init='orthogonal'.*kaiming_uniform"),
        ({"base": "int4"}, "lora.base='int4'.*int8"),
        ({"init_from": "style"}, "lora.init_from='style' with model.lora.rank=0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_targets_that_match_nothing_and_foreign_adapters_are_named():
    with pytest.raises(ValueError, match=r"lora.targets='attn.to_q' matches no layer; there are blocks/.*, head"):
        lora.init(LoraConfig(4, targets="attn.to_q"), net_params(), jax.random.key(0))
    foreign = {"joint_blocks": {"q": {"a": np.zeros((4, 2)), "b": np.zeros((2, 4))}}}
    for combine in (lora.attach, lora.merge):
        with pytest.raises(ValueError, match="joint_blocks/q"):
            combine(net_params(), foreign, 1.0)
    with pytest.raises(ValueError, match="base='int4'"):
        lora.freeze(net_params(), "int4")


CONFIG = FluxConfig(
    in_channels=20,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
TABLE = flux.TRANSFORMER.table(CONFIG)
ATTENTION = LoraConfig(rank=4, alpha=8).on(FAMILY.targets)
ATTENTION_HEADS = ("attention/q", "attention/k", "attention/v")
Q = "single_transformer_blocks.1.attn.to_q"

apply = jax.jit(flux.apply, static_argnums=0, static_argnames="remat")


@functools.cache
def params():
    return randomised(jax.eval_shape(functools.partial(flux.init, CONFIG), jax.random.key(0)), 0)


@functools.cache
def adapters(config):
    return trained(config, params())


@functools.cache
def inputs():
    rng = np.random.default_rng(2)
    shapes = dict(x=(2, 6, CONFIG.in_channels), text=(2, 5, CONFIG.joint_attention_dim))
    shapes["pooled"] = (2, CONFIG.pooled_projection_dim)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    scalars = dict(timestep=np.float32([0.9375, 0.125]), guidance=np.full(2, 3.5, np.float32))
    return arrays | scalars | {"image_ids": np.asarray(image_ids(2, 3))}


def velocity(config):
    return apply(CONFIG, lora.merge(params(), adapters(config), config.scale), **inputs())


def test_default_targets_are_the_attention_projections_of_flux():
    layers = {f"double_blocks/{s}/{p}" for s in ("image", "text") for p in ("attention_out", *ATTENTION_HEADS)}
    layers |= {f"single_blocks/{p}" for p in ATTENTION_HEADS}
    found = jax.tree_util.tree_leaves_with_path(adapters(ATTENTION))
    assert {"/".join(key.key for key in path[:-1]) for path, _ in found} == layers


@pytest.mark.parametrize("config, remat", [(ATTENTION, "none"), (EVERY, "block")])
def test_flux_takes_adapted_parameters(config, remat):
    attached = lora.attach(params(), adapters(config), config.scale)
    assert relative_error(apply(CONFIG, params(), **inputs()), velocity(config)) > 0.1
    assert relative_error(apply(CONFIG, attached, **inputs(), remat=remat), velocity(config)) < 1e-5
