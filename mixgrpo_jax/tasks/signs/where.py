"""Where a sign's number is to be: an exact map, for credit that differs from place to place."""

import numpy as np

from mixgrpo_jax.rewards.contract import Images, Reward, Score
from mixgrpo_jax.rewards.preprocess import pooled
from mixgrpo_jax.tasks.signs.rendering import coverage


def digits(cell: tuple[int, int] = (8, 4)) -> Reward:
    """Where the number of a prompt is to be, as a map beside a score of 0: the share of each cell that it covers.

    Exact, since signs are rendered: to be watched, and named in advantage.map. `cell` is a latent position's pixels.
    """

    def score(images: Images, prompts: list[str], metadata: list[dict]) -> Score:
        del prompts
        covered = np.stack([coverage(m["number"]) for m in metadata])
        return Score(np.zeros(len(images), np.float32), pooled(covered, cell))

    return Reward("digits", "host", score)
