"""ONNX operators as functions of arrays, by name: those of the recognition network, and no others.

Inputs come first, attributes by keyword, and none has a default: a graph that says something else is refused. What
shapes are made of are NumPy arrays, which are known while JAX traces, and operators on those alone give NumPy arrays.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

DTYPES = {6: np.int32, 7: np.int64}  # by ONNX's numbers


def _require(**attributes: tuple[Any, Any]) -> None:
    for name, (value, known) in attributes.items():
        if value != known:
            raise ValueError(f"{name}={value} is unknown: only {known} is known")


def _last(x):
    """[B, C, H, W] -> [B, H, W, C], in which XLA's loops and products are the fastest on a CPU.

    Operators do their work between this and `_first`; XLA drops the two where they meet.
    """
    return x.transpose(0, 2, 3, 1)


def _first(x):
    return x.transpose(0, 3, 1, 2)


def _elementwise(function: Callable[..., Array]) -> Callable[..., Array]:
    """The operator by an elementwise function, whose inputs are broadcast to each other."""

    @functools.wraps(function)
    def operate(*xs, **attributes):
        if max(x.ndim for x in xs) < 4:
            return function(*xs, **attributes)
        return _first(function(*(_last(x[(None,) * (4 - x.ndim)]) for x in xs), **attributes))

    return operate


def _conv(x, w, bias=None, *, kernel_shape, strides, pads, dilations, group):
    """x [B, C, H, W], w [kh, kw, C / group, O] -> [B, O, H', W'], with group 1 or C = O."""
    _require(dilations=(dilations, [1, 1]), kernel_shape=(kernel_shape, list(w.shape[:2])))
    x, padding = _last(x), tuple(zip(pads[:2], pads[2:]))
    if group > 1:
        _require(group=(group, x.shape[-1]))
        y = _depthwise(jnp.pad(x, ((0, 0), *padding, (0, 0))), w, strides)
    elif kernel_shape == strides == [1, 1] and not any(pads):
        y = x @ w[0, 0]
    else:
        y = jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return _first(y if bias is None else y + bias)


def _depthwise(x: jax.Array, w: jax.Array, strides: Sequence[int]) -> jax.Array:
    """Each channel's own filter, as a sum of shifted pictures: x [B, H, W, C], w [kh, kw, 1, C].

    XLA fuses the sum into one loop. With its grouped convolution, the whole network took ten times as long on a CPU.
    """
    counts = [(size - taps) // stride + 1 for size, taps, stride in zip(x.shape[1:3], w.shape, strides)]

    def term(i: int, j: int) -> jax.Array:
        rows, columns = (slice(k, k + n * stride, stride) for k, n, stride in zip((i, j), counts, strides))
        return x[:, rows, columns] * w[i, j, 0]

    return functools.reduce(operator.add, (term(i, j) for i, j in np.ndindex(*w.shape[:2])))


def _average_pool(x, *, kernel_shape, strides, pads, ceil_mode, count_include_pad):
    """Means of windows that lie wholly inside of [B, C, H, W]."""
    _require(pads=(pads, [0, 0, 0, 0]), ceil_mode=(ceil_mode, 0))
    sums = jax.lax.reduce_window(_last(x), 0.0, jax.lax.add, (1, *kernel_shape, 1), (1, *strides, 1), "valid")
    return _first(sums / np.prod(kernel_shape))


def _batch_norm(x, scale, bias, mean, variance, *, epsilon, momentum):
    """Over the channels of [B, C, H, W], by fixed statistics."""
    gain = scale / jnp.sqrt(variance + epsilon)
    return _first(_last(x) * gain + (bias - mean * gain))


def _reshape(x, shape):
    """To a shape in which 0 stands for the input's own size along that axis."""
    return x.reshape([x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)])


def _slice(x, starts, ends, axes, steps=(1,)):
    _require(steps=(list(steps), [1]))
    index = [slice(None)] * x.ndim
    for start, end, axis in zip(starts, ends, axes):
        index[int(axis)] = slice(int(start), int(end))
    return x[tuple(index)]


def _softmax(x, *, axis):
    """Over the last axis. Another one would take in all that follow it, too."""
    _require(axis=(axis % x.ndim, x.ndim - 1))
    return jax.nn.softmax(x)


def _cast(x, *, to):
    if to not in DTYPES:
        raise ValueError(f"to={to} is unknown: only {sorted(DTYPES)} are known")
    return x.astype(DTYPES[to])


def _concat(*xs, axis):
    return (np if all(isinstance(x, np.ndarray) for x in xs) else jnp).concatenate(xs, axis)


# Wrapped, because a NumPy or JAX function would accept more attributes than ONNX's operator has.
OPERATORS: dict[str, Callable[..., Array]] = {
    "Add": _elementwise(operator.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _elementwise(lambda x, low, high: jnp.clip(x, low, high)),
    "Concat": _concat,
    "Conv": _conv,
    "Div": _elementwise(operator.truediv),
    "GlobalAveragePool": lambda x: _first(_last(x).mean((1, 2), keepdims=True)),
    "HardSigmoid": _elementwise(lambda x, *, alpha, beta: jnp.clip(alpha * x + beta, 0, 1)),
    "MatMul": operator.matmul,
    "Mul": _elementwise(operator.mul),
    "Pow": _elementwise(operator.pow),
    "ReduceMean": lambda x, *, axes: x.mean(tuple(axes), keepdims=True),
    "Relu": _elementwise(lambda x: jax.nn.relu(x)),
    "Reshape": _reshape,
    "Shape": lambda x: np.array(x.shape),
    "Sigmoid": _elementwise(lambda x: jax.nn.sigmoid(x)),
    "Slice": _slice,
    "Softmax": _softmax,
    "Sqrt": _elementwise(lambda x: jnp.sqrt(x)),
    "Squeeze": lambda x, *, axes: x.squeeze(tuple(axes)),
    "Sub": _elementwise(operator.sub),
    "Transpose": lambda x, *, perm: x.transpose(perm),
}
