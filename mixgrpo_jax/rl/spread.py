"""Credit that differs by region, modality, step or node: what a spread makes of a sample's advantage, see `Credit`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.flow import plans
from mixgrpo_jax.rl.credit import Credit, Scores, Seen, map_of

FLOOR = 1e-3  # of a step's gain, so that none has no credit


def by_region(
    advantage: np.ndarray, scores: Scores, share: Mapping[str, float], seen: Seen, credit: Credit
) -> np.ndarray:
    """sum_k w_k A_k m_k, [1, B, S], with m_k the map of rewards that speak of the "inside", 1 - map of the "outside".

    An approximation of Edit-GRPO (arXiv 2605.16951): published is that the edited region and the rest learn from
    different signals, and not how. A_k is the advantage that reward k alone would give; a map of ones, and no reward
    of the outside, is even credit. Raises ValueError for a route to elsewhere, or without a map.
    """
    inside = map_of(scores, share, credit)
    return _routed(advantage, seen, share, credit, {"inside": inside, "outside": 1 - inside})


def by_route(
    advantage: np.ndarray, scores: Scores, share: Mapping[str, float], seen: Seen, credit: Credit
) -> np.ndarray:
    """sum_k w_k A_k over the rewards that speak of a position's modality, [1, B, S]: OmniNFT (arXiv 2605.12480).

    Raises ValueError for a route to a modality that the policy has not.
    """
    del scores
    positions = np.arange(seen.rollout.x0.shape[1])
    where = {name: np.isin(positions, positions[tokens])[None].astype(float) for name, tokens in seen.tokens.items()}
    return _routed(advantage, seen, share, credit, where)


def _routed(
    advantage: np.ndarray, seen: Seen, share: Mapping[str, float], credit: Credit, where: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The sum over rewards, [1, B, S], of which each has credit `where` its route says, NaN of a sample without one."""
    routes = {name: place for name, _, place in (route.partition(":") for route in credit.routes)}
    for name, place in routes.items():
        if name not in share or place not in where:
            raise ValueError(
                f"advantage.routes: {name}:{place} does not fit: rewards are {', '.join(share)}, places "
                f"{', '.join(where)}"
            )
    ones = np.ones((1, max(place.shape[1] for place in where.values())))
    total = sum(
        share[name] * part[:, None] * where.get(routes.get(name, ""), ones) for name, part in seen.parts.items()
    )
    missing = np.isnan(advantage)[:, None]
    return np.where(missing, np.nan, np.clip(total, -credit.clip, credit.clip))[None]


def by_step(
    advantage: np.ndarray, scores: Scores, share: Mapping[str, float], seen: Seen, credit: Credit
) -> np.ndarray:
    """A w_t, [n, B, 1], w_t ~ max(cos(x_t', x0) - cos(x_t, x0), 0) + a floor, with mean 1 over the places trained.

    The temporal part of OTCA (arXiv 2604.19234), as notes on it have it: a step has credit for how far it brought the
    sample towards what it became. The floor, 1e-3, was chosen. Raises ValueError without recorded steps.
    """
    del scores, share, credit
    if not seen.rollout.rows:
        raise ValueError("advantage.spread='temporal': the plan records no steps; choose plan 'window', or 'even'")
    places = getattr(seen.rollout.x0, "sharding", None)
    whole: Any = NamedSharding(places.mesh, P()) if isinstance(places, NamedSharding) else None
    gains = jax.jit(_gains, out_shardings=whole)(seen.rollout.x0, seen.rollout.rows)
    of_sample = np.repeat(np.asarray(seen.plan.train), len(advantage) // seen.plan.train.shape[1], axis=1)
    gain = np.maximum(np.take_along_axis(np.asarray(gains), of_sample, axis=0), 0) + FLOOR
    return (advantage * gain / gain.mean(0))[..., None]


def by_node(
    advantage: np.ndarray, scores: Scores, share: Mapping[str, float], seen: Seen, credit: Credit
) -> np.ndarray:
    """At each place the advantage of the node that the sample is below, [n, B, 1]: BranchGRPO (arXiv 2509.06040).

    A node's rewards are the means of those of its leaves that have a score, and credit compares them within the depth,
    among the nodes of a prompt. Where each node is one sample, as in a window, it is even credit.
    """
    count, prompts = len(advantage), seen.plan.train.shape[1]
    recorded = [(leaves, s.steps) for s, leaves in zip(seen.layout, plans.leaves_below(seen.layout)) if s.record]
    leaves_of_row = np.repeat(*np.array(recorded).T)

    def of_depth(leaves: int) -> np.ndarray:
        values = {name: _mean_of_scored(np.asarray(scores[name].value).reshape(-1, leaves)) for name in share}
        group = np.repeat(np.arange(prompts), count // leaves // prompts)
        return np.repeat(credit.of_samples(values, group, share), leaves)

    here = np.repeat(leaves_of_row[np.asarray(seen.plan.train)], count // prompts, axis=1)  # [n, B]
    depths = np.unique(here)
    return np.select([here == leaves for leaves in depths], [of_depth(leaves) for leaves in depths])[..., None]


def _mean_of_scored(values: np.ndarray) -> np.ndarray:
    """Means over the last axis of what is not NaN; NaN where all is."""
    there = ~np.isnan(values)
    return np.where(there, values, 0).sum(-1) / np.where(there.any(-1), there.sum(-1), np.nan)


def _gains(x0: Array, rows: tuple[Any, ...]) -> Array:
    """What each recorded step adds to the cosine with x0, [N, B], of all segments' steps in order."""

    def towards(x: Array) -> Array:  # [N, R, S, C] -> [N, B]
        x = jnp.repeat(x, len(x0) // x.shape[1], axis=1).reshape(len(x), len(x0), -1)
        ends = x0.reshape(len(x0), -1)
        return (x * ends).sum(-1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(ends, axis=-1) + 1e-6)

    return jnp.concatenate([towards(segment.x_next) - towards(segment.x) for segment in rows])
