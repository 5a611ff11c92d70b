"""Chunks of a trajectory by how fast it moves (GCPO, arXiv 2510.21583): a matter of the model and its schedule.

Draw some samples with every step recorded (a window with strategy "all"), and give the result to `plan.chunks`:

    chunk_starts(relative_l1(drawn.rows[0]), longest=4)
"""

import itertools

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mixgrpo_jax.flow.rollout import Rows


def relative_l1(rows: Rows) -> np.ndarray:
    """|x' - x|_1 / |x|_1 of each recorded step, over all samples: [N]."""
    axes = tuple(range(1, rows.x.ndim))
    return np.asarray(jnp.abs(rows.x_next - rows.x).sum(axes) / jnp.abs(rows.x).sum(axes))


def chunk_starts(curve: ArrayLike, longest: int) -> tuple[int, ...]:
    """The steps at which chunks begin, the first among them.

    A run of steps is cut where the sign of the curve's derivative changes, in the middle where it does not, and its
    parts by the next derivative, until none is longer than `longest`. How long is short enough, the paper does not say.

    >>> chunk_starts([5, 3, 2, 1, 2, 3], longest=3)
    (0, 3)
    >>> chunk_starts([8, 7, 6, 5, 4, 3, 2, 1], longest=2)
    (0, 2, 4, 6)

    Raises:
      ValueError: a length below 1.
    """
    if longest < 1:
        raise ValueError(f"longest={longest}: a chunk has at least one step")
    values = np.asarray(curve, np.float64)

    def cut(first: int, last: int, order: int) -> list[int]:
        if last - first <= longest:
            return [first]
        sign = np.sign(np.diff(values[first:last], order)) if last - first > order + 1 else np.zeros(0)
        turns = [first + int(t) + (order + 2) // 2 for t in np.flatnonzero(sign[1:] * sign[:-1] < 0)]
        ends = [first, *(turns or [(first + last) // 2]), last]
        return [start for a, b in itertools.pairwise(ends) for start in cut(a, b, order + 1)]

    return tuple(cut(0, len(values), 1))
