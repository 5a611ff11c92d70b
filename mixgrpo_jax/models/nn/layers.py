"""Layers shared by the transformers: parameters are stored as given and cast to the activations' dtype where used.

The compute dtype is therefore the dtype of the input, and nothing here carries a dtype argument. What must not lose
precision (norm statistics, rotary angles, time embeddings) is computed in fp32 and cast back.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mixgrpo_jax.models.nn import products
from mixgrpo_jax.models.nn.attention import ATTENTION_BACKENDS as ATTENTION_BACKENDS
from mixgrpo_jax.models.nn.attention import Backend as Backend
from mixgrpo_jax.models.nn.attention import attention as attention
from mixgrpo_jax.models.nn.attention import form as form
from mixgrpo_jax.models.nn.remat import PRODUCT

Turns = tuple[jax.Array, jax.Array]  # what rotates queries and keys, see `rotary`
Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
LECUN = jax.nn.initializers.lecun_normal()
ZEROS = jax.nn.initializers.zeros


def normal(std: float) -> Initializer:
    """Initialiser N(0, std^2)."""
    return jax.nn.initializers.normal(std)


class Linear(nnx.Module):
    """y = x W + b with W stored as `kernel` [d_in, d_out] in fp32."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True, init: Initializer = LECUN, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(d_out, jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d_in] -> [..., d_out], in x's dtype."""
        return self.joined(x)

    def joined(self, *parts: jax.Array) -> jax.Array:
        """The layer of the parts' concatenation along the last axis, which is not made."""
        y = products.joined(parts, self.kernel[...].astype(parts[0].dtype))
        return checkpoint_name(y if self.bias is None else y + self.bias[...].astype(y.dtype), PRODUCT)

    def tokens_last(self, x: jax.Array) -> jax.Array:
        """[B, S, d_in] -> [B, d_out, S], in x's dtype."""
        y = products.tokens_last(x, self.kernel[...].astype(x.dtype))
        return checkpoint_name(y if self.bias is None else y + self.bias[...].astype(x.dtype)[:, None], PRODUCT)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale over the last axis, in fp32."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array, turns: Turns | None = None, axis: int = -1) -> jax.Array:
        """In x's shape and dtype; `axis` has the dim features, which `turns` rotate where given, see `rotary`."""
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), tuple(range(axis + 1, 0)))
        if turns is not None:
            return _rotated_norm(x, scale, turns, axis % x.ndim, self.eps)
        x32 = x.astype(jnp.float32)
        return (x32 * _inverse_rms(x32, axis, self.eps) * scale).astype(x.dtype)


def _inverse_rms(x: jax.Array, axis: int, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=axis, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _rotated_norm(x: jax.Array, scale: jax.Array, turns: Turns, axis: int, eps: float) -> jax.Array:
    """rotate(x scale) / rms(x): two passes over x, and two in its derivative, where an automatic one takes eight."""
    return _rotated_norm_forward(x, scale, turns, axis, eps)[0]


def _rotated_norm_forward(x: jax.Array, scale: jax.Array, turns: Turns, axis: int, eps: float) -> Any:
    x32 = x.astype(jnp.float32)
    r = _inverse_rms(x32, axis, eps)
    return rotate(x32 * scale, turns, axis, r).astype(x.dtype), (x, scale, turns, r)


def _rotated_norm_backward(axis: int, eps: float, kept: Any, gradient: jax.Array) -> Any:
    """dx = r scale u - r^3 x mean(scale x u), with u the gradient rotated back."""
    x, scale, (cos, sin), r = kept
    x32 = x.astype(jnp.float32)
    u = rotate(gradient.astype(jnp.float32), (cos, -sin), axis)
    ux = u * x32
    of_x = r * (scale * u - r * r * x32 * jnp.mean(scale * ux, axis=axis, keepdims=True))
    others = tuple(n for n in range(x.ndim) if n != axis)
    of_scale = jnp.sum(ux * r, axis=others).reshape(scale.shape)
    return of_x.astype(x.dtype), of_scale, (jnp.zeros_like(cos), jnp.zeros_like(sin))


_rotated_norm.defvjp(_rotated_norm_forward, _rotated_norm_backward)


class Embedder(nnx.Module):
    """Two-layer SiLU perceptron that lifts a conditioning vector [B, d_in] to the model's width [B, dim]."""

    def __init__(self, d_in: int, dim: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.linear_1 = Linear(d_in, dim, bias=bias, rngs=rngs)
        self.linear_2 = Linear(dim, dim, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, d_in] -> [B, dim]."""
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over the last axis, without affine parameters; statistics in fp32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive layer norm: layer_norm(x) (1 + scale) + shift."""
    return layer_norm(x) * (1 + scale) + shift


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def swiglu(x: jax.Array) -> jax.Array:
    """silu(gate) times value, which lie side by side: [..., 2 d] -> [..., d]."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


def sinusoid(t: jax.Array, dim: int = 256, max_period: float = 1e4) -> jax.Array:
    """[cos(t w_j), sin(t w_j)] with w_j = max_period^(-j / (dim/2)), cosines first, in fp32: t [B] -> [B, dim]."""
    half = dim // 2
    # The exponent is rounded to fp32, as in training of the released models: t up to 3500 magnifies its last bit.
    exponent = -math.log(max_period) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_angles(ids: jax.Array, axes_dims: tuple[int, ...], theta: float = 1e4) -> jax.Array:
    """Rotary angles of positions ids [S, A] on A axes: axis a turns axes_dims[a]/2 pairs by id_a theta^(-2j/dim_a).

    Returns [S, sum(axes_dims)/2] in fp32.
    """
    ids = jnp.asarray(ids, jnp.float32)
    frequencies = [(theta ** -(np.arange(0, dim, 2) / dim)).astype(np.float32) for dim in axes_dims]
    return jnp.concatenate([ids[:, a, None] * f for a, f in enumerate(frequencies)], axis=-1)


def rotary(angles: jax.Array, *, tokens_last: bool = False) -> Turns:
    """cos and (-sin, sin) of angles [S, d/2] as `rotate` takes them, once for all blocks: for features on the last axis
    of [B, S, H, d], or with `tokens_last` of [B, H, d, S]."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turns = jnp.stack([cos, cos], axis=1), jnp.stack([-sin, sin], axis=1)  # [S, 2, d/2]
    cos, sin = (jnp.moveaxis(turn, 0, 2) if tokens_last else turn[:, None] for turn in turns)
    return cos, sin


def rotate(x: jax.Array, turns: Turns, axis: int = -1, factor: jax.Array | None = None) -> jax.Array:
    """Rotates each pair (x_j, x_(j + d/2)) of the d features of `axis`, in fp32, times a factor a head and token.

    The released models pair neighbours; their queries and keys are permuted where they are loaded. So the pairs lie
    half a head apart, and no array has an axis of length 2 innermost.
    """
    axis %= x.ndim
    halves = x.astype(jnp.float32).reshape(*x.shape[:axis], 2, -1, *x.shape[axis + 1 :])
    cos, sin = turns
    turned = halves * cos + jnp.flip(halves, axis) * sin
    turned = turned if factor is None else turned * jnp.expand_dims(factor, axis)
    return turned.reshape(x.shape).astype(x.dtype)
