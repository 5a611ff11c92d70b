"""MARBLE (arXiv 2605.06507): several rewards, whose gradients are mixed so that none is given up for another.

An optimiser's first transformation: it takes the gradients of K rewards, and gives one to what follows it.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

MOST = 8  # rewards: the solver looks at each of their subsets


class Mixed(NamedTuple):
    """The average of the rewards' shares, [K]."""

    share: Array


def mix(count: int, decay: float) -> optax.GradientTransformation:
    """Of gradients with a leading axis of `count` rewards in each leaf, sum_k a_k g_k.

    a is an average with this decay, from 1 / K on, of `min_norm` of the gradients' cosines. The paper finds it anew
    every ten steps, of a decay of 0.7, and between them mixes advantages, which is the same for NFT while it clips
    none. Here it is found at every update, which holds for every objective, at K times the update's evaluations and K
    more gradients in memory.

    Raises:
      ValueError: more rewards than the solver takes.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"optimizer.mix='min_norm' takes 1 to {MOST} rewards with a weight, and there are {count}")

    def init(params: Any) -> Mixed:
        del params
        return Mixed(jnp.full(count, 1 / count, jnp.float32))  # or it would be of a weak type, and compile twice

    def update(gradients: Any, state: Mixed, params: Any = None) -> tuple[Any, Mixed]:
        del params
        leaves = [leaf.reshape(count, -1) for leaf in jax.tree.leaves(gradients)]
        gram = sum((leaf @ leaf.T for leaf in leaves), jnp.zeros((count, count)))
        share = decay * state.share + (1 - decay) * min_norm(cosines(gram))
        return jax.tree.map(lambda leaf: jnp.tensordot(share, leaf, axes=1), gradients), Mixed(share)

    return optax.GradientTransformation(init, update)


def cosines(gram: Array) -> Array:
    """Of vectors with these products, [K, K]; one that is 0 is at right angles to all."""
    size = jnp.sqrt(jnp.diagonal(gram))
    size = jnp.where(size > 0, size, jnp.inf)
    return jnp.where(jnp.eye(len(gram), dtype=bool), 1.0, gram / size[:, None] / size)


def min_norm(gram: Array) -> Array:
    """argmin a' M a of a >= 0 with sum 1, [K]: of every subset, the solution with no bounds, where it is within them.

    >>> min_norm(jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [0.5, 0.5]
    """
    count = len(gram)
    subsets = np.array(list(itertools.product((0.0, 1.0), repeat=count))[1:], np.float32)
    ridged = gram + 1e-5 * jnp.eye(count)  # of equal ones, equal shares

    def within(subset: Array) -> tuple[Array, Array]:
        system = ridged * subset[:, None] * subset + jnp.diag(1 - subset)
        solved = jnp.linalg.solve(system, subset) * subset
        share = solved / solved.sum()
        allowed = (share >= -1e-6).all() & jnp.isfinite(share).all()
        share = jnp.where(allowed, jnp.maximum(share, 0), subset / subset.sum())
        return share, jnp.where(allowed, share @ ridged @ share, jnp.inf)

    shares, norms = jax.vmap(within)(jnp.asarray(subsets))
    return shares[jnp.argmin(norms)]
