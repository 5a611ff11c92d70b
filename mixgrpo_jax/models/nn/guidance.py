"""Classifier-free guidance: a velocity of two evaluations, with a prompt's features and with the negative prompt's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

NEGATIVE = "negative_"  # before the names of what belongs to the negative prompt


def guided(evaluate: Callable[..., jax.Array], scale: float, x: Any, sigma: Any, cond: Any) -> jax.Array:
    """v- + scale (v - v-), both from one call of `evaluate(x, sigma, cond)`; v- is of what `cond` has as NEGATIVE."""
    sigma = jnp.broadcast_to(sigma, len(x))
    twice = {name: pairs(cond[NEGATIVE + name], a) for name, a in own(cond).items()}
    v = evaluate(pairs(x, x), pairs(sigma, sigma), twice)
    without, with_text = jnp.moveaxis(v.reshape(len(x), 2, *v.shape[1:]), 1, 0)
    return without + scale * (with_text - without)


def pairs(a: jax.Array, b: jax.Array) -> jax.Array:
    """[B, ...] twice -> [2 B, ...], a's row before b's: one behind the other, all rows would change their devices."""
    a, b = jnp.broadcast_arrays(a, b)
    return jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])


def with_negative(encode: Callable[[Any], dict[str, jax.Array]], tokens: Any) -> dict[str, jax.Array]:
    """`encode` of tokens [P, ...], and of the negative prompt's, which is encoded once and has P equal rows."""
    prompts = own(tokens)
    negative, cond = encode({name: tokens[NEGATIVE + name][:1] for name in prompts}), encode(prompts)
    rows = len(next(iter(prompts.values())))
    return cond | {NEGATIVE + name: jnp.broadcast_to(a, (rows, *a.shape[1:])) for name, a in negative.items()}


def own(arrays: dict[str, Any]) -> dict[str, Any]:
    """Those that are of the prompts themselves, not of the negative one."""
    return {name: array for name, array in arrays.items() if not name.startswith(NEGATIVE)}


def doubled(shapes: dict[str, Any]) -> dict[str, Any]:
    """Shapes by name, and the same of the negative prompt's."""
    return shapes | {NEGATIVE + name: shape for name, shape in shapes.items()}
