import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from mixgrpo_jax.models import flux
from mixgrpo_jax.models.nn import attention as module
from mixgrpo_jax.models.nn.attention import attention, block_size
from mixgrpo_jax.models.nn.remat import REMAT, rematerialise
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.python import run_program

FLUX = flux.flux_small(num_layers=3, num_single_layers=5)  # numbers that tell the stacked residuals apart
WIDTH, HEADS = FLUX.width, FLUX.num_attention_heads


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel, run by the CPU."""
    kernel = functools.partial(module.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(module.splash, "make_splash_mha", kernel)


def rows(length, heads=2, dim=16, batch=2, dtype=np.float32):
    rng = np.random.default_rng(length)
    return tuple(rng.normal(size=(batch, length, heads, dim)).astype(dtype) for _ in range(3))


def values_and_gradients(inputs, **options):
    """Attention, and the gradient of its squared norm / 2, a loss that weighs every row."""

    @jax.jit
    def program(q, k, v):
        y, pull = jax.vjp(functools.partial(attention, **options), q, k, v)
        return y, *pull(y)

    return [np.asarray(value, np.float32) for value in program(*inputs)]


def distance(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def softmax_attention(q, k, v, scale):
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    return y.reshape(*y.shape[:2], -1)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_xla_is_the_equation(scale):
    q, k, v = rows(7)
    expected = softmax_attention(q, k, v, 16**-0.5 if scale is None else scale)
    np.testing.assert_allclose(attention(q, k, v, scale=scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [None, (97,), (2, 1, 101, 97), (1, 2, 101, 97)], ids=str)
def test_by_head_on_a_cpu_is_xla(monkeypatch, shape):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, 2, 16)).astype(np.float32) for length in (101, 97, 97))
    bias = None if shape is None else rng.normal(size=shape).astype(np.float32)

    def program(q, k, v, bias):
        y, pull = jax.vjp(lambda *inputs: attention(*inputs[:3], bias=inputs[3]), q, k, v, bias)
        return y, *jax.tree.leaves(pull(y))

    by_head = jax.make_jaxpr(program)(q, k, v, bias)
    found = jax.jit(program)(q, k, v, bias)
    monkeypatch.setattr(module, "BY_HEAD", 2**20)
    expected = jax.jit(lambda *inputs: program(*inputs))(q, k, v, bias)
    assert max(map(distance, found, expected)) < 1e-6
    # All scores are nowhere: the largest array of the first program is the bias or an input.
    assert "2,2,101,97" not in str(by_head) and "f32[101,97]" in str(by_head)


@pytest.mark.parametrize("length", [1, 77, 128, 129, 511, 512, 513, 600, 1100, 2537, 2688, 4608])
def test_tiles_cover_the_sequence_with_little_padding(length):
    def padded(block):
        return -(-length // block) * block

    block = block_size(length)
    assert block % module.LANES == 0 and block <= max(module.BLOCKS)
    assert padded(block) - length < max(module.LANES, length / 2)
    assert padded(block) == padded(module.LANES) or padded(block) == min(map(padded, module.BLOCKS))


@pytest.mark.parametrize("tokens_last", [False, True], ids=["features last", "tokens last"])
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_padding_is_no_key(interpreted, backend, tokens_last):
    q, k, v = inputs = rows(130)
    expected = values_and_gradients((q, k[:, :77], v[:, :77]))
    turned = [np.moveaxis(x, 1, 3) if tokens_last else x for x in inputs]
    y, *gradients = values_and_gradients(turned, length=77, tokens_last=tokens_last, backend=backend)
    gradients = [np.moveaxis(x, 3, 1) if tokens_last else x for x in gradients]
    assert not any(x[:, 77:].any() for x in gradients[1:])
    for found, value in zip([y, gradients[0], gradients[1][:, :77], gradients[2][:, :77]], expected):
        assert distance(found, value) < 1e-6


@pytest.mark.parametrize(
    "tokens, backend, expected",
    [(2537, "splash", (2560, True)), (77, "splash", (128, True)), (2537, "xla", (2537, False))],
)
def test_the_kernel_s_own_form(tokens, backend, expected):
    assert module.form(tokens, jnp.bfloat16, backend) == expected


@pytest.mark.parametrize(
    "length, dim, scale",
    [
        pytest.param(5, 128, None, id="one padded tile"),
        pytest.param(128, 16, 0.7, id="no padding"),
        pytest.param(517, 16, None, id="two tiles, the second padded", marks=pytest.mark.slow),
    ],
)
def test_splash_is_xla_forward_and_backward(interpreted, length, dim, scale):
    inputs = rows(length, dim=dim)
    splash, xla = (values_and_gradients(inputs, scale=scale, backend=backend) for backend in ("splash", "xla"))
    assert max(map(distance, splash, xla)) < 1e-6


@pytest.mark.slow
def test_splash_in_bf16_is_as_exact_as_xla(interpreted):
    inputs = rows(40, dtype=jnp.bfloat16)
    exact = values_and_gradients([x.astype(np.float32) for x in inputs])
    splash, xla = (values_and_gradients(inputs, backend=backend) for backend in ("splash", "xla"))
    assert all(distance(ours, value) < 1.5 * distance(theirs, value) for ours, theirs, value in zip(splash, xla, exact))
    assert jax.eval_shape(functools.partial(attention, backend="splash"), *inputs).dtype == jnp.bfloat16


def test_auto_is_xla_without_an_accelerator_and_with_a_bias(monkeypatch):
    inputs = rows(6)
    np.testing.assert_array_equal(attention(*inputs, backend="auto"), attention(*inputs))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    bias = np.ones((1, 1, 6, 6), np.float32)
    np.testing.assert_array_equal(attention(*inputs, backend="auto", bias=bias), attention(*inputs, bias=bias))


@pytest.mark.parametrize(
    "device, dtype, primitive",
    [("tpu", jnp.float32, "splash_mha_fwd"), ("gpu", jnp.bfloat16, "cudnn"), ("gpu", jnp.float32, None)],
)
def test_auto_takes_the_fused_kernel_of_the_device(monkeypatch, device, dtype, primitive):
    called = []
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **options: called.append(options) or q)
    program = str(jax.make_jaxpr(functools.partial(attention, backend="auto"))(*rows(6, dtype=dtype)))
    if device == "tpu":
        assert primitive in program and not called
    else:
        assert called[0]["implementation"] == (primitive or "xla")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(backend="flash"), r"attention='flash' is unknown: choose one of \('auto', 'xla', 'cudnn', 'splash'\)"),
        (dict(backend="splash", bias=np.zeros((1, 1, 6, 6))), "attention='splash' takes no bias: use attention='xla'"),
        (dict(backend="cudnn", bias=np.zeros((1, 1, 6, 6))), "attention='cudnn' takes no bias"),
        (dict(backend="cudnn"), "attention='cudnn' needs bfloat16 or float16, got float32"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*rows(6), **options)


@functools.cache
def residual_bytes(remat, backend):
    """What one double block and one single block of FLUX store for the backward pass, per token."""
    params = jax.eval_shape(functools.partial(flux.init, FLUX), jax.random.key(0))

    def pullback(params, tokens):
        x, ids = jnp.ones((1, tokens - 8, FLUX.in_channels)), jnp.zeros((tokens - 8, 3))
        text, pooled = jnp.ones((1, 8, FLUX.joint_attention_dim)), jnp.ones((1, FLUX.pooled_projection_dim))
        options = dict(dtype=jnp.bfloat16, remat=remat, attention=backend)
        return jax.vjp(lambda p: flux.apply(FLUX, p, x, 0.5, text, pooled, 3.5, ids, **options), params)[1]

    def stored(tokens):
        # The leaves of a pullback are its residuals; a scan stacks those of its blocks.
        leaves = jax.tree.leaves(jax.eval_shape(functools.partial(pullback, tokens=tokens), params))
        stacked = [leaf for leaf in leaves if leaf.ndim]
        return np.asarray([sum(x.size * x.dtype.itemsize for x in stacked if len(x) == n) / n for n in (3, 5)])

    # Lengths of whole tiles, so that no padding enters the difference.
    return (stored(256) - stored(128)) / 128


@pytest.mark.parametrize(
    "remat, backend, double, single",
    [
        ("block", "splash", 2 * WIDTH, 2 * WIDTH),
        ("attention", "xla", 4 * WIDTH, 4 * WIDTH),
        ("attention", "splash", 4 * WIDTH + 4 * HEADS, 4 * WIDTH + 4 * HEADS),
        ("dots", "splash", 22 * WIDTH + 4 * HEADS, 20 * WIDTH + 4 * HEADS),
    ],
)
def test_a_block_keeps_the_bytes_that_its_policy_says(remat, backend, double, single):
    np.testing.assert_array_equal(residual_bytes(remat, backend), [double, single])


def test_to_recompute_nothing_is_dearest():
    assert (residual_bytes("none", "splash") > 3 * residual_bytes("dots", "splash")).all()


@pytest.mark.parametrize("remat, runs", [("none", 1), ("dots", 1), ("attention", 1), ("block", 2)])
@pytest.mark.parametrize("backend, kernel", [("splash", "splash_mha_fwd"), ("cudnn", "attention_fwd_wrapper")])
def test_kept_attention_is_not_run_again(monkeypatch, backend, kernel, remat, runs):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k, v = rows(128, dtype=jnp.bfloat16)

    def loss(scale):
        block = rematerialise(
            lambda x, _: (x + attention(scale * x, k, v, backend=backend).reshape(x.shape), None), remat
        )
        return jax.lax.scan(block, q, length=2)[0].astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.grad(loss))(jnp.bfloat16(1)).jaxpr
    alive, _ = dce_jaxpr(program, [True])
    assert len(re.findall(rf"{kernel}\w*\[|name={kernel}\w*", str(alive))) == runs


def gradient_of_a_stack(remat):
    weights = np.random.default_rng(0).normal(size=(3, 32, 32), scale=32**-0.5).astype(np.float32)
    q, k, v = rows(9)

    def block(x, w):
        return x + attention(jnp.tanh(x @ w).reshape(q.shape), k, v) @ w, None

    def loss(weights):
        return jnp.square(jax.lax.scan(rematerialise(block, remat), q.reshape(2, 9, 32), weights)[0]).sum()

    return np.asarray(jax.jit(jax.grad(loss))(weights))


def test_every_policy_gives_the_same_gradients():
    stored, *others = map(gradient_of_a_stack, REMAT)
    assert np.abs(stored).max() > 1
    assert all(distance(gradient, stored) < 1e-6 for gradient in others)


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match=r"remat='full' is unknown: choose one of \('none', 'dots'"):
        rematerialise(lambda x, w: (x, None), "full")


ON_A_MESH = """
import functools
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mixgrpo_jax.models.nn.attention import attention, splash
splash.make_splash_mha = functools.partial(splash.make_splash_mha, interpret=True)
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
rng = np.random.default_rng(0)
q, k, v = rng.normal(size=(3, 4, 6, 2, 16)).astype(np.float32)
program = jax.jit(functools.partial(attention, backend="splash"))
with jax.set_mesh(mesh):
    y = program(q, k, v)
    program.lower(q[:3], k[:3], v[:3])  # three samples on four devices: each has them all
np.testing.assert_allclose(y, attention(q, k, v), rtol=1e-5, atol=1e-6)
assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3), y.sharding
"""

IN_CONTEXT = """
import functools
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mixgrpo_jax.models.nn.attention import attention, splash
splash.make_splash_mha = functools.partial(splash.make_splash_mha, interpret=True)
mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)
q, k, v, w = np.random.default_rng(0).normal(size=(4, 4, TOKENS, 2, 16)).astype(np.float32)

def loss(q, k, v, backend):
    y = attention(q, k, v, backend=backend)
    return (y * w.reshape(y.shape)).sum(), y

program = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
expected = program(q, k, v, "xla")
for backend in ("xla", "splash"):
    with jax.set_mesh(mesh):
        found = program(q, k, v, backend)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    assert found[1].sharding.is_equivalent_to(NamedSharding(mesh, P("data", "context", "tensor")), 3), backend
"""


@pytest.mark.parametrize(
    "program",
    [ON_A_MESH, IN_CONTEXT.replace("TOKENS", "6"), IN_CONTEXT.replace("TOKENS", "100")],
    ids=["samples and heads", "tokens", "tokens, by head"],
)
def test_a_mesh_splits_samples_heads_and_tokens_where_they_divide(program):
    run_program(program, **virtual_devices(8))


FOR_TPU = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mixgrpo_jax.models import flux
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
# a device has 4 samples of 4 heads: scores do not fit into the chip's vector memory, which is not counted
mesh = jax.make_mesh((1, 4, 1), ("data", "fsdp", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 3)
config = flux.flux_small(num_layers=0, attention_head_dim=128, num_attention_heads=4, axes_dims_rope=(16, 56, 56))

def array(*shape, spec=P()):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

def temporaries(attention):
    def loss(params, x, text, pooled):
        ids = np.zeros((2025, 3), np.float32)
        options = dict(dtype=jnp.bfloat16, remat="attention", attention=attention)
        return flux.apply(config, params, x, 0.5, text, pooled, 3.5, ids, **options).sum()

    shapes = jax.eval_shape(functools.partial(flux.init, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: array(*leaf.shape), shapes)
    inputs = [array(16, *shape, spec=P("fsdp")) for shape in ((2025, 96), (512, 128), (128,))]
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(params, *inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes

print(temporaries("splash"), temporaries("xla"))
"""


@pytest.mark.slow
def test_the_tpu_compiler_takes_splash_and_needs_less_memory_than_for_xla():
    pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
    compiler = dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")  # others may be compiling, too
    splash, xla = map(int, run_program(FOR_TPU, JAX_PLATFORMS="cpu", **compiler).split())
    assert splash < xla / 2
