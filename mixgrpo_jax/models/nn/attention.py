"""Attention to all tokens, through one function with a fused kernel for each kind of accelerator."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models.nn.placement import BATCH_AXES, HEAD_AXES, TOKEN_AXES, dividing
from mixgrpo_jax.models.nn.remat import ATTENTION

Kernel = Literal["xla", "cudnn", "splash"]
Backend = Literal["auto", "xla", "cudnn", "splash"]
ATTENTION_BACKENDS = get_args(Backend)

LANES = 128
BY_HEAD = 2**13  # scores of a head from which on a CPU computes one head at a time; fewer are not worth a loop's turn
LARGE = 2560  # keys of a tile of the backward kernel; 16 MiB of a TPU's fast memory hold them and their gradients
BLOCKS = (512, 384, 256)  # rows of a tile; up to 1024 compile for a TPU v5e, but take longer to


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    length: int | None = None,
    tokens_last: bool = False,
    backend: Backend = "xla",
) -> jax.Array:
    """softmax(scale q k^T + bias) v.

    The back ends are "xla" (any device; makes the S x S scores, on a CPU those of a head at a time), "cudnn" (NVIDIA
    GPUs, bf16 or fp16) and "splash" (TPUs); "auto" is the fused one of the default device where it takes the inputs.
    On several devices "splash", and "xla" by head, need `jax.set_mesh(mesh)`: they put samples on the axes data and
    fsdp, heads on tensor, and rows of q on context, where these divide them. The others do so when the axis context is
    longer than one.

    Args:
      q, k, v: [B, S, H, d], or with `tokens_last` [B, H, d, S].
      bias: broadcasts to [B, H, S, S]; only with "xla".
      scale: 1/sqrt(d) by default.
      length: of the keys, the first so many are attended to; all by default. The others are padding.
      backend: one of ATTENTION_BACKENDS.

    Returns:
      [B, S, H d] in q's dtype.

    Raises:
      ValueError: another back end, a bias for a fused kernel, or fp32 for "cudnn".
    """
    kernel = _choose(backend, q.dtype, bias is not None)
    if tokens_last and kernel != "splash":
        q, k, v = (jnp.moveaxis(x, 3, 1) for x in (q, k, v))
        tokens_last = False
    at, head = (3, 1) if tokens_last else (1, 2)  # the axes of tokens and of heads
    scale = q.shape[2 if tokens_last else 3] ** -0.5 if scale is None else scale
    mesh = jax.sharding.get_abstract_mesh()
    many = not mesh.empty and mesh.size > 1
    by_head = kernel == "xla" and _platform(mesh) == "cpu" and q.shape[1] * k.shape[1] >= BY_HEAD
    by_head &= not (many and bias is not None)  # a loop over samples that lie apart would gather them
    cut = (many and by_head) or (mesh.shape.get("context", 1) > 1 and bias is None)
    own: dict[str, Any] = dict(kernel=kernel, bias=bias, scale=scale, length=length, tokens_last=tokens_last)
    on_device: Any = functools.partial(_on_device, by_head=by_head, **own)
    if mesh.empty or (kernel != "splash" and not cut):
        return on_device(q, k, v)
    batch, heads = dividing(mesh, BATCH_AXES, q.shape[0]), dividing(mesh, HEAD_AXES, q.shape[head])
    tokens = dividing(mesh, TOKEN_AXES, q.shape[at])  # each row attends to all: keys and values are gathered
    rows, whole = (P(batch, heads, None, t) if tokens_last else P(batch, t, heads) for t in (tokens, None))
    # A Pallas call does not say over which axes its result varies, so that check is off.
    inputs, output = (rows, whole, whole), P(batch, tokens, heads)
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    placed = jax.shard_map(on_device, in_specs=inputs, out_specs=output, axis_names=left, check_vma=False)
    return placed(q, k, v)


def form(tokens: int, dtype: jnp.dtype, backend: Backend) -> tuple[int, bool]:
    """How a back end's kernel likes its inputs: to how many tokens they are padded, and whether tokens stand last.

    The TPU's kernel takes whole tiles, and features before tokens: there neither a norm over the features nor a
    rotation of their halves crosses the lanes of a vector. The mesh's axis context divides the tokens.
    """
    ways = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    own, fused = -(-tokens // ways), _choose(backend, dtype, False) == "splash"
    tile = block_size(own) if fused else 1
    return -(-own // tile) * tile * ways, fused


def _platform(mesh: AbstractMesh) -> str:
    """Of the mesh's devices, which need not be here, or the default one."""
    device = mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def _on_device(
    q: jax.Array, k: jax.Array, v: jax.Array, *, kernel: Kernel, by_head: bool, bias: Any, length: Any, **own
) -> jax.Array:
    if by_head:
        return checkpoint_name(_by_head(q, k[:, :length], v[:, :length], bias, own["scale"]), ATTENTION)
    if kernel == "splash":
        return _splash(q, k, v, k.shape[3 if own["tokens_last"] else 1] if length is None else length, **own)
    lengths = None if length is None else jnp.full(len(k), length, jnp.int32)
    y = jax.nn.dot_product_attention(
        q, k, v, bias=bias, scale=own["scale"], key_value_seq_lengths=lengths, implementation=kernel
    )
    y = y.reshape(*y.shape[:2], -1)
    # The fused kernels' residuals are kept where they are made; a second name would keep the output twice.
    return checkpoint_name(y, ATTENTION) if kernel == "xla" else y


def _by_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, scale: float) -> jax.Array:
    """softmax(scale q k^T + bias) v for a CPU, a sample's head at a time -> [B, Q, H d].

    The scores of one head stay in the cache, where all of them would be written and read at each step of the softmax;
    the backward pass computes them again for the same reason.
    """
    (b, rows, h, _), dtype = q.shape, q.dtype

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def head(index: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
        for each in biases:
            scores += each[tuple(0 if n == 1 else i for n, i in zip(each.shape, index))]
        return jax.nn.softmax(scores, axis=-1).astype(dtype) @ v

    biases = [] if bias is None else [bias.reshape((1,) * (4 - bias.ndim) + bias.shape)]
    inputs = (x.swapaxes(1, 2).reshape(b * h, -1, x.shape[-1]) for x in (q, k, v))
    y = jax.lax.map(lambda args: head(*args), (jnp.divmod(jnp.arange(b * h), h), *inputs))
    return y.reshape(b, h, rows, -1).swapaxes(1, 2).reshape(b, rows, -1)


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


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, length: int, *, scale: float, tokens_last: bool) -> jax.Array:
    """softmax(scale q k^T) v over the first `length` keys by the TPU kernel: see `attention` -> [B, Q, H d]."""
    if not tokens_last:
        q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    # In fp32, because a scale rounded to bf16 shifts the temperature of every row alike.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    at = 3 if tokens_last else 2
    (b, h), rows, s, d = q.shape[:2], q.shape[at], k.shape[at], q.shape[5 - at]
    block_q, block_kv = block_size(rows), block_size(s)
    pad_q, pad_kv = -rows % block_q, -s % block_kv
    tiles = (s + pad_kv) // block_kv
    large_kv = block_kv * max(n for n in range(1, tiles + 1) if tiles % n == 0 and n * block_kv <= LARGE)
    mask = splash_attention_mask.FullMask((rows + pad_q, s + pad_kv))
    layout = splash.QKVLayout.SEQ_MINOR if tokens_last else splash.QKVLayout.HEAD_DIM_MINOR
    kernel = splash.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * (b * h)),
        # One backward kernel for dq, dk and dv computes the scores once, and stores a partial dq for each tile of keys:
        # so these are large, and worked on in parts.
        block_sizes=splash.BlockSizes(
            *(block_q, block_kv, block_kv, block_q, large_kv, block_kv),
            use_fused_bwd_kernel=True,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
    )

    def given(x: jax.Array, padding: int) -> jax.Array:  # [b h, s, d], whose layout is the kernel's own affair
        widths = [(0, 0)] * 4
        widths[at] = (0, padding)
        x = jnp.pad(x, widths) if padding else x
        x = x.reshape(b * h, *x.shape[2:])
        return x.swapaxes(1, 2) if tokens_last else x

    # Rows attend to columns of their own id: all rows, padding included, to the real columns.
    ids = splash.SegmentIds(jnp.ones(rows + pad_q, jnp.int32), (jnp.arange(s + pad_kv) < length).astype(jnp.int32))
    y = kernel(given(q, pad_q), given(k, pad_kv), given(v, pad_kv), ids if length < s + pad_kv else None)
    return y.reshape(b, h, -1, d)[:, :, :rows].swapaxes(1, 2).reshape(b, rows, h * d)


def block_size(length: int) -> int:
    """Rows of a square tile: the largest of BLOCKS that pads least, and of a short sequence all of it.

    >>> block_size(2537), block_size(2688), block_size(600), block_size(77)
    (512, 384, 384, 128)
    """
    whole = -(-length // LANES) * LANES
    return whole if whole <= BLOCKS[-1] else min(BLOCKS, key=lambda block: -(-length // block) * block)


def kernel_flops(name: str, operands: list[tuple[str, tuple[int, ...]]]) -> float:
    """Floating-point operations of a splash kernel by its name in a compiled program and its operands' shapes.

    The forward pass has two products of 2 n Q S d with q [n, Q, d] and k [n, S, d], its first operands of floats, or
    with tokens last; the backward pass has five, since it computes the scores again. 0 for another kernel.
    """
    products = 5 if name.startswith("splash_mha_dkv") else 2 if name.startswith("splash_mha_fwd") else 0
    if not products:
        return 0.0
    q, k, *_ = (shape for kind, shape in operands if len(shape) == 3 and kind in ("bf16", "f16", "f32"))
    return products * 2.0 * q[0] * max(q[1:]) * max(k[1:]) * min(q[1:])
