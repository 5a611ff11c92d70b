"""An iteration's samples: how they are drawn, decoded and scored, while devices and host are both at work.

Devices are asked for everything that is known to be wanted, in order, and nothing waits for them before it must: while
the host scores some pictures, the devices make the next ones.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mixgrpo_jax.config import Settings
from mixgrpo_jax.engine.programs import Programs
from mixgrpo_jax.flow import plans
from mixgrpo_jax.flow.rollout import Rollout
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rewards.contract import Reward, Score
from mixgrpo_jax.rewards.scoring import score_chunks
from mixgrpo_jax.runtime import distributed
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.checkpoint import Checkpoints


class Drawn(NamedTuple):
    """An iteration's samples, and what they are drawn for. Arrays may still be on their way."""

    plan: plans.Plan
    batch: dict[str, Any]  # of P prompts
    cond: Any  # what the policy is told of the prompts
    sampled: Rollout
    images: list[jax.Array]  # uint8 [b, H, W, 3], by chunk


@dataclass(frozen=True, eq=False)
class Drawing:
    """Draws and scores the samples of any iteration.

    Attributes:
        prompts: batch k is iteration k's, see `data`.
        group_id: of each sample, its prompt's position in the batch, [B].
    """

    settings: Settings
    policy: Policy
    programs: Programs
    frozen: dict[str, Any]
    prompts: Sequence[dict[str, Any]]
    rewards: Sequence[Reward]
    group_id: np.ndarray
    mesh: Any

    def start(self, trained: Any, window: plans.WindowState, saved: Checkpoints | None = None) -> Drawn:
        """Ask the devices for the samples of the window's iteration and for their pictures, and return at once.

        With `saved`, the samples are those of its newest checkpoint.
        """
        plan, batch = plans.make_plan(self.settings.plan, window), self.prompts[window.iteration]
        cond = batch.get("features") or self.programs.features(self.frozen, self.policy.tokenize(batch["prompt"]))
        cond = meshes.spread(cond, self.mesh)
        key = jax.random.fold_in(jax.random.key(self.settings.config.seed), window.iteration)
        asked = trained, self.frozen, plan, cond, key
        if saved:
            shapes = self.programs.rollout.eval_shape(*asked)
            sampled = saved.restore_samples(meshes.placed(shapes, self.programs.places))
        else:
            sampled = self.programs.rollout(*asked)
        images = [self.programs.decode(self.frozen, sampled.x0, chunk) for chunk in range(len(self.programs.chunks))]
        return Drawn(plan, batch, cond, sampled, images)

    def score(self, drawn: Drawn) -> dict[str, Score]:
        """Scores of the samples by every reward, on every process."""
        texts, metadata = ([drawn.batch[key][group] for group in self.group_id] for key in ("prompt", "metadata"))
        score = functools.partial(score_chunks, self.rewards)
        return distributed.map_rows(score, drawn.images, list(self.programs.chunks), texts, metadata)
