"""Rewards to advantages.

Computed on the host in float64: in fp32 the mean of equal rewards may miss them by one unit in the last place, which a
standard deviation of the same size then blows up to an advantage of order one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages. The defaults are MixGRPO's.

    combine: "advantages" normalises each reward and then adds them by weight; "rewards" adds raw rewards by weight and
        normalises the sum. Weights are normalised to sum to one in both.
    mean_scope, std_scope: "group" or "batch", whose statistics are used. std_scope "none" only subtracts the mean.
    ddof, epsilon: A = (r - mean) / (std + epsilon), with the std's delta degrees of freedom.
    trim: this fraction of each group's lowest rewards is left out of the statistics (not of the result).
    clip: advantages are limited to [-clip, clip].
    """

    combine: str = "advantages"
    mean_scope: str = "group"
    std_scope: str = "group"
    ddof: int = 1
    epsilon: float = 1e-8
    trim: float = 0.0
    clip: float = 5.0

    def __post_init__(self):
        known = {
            "combine": ("advantages", "rewards"),
            "mean_scope": ("group", "batch"),
            "std_scope": ("group", "batch", "none"),
            "ddof": (0, 1),
        }
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise ValueError(f"advantage.{field}={getattr(self, field)!r} is unknown; choose from {values}")
        if not 0 <= self.trim < 1:
            raise ValueError(f"advantage.trim={self.trim} is not in [0, 1): it is a fraction of each group")
        if not self.clip > 0 or not self.epsilon >= 0:
            raise ValueError(f"advantage.clip={self.clip}, epsilon={self.epsilon}: choose clip > 0 and epsilon >= 0")


def advantages(
    scores: Mapping[str, np.ndarray],
    group_id: np.ndarray,
    weights: Mapping[str, float],
    config: AdvantageConfig = AdvantageConfig(),
) -> np.ndarray:
    """Advantages A [B] of the scores {name: [B]}; samples with the same integer in `group_id` [B] are compared.

    >>> advantages({"r": np.array([1.0, 0.0, 5.0, 5.0])}, np.array([0, 0, 1, 1]), {"r": 1.0}).round(4)
    array([ 0.7071, -0.7071,  0.    ,  0.    ], dtype=float32)
    """
    total = sum(weights.values())
    share = {name: weight / total for name, weight in weights.items()}
    rewards = {name: np.asarray(scores[name], np.float64) for name in weights}
    if config.combine == "rewards":
        mixed = np.sum([share[name] * rewards[name] for name in share], axis=0)
        result = normalise(mixed, group_id, config)
    else:
        result = np.sum([share[name] * normalise(rewards[name], group_id, config) for name in share], axis=0)
    return np.clip(result, -config.clip, config.clip).astype(np.float32)


def normalise(reward: np.ndarray, group_id: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """(r - mean) / (std + epsilon) for one reward [B]."""
    batch = np.zeros_like(group_id)
    kept = _untrimmed(reward, group_id, config.trim)
    mean, _ = _statistics(reward, group_id if config.mean_scope == "group" else batch, kept, config.ddof)
    if config.std_scope == "none":
        return reward - mean
    _, std = _statistics(reward, group_id if config.std_scope == "group" else batch, kept, config.ddof)
    return (reward - mean) / (std + config.epsilon)


def _statistics(reward, ids, kept, ddof):
    """Mean and std of the kept rewards that share an id, spread back to [B]."""
    _, ids = np.unique(ids, return_inverse=True)
    count = np.bincount(ids, kept)
    mean = (np.bincount(ids, kept * reward) / count)[ids]
    variance = np.bincount(ids, kept * (reward - mean) ** 2) / np.maximum(count - ddof, 1)
    return mean, np.sqrt(variance)[ids]


def _untrimmed(reward, group_id, trim):
    """1.0 where a reward counts, 0.0 for the lowest floor(n * trim) of its group's n."""
    kept = np.ones_like(reward)
    for group in np.unique(group_id):
        members = np.flatnonzero(group_id == group)
        lowest = members[np.argsort(reward[members], kind="stable")]
        kept[lowest[: int(len(members) * trim)]] = 0
    return kept
