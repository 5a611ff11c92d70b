"""Rewards to advantages: rewards are combined, shaped, and spread over places and positions.

Computed on the host in float64: in fp32 the mean of equal rewards may miss them by one unit in the last place, which a
standard deviation of the same size then blows up to an advantage of order one.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mixgrpo_jax.flow.plans import Layout

Scores = Mapping[str, Any]  # of each reward, `value` [B], and `map` [B, S] over latent positions or None


class Seen(NamedTuple):
    """What a spread may look at beside advantages and scores.

    parts: {reward: the advantages [B] that it alone would give}. rollout: see `flow.rollout`; its arrays may lie on
    devices of other processes. plan: of the iteration. tokens: each modality's slice of the S positions. layout: the
    plan's.
    """

    parts: Mapping[str, np.ndarray]
    rollout: Any
    plan: Any
    tokens: Mapping[str, slice]
    layout: Layout = ()


@dataclass(frozen=True)
class Credit:
    """How rewards become advantages. The defaults are MixGRPO's.

    combine, shape and spread are names of the tables below, or "module:function" of one's own with their signature.

    Attributes:
      combine: (scores {name: [B]}, group [B], shares {name: sum to 1}, credit) -> A [B]. "advantages" normalises each
        reward and then adds them by weight; "rewards" adds raw rewards by weight and normalises the sum;
        "pareto" is `pareto.by_front`, POCA's.
      shape: (A [B], group [B], credit) -> A [B]. "none" leaves it; "whiten" normalises it once more, by the batch;
        "tanh" bends it, clip tanh(A / clip); "power" is `power_law`, SLAS's.
      spread: (A [B], scores {name: Score}, shares, seen, credit) -> A [n or 1, B, S or 1]. "even" gives every place and
        position the sample's; "map" multiplies it by the rewards' maps; "regions", "routes", "temporal" and "nodes" are
        those of `spread.py`.
      mean_scope, std_scope: "group" or "batch", whose statistics are used. std_scope "none" only subtracts the mean.
      ddof, epsilon: A = (r - mean) / (std + epsilon), with the std's delta degrees of freedom.
      trim: this fraction of each group's lowest rewards is left out of the statistics (not of the result).
      clip: advantages are limited to [-clip, clip], when they are shaped.
      power: the exponent of the shape "power"; 1 leaves what it is of.
      map: the reward, trained on or watched, whose map says where; "" is the weighted mean of those trained on.
      routes: "REWARD:PLACE" of what speaks of a part of the picture alone: "inside" or "outside" the map of the spread
        "regions", or for "routes" a modality of the policy's tokens. Other rewards speak of everything.

    Raises:
      ValueError: when a field is out of range.
    """

    combine: str = "advantages"
    mean_scope: str = "group"
    std_scope: str = "group"
    ddof: int = 1
    epsilon: float = 1e-8
    trim: float = 0.0
    clip: float = 5.0
    power: float = 1.0
    shape: str = "none"
    spread: str = "even"
    map: str = ""
    routes: tuple[str, ...] = ()

    def __post_init__(self):
        known = {
            "mean_scope": ("group", "batch"),
            "std_scope": ("group", "batch", "none"),
            "ddof": (0, 1),
        }
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise ValueError(f"advantage.{field}={getattr(self, field)!r} is unknown; choose from {values}")
        for field in ("combine", "shape", "spread"):
            self._named(field)
        for route in self.routes:
            if not all(route.partition(":")):
                raise ValueError(f"advantage.routes: {route!r} names no place; write REWARD:PLACE")
        if not 0 <= self.trim < 1:
            raise ValueError(f"advantage.trim={self.trim} is not in [0, 1): it is a fraction of each group")
        if not self.clip > 0:
            raise ValueError(f"advantage.clip={self.clip}: it must be positive")
        if not self.epsilon >= 0:
            raise ValueError(f"advantage.epsilon={self.epsilon}: it must be at least 0")
        if not self.power > 0:
            raise ValueError(f"advantage.power={self.power} must be positive; 1 bends nothing")

    def _named(self, field: str) -> Callable:
        table, name = TABLES[field], getattr(self, field)
        found = table.get(name, name)
        if callable(found) or ":" in found:
            return found if callable(found) else pkgutil.resolve_name(found)
        raise ValueError(f"advantage.{field}={name!r} is unknown; choose from {tuple(table)}, or write module:function")

    def of_samples(
        self, scores: Mapping[str, np.ndarray], group: np.ndarray, weights: Mapping[str, float]
    ) -> np.ndarray:
        """Combined and shaped advantages A [B] float32 of the scores {name: [B]}.

        Samples with the same integer in `group` [B] are compared. One that has NaN for a score was not scored: it is in
        nobody's statistics, and its advantage is NaN.

        >>> Credit().of_samples({"r": np.array([1.0, 0.0, 5.0, 5.0])}, np.array([0, 0, 1, 1]), {"r": 1.0}).round(4)
        array([ 0.7071, -0.7071,  0.    ,  0.    ], dtype=float32)
        """
        rewards = {name: np.asarray(scores[name], np.float64) for name in weights}
        scored = ~np.any([np.isnan(values) for values in rewards.values()], axis=0)
        rewards, group = {name: values[scored] for name, values in rewards.items()}, np.asarray(group)[scored]
        combined = self._named("combine")(rewards, group, shares(weights), self)
        shaped = self._named("shape")(combined, group, self)
        advantage = np.full(len(scored), np.nan, np.float32)
        advantage[scored] = np.clip(shaped, -self.clip, self.clip)
        return advantage

    def of_rewards(
        self, scores: Mapping[str, np.ndarray], group: np.ndarray, weights: Mapping[str, float]
    ) -> dict[str, np.ndarray]:
        """The advantages [B] that each reward with a weight would give alone. Arguments are as in `of_samples`."""
        return {name: self.of_samples(scores, group, {name: 1.0}) for name, weight in weights.items() if weight}

    def over_places(
        self, advantage: np.ndarray, scores: Scores, weights: Mapping[str, float], seen: Any = None
    ) -> np.ndarray:
        """Advantages of samples [B] over the places where they are trained and their positions: [n or 1, B, S or 1].

        `seen` is a `Seen`, for the spreads that look at it.
        """
        return np.asarray(self._named("spread")(advantage, scores, shares(weights), seen, self), np.float32)


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights, in proportion, with sum 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def by_advantage(rewards: Mapping[str, np.ndarray], group: np.ndarray, share: Mapping[str, float], credit: Credit):
    """Each reward normalised, then the weighted sum, [B]."""
    return np.sum([share[name] * normalise(rewards[name], group, credit) for name in share], axis=0)


def by_reward(rewards: Mapping[str, np.ndarray], group: np.ndarray, share: Mapping[str, float], credit: Credit):
    """The weighted sum of raw rewards, normalised, [B]."""
    return normalise(np.sum([share[name] * rewards[name] for name in share], axis=0), group, credit)


def whiten(advantage: np.ndarray, group: np.ndarray, credit: Credit) -> np.ndarray:
    """(A - mean) / (std + epsilon) over the batch, [B]: with combine="advantages" it is GDPO (arXiv 2601.05242)."""
    del group
    return _over_std(advantage - advantage.mean(), credit)


def tanh(advantage: np.ndarray, group: np.ndarray, credit: Credit) -> np.ndarray:
    """clip tanh(A / clip), V-GRPO's soft clip, [B]."""
    del group
    return credit.clip * np.tanh(advantage / credit.clip)


def power_law(advantage: np.ndarray, group: np.ndarray, credit: Credit) -> np.ndarray:
    """sign(d) |d|^power, over its standard deviation in the batch, [B].

    It is SLAS (arXiv 2605.10937) where d = r - mean_group, as std_scope="none" gives it.
    """
    del group
    return _over_std(np.sign(advantage) * np.abs(advantage) ** credit.power, credit)


def _over_std(values: np.ndarray, credit: Credit) -> np.ndarray:
    """Values [B] over their standard deviation in the batch."""
    _, std = _statistics(values, np.zeros(len(values), int), np.ones_like(values), credit.ddof)
    return values / (std + credit.epsilon)


def even(advantage: np.ndarray, scores: Scores, share: Mapping[str, float], seen: Any, credit: Credit) -> np.ndarray:
    """The sample's advantage everywhere, [1, B, 1]."""
    del scores, share, seen, credit
    return advantage[None, :, None]


def by_map(advantage: np.ndarray, scores: Scores, share: Mapping[str, float], seen: Any, credit: Credit) -> np.ndarray:
    """The sample's advantage times the map, [1, B, S]: ViPO (arXiv 2511.18719). Raises ValueError without a map."""
    del seen
    return (advantage[:, None] * map_of(scores, share, credit))[None]


def map_of(scores: Scores, share: Mapping[str, float], credit: Credit) -> np.ndarray:
    """The map of the credit's choice, [B, S]. Raises ValueError where the rewards give none."""
    named = {credit.map: 1.0} if credit.map else share
    maps = {name: scores[name].map for name in named if name in scores and scores[name].map is not None and named[name]}
    if not maps:
        raise ValueError(
            f"advantage.spread={credit.spread!r}: none of the rewards {', '.join(named)} gives a map; choose 'even', "
            "or name one that does in advantage.map"
        )
    weight = sum(named[name] for name in maps)
    return np.sum([named[name] / weight * np.asarray(maps[name]) for name in maps], axis=0)


TABLES: dict[str, dict[str, Callable | str]] = {
    "combine": {
        "advantages": by_advantage,
        "rewards": by_reward,
        "pareto": "mixgrpo_jax.rl.pareto:by_front",
    },
    "shape": {
        "none": lambda advantage, group, credit: advantage,
        "whiten": whiten,
        "tanh": tanh,
        "power": power_law,
    },
    "spread": {
        "even": even,
        "map": by_map,
        "regions": "mixgrpo_jax.rl.spread:by_region",
        "routes": "mixgrpo_jax.rl.spread:by_route",
        "temporal": "mixgrpo_jax.rl.spread:by_step",
        "nodes": "mixgrpo_jax.rl.spread:by_node",
    },
}


def normalise(reward: np.ndarray, group_id: np.ndarray, credit: Credit) -> np.ndarray:
    """(r - mean) / (std + epsilon) for one reward [B]; 0 where that is 0 / 0."""
    batch = np.zeros_like(group_id)
    kept = _untrimmed(reward, group_id, credit.trim)
    mean, _ = _statistics(reward, group_id if credit.mean_scope == "group" else batch, kept, credit.ddof)
    if credit.std_scope == "none":
        return reward - mean
    _, std = _statistics(reward, group_id if credit.std_scope == "group" else batch, kept, credit.ddof)
    scale = std + credit.epsilon
    return np.divide(reward - mean, scale, out=np.zeros_like(reward), where=scale > 0)


def _statistics(reward, ids, kept, ddof):
    """Mean and std of the kept rewards that share an id, spread back to [B]; equal ones have exactly their mean."""
    _, ids = np.unique(ids, return_inverse=True)
    count = np.bincount(ids, kept)
    lowest, highest = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(lowest, ids[kept > 0], reward[kept > 0])
    np.maximum.at(highest, ids[kept > 0], reward[kept > 0])
    mean = np.clip(np.bincount(ids, kept * reward) / count, lowest, highest)[ids]
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
