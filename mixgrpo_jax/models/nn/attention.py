"""Attention without a mask, through one function with a fused kernel for each kind of accelerator."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models.nn.placement import BATCH_AXES, HEAD_AXES, TOKEN_AXES, dividing
from mixgrpo_jax.models.nn.remat import ATTENTION

Kernel = Literal["xla", "cudnn", "splash"]
Backend = Literal["auto", "xla", "cudnn", "splash"]
ATTENTION_BACKENDS = get_args(Backend)

LANES = 128
MAX_BLOCK = 512  # of the rows of a tile; up to 1024 compile for a TPU v5e, but take longer to


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    backend: Backend = "xla",
) -> jax.Array:
    """softmax(scale q k^T + bias) v without a mask.

    The back ends are "xla" (any device; makes the S x S scores), "cudnn" (NVIDIA GPUs, bf16 or fp16) and "splash"
    (TPUs); "auto" is the fused one of the default device where it takes the inputs. On several devices "splash" needs
    `jax.set_mesh(mesh)`: it puts samples on the axes data and fsdp, heads on tensor, and rows of q on context, where
    these divide them. The others do so when the axis context is longer than one.

    Args:
      q, k, v: [B, S, H, d].
      bias: broadcasts to [B, H, S, S]; only with "xla".
      scale: 1/sqrt(d) by default.
      backend: one of ATTENTION_BACKENDS.

    Returns:
      [B, S, H d] in q's dtype.

    Raises:
      ValueError: another back end, a bias for a fused kernel, or fp32 for "cudnn".
    """
    kernel = _choose(backend, q.dtype, bias is not None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mesh = jax.sharding.get_abstract_mesh()
    cut = mesh.shape.get("context", 1) > 1 and bias is None
    on_device = functools.partial(_on_device, kernel=kernel, bias=bias, scale=scale)
    if mesh.empty or (kernel != "splash" and not cut):
        return on_device(q, k, v)
    batch, heads = dividing(mesh, BATCH_AXES, q.shape[0]), dividing(mesh, HEAD_AXES, q.shape[2])
    tokens = dividing(mesh, TOKEN_AXES, q.shape[1])  # each row attends to all: keys and values are gathered
    rows, whole, output = P(batch, tokens, heads), P(batch, None, heads), P(batch, tokens, heads)
    # A Pallas call does not say over which axes its result varies, so that check is off.
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    placed = jax.shard_map(on_device, in_specs=(rows, whole, whole), out_specs=output, axis_names=left, check_vma=False)
    return placed(q, k, v)


def _on_device(q: jax.Array, k: jax.Array, v: jax.Array, *, kernel: Kernel, bias: Any, scale: float) -> jax.Array:
    if kernel == "splash":
        return _splash(q, k, v, scale)
    y = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=scale, implementation=kernel)
    y = y.reshape(*y.shape[:2], -1)
    # The fused kernels' residuals are kept where they are made; a second name would keep the output twice.
    return checkpoint_name(y, ATTENTION) if kernel == "xla" else y


def _choose(backend: Backend, dtype: jnp.dtype, biased: bool) -> Kernel:
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention={backend!r} is unknown: choose one of {ATTENTION_BACKENDS}")
    half = dtype in (jnp.bfloat16, jnp.float16)
    if backend == "auto":
        device = None if biased else jax.default_backend()
        return "splash" if device == "tpu" else "cudnn" if device == "gpu" and half else "xla"
    if biased and backend != "xla":
        raise ValueError(f"attention={backend!r} takes no bias: use attention='xla'")
    if backend == "cudnn" and not half:
        raise ValueError(f"attention='cudnn' needs bfloat16 or float16, got {dtype}: use attention='xla'")
    return backend


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """softmax(scale q k^T) v by the TPU kernel: q [B, Q, H, d], k and v [B, S, H, d] -> [B, Q, H d]."""
    # In fp32, because a scale rounded to bf16 shifts the temperature of every row alike.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    (b, rows, h, d), s = q.shape, k.shape[1]
    block_q, block_kv = block_size(rows), block_size(s)
    pad_q, pad_kv = -rows % block_q, -s % block_kv
    mask = splash_attention_mask.FullMask((rows + pad_q, s + pad_kv))
    kernel = splash.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * (b * h)),
        # One backward kernel for dq, dk and dv computes the scores once, and stores a partial dq for each column.
        block_sizes=splash.BlockSizes(
            block_q, block_kv, block_kv, block_q, block_kv, block_kv, use_fused_bwd_kernel=True
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
    )
    q, k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))).reshape(b * h, -1, d)
        for x, padding in ((q, pad_q), (k, pad_kv), (v, pad_kv))
    )
    # Rows attend to columns of their own id: all rows, padding included, to the real columns.
    ids = splash.SegmentIds(jnp.ones(rows + pad_q, jnp.int32), (jnp.arange(s + pad_kv) < s).astype(jnp.int32))
    y = kernel(q, k, v, ids if pad_kv else None)
    return y.reshape(b, h, -1, d)[:, :, :rows].swapaxes(1, 2).reshape(b, rows, h * d)


def block_size(length: int) -> int:
    """Rows of a square tile: the fewest tiles of at most MAX_BLOCK rows that cover length, as even as 128 lanes allow.

    >>> block_size(2537), block_size(600), block_size(77)
    (512, 384, 128)
    """
    tiles = -(-length // MAX_BLOCK)
    return -(-length // (tiles * LANES)) * LANES


def kernel_flops(name: str, operands: list[tuple[str, tuple[int, ...]]]) -> float:
    """Floating-point operations of a splash kernel by its name in a compiled program and its operands' shapes.

    The forward pass has two products of 2 n S^2 d with q [n, S, d], its first operand of floats; the backward pass has
    five, since it computes the scores again. 0 for another kernel.
    """
    products = 5 if name.startswith("splash_mha_dkv") else 2 if name.startswith("splash_mha_fwd") else 0
    if not products:
        return 0.0
    n, s, d = next(shape for kind, shape in operands if len(shape) == 3 and kind in ("bf16", "f16", "f32"))
    return products * 2.0 * n * s * s * d
