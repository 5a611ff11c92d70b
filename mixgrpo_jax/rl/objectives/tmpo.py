"""TMPO and Uni-TMPO: a group's trajectories get the probabilities that their rewards ask for, and none is given up.

Of a trajectory, s is the sum over its trained steps of log p(x'|x), and p = softmax(s) over the group. The target is
q = softmax(beta R), where R is the advantage that credit makes: it need not be normalised, and its mean has no effect.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mixgrpo_jax.flow.rollout import Rows
from mixgrpo_jax.rl.samples import Metrics, Objective, Point, Roles, Samples, Tools


@dataclass(frozen=True)
class UniTMPO(Objective):
    """L = KL(q || p) of each group, whose gradient is sum_i (p_i - q_i) grad s_i; there is no ratio, and no clip.

    A group whose rewards are all equal teaches nothing.

    Attributes:
      beta: how sharply the target prefers rewards.
      reduce: how a step's log-prob is reduced over the latent's elements: "mean", as the field has it, or "sum".

    Raises:
      ValueError: when a field is out of range.
    """

    beta: float = 1.0
    reduce: str = "mean"

    span: ClassVar = "group"
    on_policy: ClassVar = {"ratio/rollout_deviation": "rollout_tolerance"}

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"objective.beta={self.beta} must be positive; TMPO has 0.8 to 2")
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"objective.reduce={self.reduce!r} is unknown; choose from ('mean', 'sum')")

    def loss(self, s: Array, change: Array, q: Array, peers: Array) -> Array:
        """[b] of log-probs s, their change since the rollout, log q, and who is in whose group [b, b]."""
        del change
        return peers.sum(1) * jnp.exp(q) * (q - log_softmax(s, peers))

    def __call__(self, roles: Roles, samples: Samples, key: Array, tools: Tools) -> tuple[Array, Metrics]:
        """Loss [b] and metrics [b]."""
        row = samples.rows  # [n, b, ...]
        v = roles["train"](row.x, tools.sampler.timestep(row.sigma), samples.cond)

        def of_place(row: Rows, v: Array) -> Any:
            transition = tools.sampler.step(row.x, v, row.sigma, row.sigma_next, row.eta)
            return transition, tools.sampler.log_prob_map(transition, row.x_next).mean(-1)

        transition, now = jax.vmap(of_place)(row, v)
        size = 1 if self.reduce == "mean" else row.x[0, 0].size
        now, old = size * now, size * row.log_prob.mean(-1)
        reward = samples.advantage.mean((0, 2))
        same = samples.group[:, None] == samples.group
        peers = (same & (samples.weight > 0)) | jnp.eye(len(reward), dtype=bool)
        varied = jnp.where(peers, reward, -jnp.inf).max(1) > jnp.where(peers, reward, jnp.inf).min(1)
        s, change = ((samples.step_weight * a).sum(0) for a in (now, now - old))
        loss = jnp.where(varied, self.loss(s, change, log_softmax(self.beta * reward, peers), peers), 0)
        metrics = {
            "loss/policy": loss,
            "ratio/mean": jnp.exp(change),
            "ratio/rollout_deviation": jnp.abs(jnp.exp(now - old) - 1).max(0),
        }
        point = Point(row.x, row.sigma, v, samples.cond, row.sigma_next, row.eta, transition, now - old)
        penalty, named = tools.terms(roles, point)
        return loss + penalty, metrics | named


@dataclass(frozen=True)
class TMPO(UniTMPO):
    """TMPO (arXiv 2605.10983): L = mean max(-A r, -A clip(r, 1 - clip, 1 + clip)) with A = log q - log p, no gradient.

    log r is the change of s less its mean over the group. The released code multiplies by GRPO-Guard's ratio as well,
    without gradient, which is 1 at its one update a rollout, and raises beta from 0.8 to 2 in 150 iterations.

    Attributes:
      clip: the ratio is clipped to [1 - clip, 1 + clip]. Other fields are Uni-TMPO's.
    """

    beta: float = 2.0
    clip: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not self.clip > 0:
            raise ValueError(f"objective.clip={self.clip} must be positive; the released code has 0.2")

    def loss(self, s: Array, change: Array, q: Array, peers: Array) -> Array:
        """As Uni-TMPO's."""
        advantage, fixed = jax.lax.stop_gradient((q - log_softmax(s, peers), change))
        ratio = jnp.exp(jnp.clip(change - (peers * fixed).sum(1) / peers.sum(1), -10, 10))
        return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - self.clip, 1 + self.clip))


def log_softmax(values: Array, peers: Array) -> Array:
    """Of values [b], each among its peers [b, b]."""
    return values - jax.nn.logsumexp(jnp.where(peers, values, -jnp.inf), axis=1)
