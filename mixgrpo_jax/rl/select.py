"""Which of the samples are trained on; each selection is a frozen dataclass, loaded when it is named.

A selection is rectangular: of each of P' prompts, the same number of samples.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mixgrpo_jax.flow.plans import Plan
from mixgrpo_jax.rl.update import Batch

SELECTIONS = {
    "all": "mixgrpo_jax.rl.select:All",
    "extremes": "mixgrpo_jax.rl.select:Extremes",
    "band": "mixgrpo_jax.rl.select:Band",
    "replay": "mixgrpo_jax.rl.select:Replay",
}


class Selection(Protocol):
    """Chooses samples by their advantages."""

    def kept(self, group: int) -> int:
        """Samples G' that are left of a group."""

    def __call__(self, advantage: np.ndarray, reward: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Advantages [P, G] -> positions in the batch [P', G'] int32, a prompt's together, and weights [P', G'].

        `reward` [P, G] is the weighted sum of the raw rewards; None where only shapes are asked for.
        A sample with NaN has no score, and gets weight 0 whatever is said here.
        """


@dataclass(frozen=True)
class All:
    """Every sample."""

    def kept(self, group: int) -> int:
        """All of them."""
        return group

    def __call__(self, advantage: np.ndarray, reward: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions [P, G], and weights of 1."""
        del reward
        return np.arange(advantage.size, dtype=np.int32).reshape(advantage.shape), np.ones(advantage.shape, np.float32)


@dataclass(frozen=True)
class Extremes:
    """The best and the worst of each group, in their order in the batch (DanceGRPO's best-of-N).

    Samples without a score are taken where there are no others.

    Attributes:
      count: how many of the best, and of the worst, are kept of a group.

    Raises:
      ValueError: a count that leaves nothing, or of a group that is smaller than twice the count.
    """

    count: int = 4

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"select.count={self.count}: keep at least one of the best and of the worst")

    def kept(self, group: int) -> int:
        """Twice the count."""
        if 2 * self.count > group:
            raise ValueError(f"select.count={self.count}: twice as many are more than batch.group={group}; lower it")
        return 2 * self.count

    def __call__(self, advantage: np.ndarray, reward: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions [P, 2 count], and weights of 1."""
        del reward
        prompts, group = advantage.shape
        self.kept(group)
        order = np.argsort(advantage, axis=1, kind="stable")  # NaN comes last
        end = np.maximum((~np.isnan(advantage)).sum(1), 2 * self.count)
        best = np.take_along_axis(order, end[:, None] - np.arange(1, self.count + 1), axis=1)
        chosen = np.sort(np.concatenate([order[:, : self.count], best], axis=1), axis=1)
        index = chosen + group * np.arange(prompts)[:, None]
        return index.astype(np.int32), np.ones(index.shape, np.float32)


@dataclass(frozen=True)
class Band(All):
    """Every sample, of which those of prompts that teach little have weight 0.

    By difficulty, after AdaGRPO (arXiv 2606.06828): prompts are ranked by their groups' mean reward, and those below
    the share `hardest` or above the share `easiest` of an iteration's are left out. The paper grades a prompt by one
    sample of the ODE before it is drawn; here the group grades it, which costs no sample and saves none. By range, as
    Qwen-Image-2.0-RL does (arXiv 2606.27608): a group teaches if its best reward is `least_range` above its worst.

    Attributes:
      hardest, easiest: shares of the prompts, by rank from the lowest mean; 0 and 1 keep all.
      least_range: the least range of a group's rewards, in the units of their weighted sum; 0 keeps all.

    Raises:
      ValueError: when a field is out of range.
    """

    hardest: float = 0.25
    easiest: float = 0.75
    least_range: float = 0.0

    def __post_init__(self):
        if not 0 <= self.hardest < self.easiest <= 1:
            raise ValueError(
                f"select.hardest={self.hardest}, easiest={self.easiest}: choose 0 <= hardest < easiest <= 1, shares of "
                "the prompts by rank"
            )
        if self.least_range < 0:
            raise ValueError(f"select.least_range={self.least_range} must not be negative; 0 keeps every group")

    def __call__(self, advantage: np.ndarray, reward: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions [P, G], and weights of 0 and 1."""
        index, weight = super().__call__(advantage)
        if reward is None:
            return index, weight
        there = ~np.isnan(reward).all(1)  # or the prompt has weight 0 anyway
        mean, extent = np.zeros(len(reward)), np.zeros(len(reward))
        mean[there] = np.nanmean(reward[there], axis=1)
        extent[there] = np.nanmax(reward[there], axis=1) - np.nanmin(reward[there], axis=1)
        rank = (mean[:, None] > mean).mean(1) + (mean[:, None] == mean).mean(1) / 2  # of the middle of its ties
        kept = (self.hardest <= rank) & (rank <= self.easiest) & (extent >= self.least_range)
        return index, weight * kept[:, None].astype(np.float32)


@dataclass(frozen=True)
class Replay(All):
    """Every sample, but that groups of earlier iterations take the places of fresh ones that are worth less.

    A group's value is how far its best reward is above its mean (OP-GRPO's "high-quality trajectories", an
    approximation). What was replayed once is not kept on.

    Attributes:
      capacity: groups that are kept, those of the largest values.
      groups: groups of an iteration that are replaced, at most.

    Raises:
      ValueError: when a field is out of range.
    """

    capacity: int = 16
    groups: int = 2

    def __post_init__(self):
        for field in ("capacity", "groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"select.{field}={getattr(self, field)} must be at least 1; select 'all' replays none")

    def exchange(self, value: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of fresh groups [P] and of kept ones [K] -> which of the P + K are trained on [P], and are kept [K].

        >>> Replay(capacity=2, groups=1).exchange(np.array([0.1, 0.5, 0.2]), np.array([-np.inf, 0.4]))
        (array([4, 1, 2]), array([1, 2]))
        """
        chosen, best = np.arange(len(value)), np.argsort(-kept, kind="stable")
        for place, group in zip(np.argsort(value, kind="stable")[: self.groups], best):
            if kept[group] > value[place]:
                chosen[place] = len(value) + group
        left = np.concatenate([value, kept])
        left[chosen[chosen >= len(value)]] = -np.inf
        return chosen, np.argsort(-left, kind="stable")[: self.capacity]


def take(batch: Batch, plan: Plan, index: Array, group: int) -> tuple[Batch, Plan]:
    """The samples at the positions [P', G'] of a batch in groups of G, and the plan of their P' prompts.

    The result's weights [P' G'] are the batch's.
    """
    samples, prompts = index.reshape(-1), index[:, 0] // group

    def of_nodes(a: Array) -> Array:  # [N, R, ...]
        return a[:, samples // (len(batch.weight) // a.shape[1])]

    def of_prompts(a: Array) -> Array:  # [..., P]
        return jnp.asarray(a)[..., prompts]

    by_place = jax.tree.map(lambda a: a[:, samples], (batch.advantage, batch.extra))
    chosen = Batch(
        None if batch.x0 is None else batch.x0[samples],
        jax.tree.map(of_nodes, batch.rows),
        by_place[0],
        batch.weight[samples],
        jax.tree.map(lambda a: a[prompts], batch.cond),
        by_place[1],
    )
    return chosen, jax.tree.map(of_prompts, plan)
