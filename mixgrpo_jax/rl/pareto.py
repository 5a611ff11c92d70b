"""Several rewards without weights: only samples that no other one of the group beats, or none falls behind, teach."""

from collections.abc import Mapping

import numpy as np

from mixgrpo_jax.rl.credit import Credit, by_advantage


def front(rewards: np.ndarray) -> np.ndarray:
    """Which of [G, K] are not dominated, [G]: no other is at least as good by every reward and better by one.

    >>> front(np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.5]])).tolist()
    [True, True, True, False]
    """
    no_worse = (rewards[:, None] >= rewards).all(-1)  # [by, of]
    better = (rewards[:, None] > rewards).any(-1)
    return np.logical_not((no_worse & better).any(0))


def by_front(
    rewards: Mapping[str, np.ndarray], group: np.ndarray, share: Mapping[str, float], credit: Credit
) -> np.ndarray:
    """Advantages of the two Pareto fronts of each group, of the best and of the worst, and 0 of all others, [B].

    After POCA (arXiv 2604.24171), an approximation: published are the sets, that others have no advantage, and that
    means are over the n samples of the sets and not over the G of the group, hence a factor of G / n. The advantages
    within were chosen: the normalised sum of `by_advantage`. With one reward the sets are the best and the worst.
    """
    normalised = by_advantage(rewards, group, share, credit)
    every = np.stack([rewards[name] for name in share], axis=-1)
    advantage = np.zeros_like(normalised)
    for one in np.unique(group):
        members = np.flatnonzero(group == one)
        chosen = members[front(every[members]) | front(-every[members])]
        advantage[chosen] = normalised[chosen] * len(members) / len(chosen)
    return advantage
