"""An iteration's samples: how they are drawn, decoded and scored, while devices and host are both at work.

Devices are asked for everything that is known to be wanted, in order, and nothing waits for them before it must: while
the host scores some pictures, the devices make the next ones.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mixgrpo_jax.config import ConfigError, Settings, refusing
from mixgrpo_jax.engine.programs import Programs
from mixgrpo_jax.engine.reward_grad import RewardGrad
from mixgrpo_jax.flow.plans import Plan
from mixgrpo_jax.flow.rollout import Rollout
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rewards.contract import Reward, Score
from mixgrpo_jax.rewards.on_device import differentiable
from mixgrpo_jax.rewards.scoring import of_groups, score_chunks
from mixgrpo_jax.rl import replay
from mixgrpo_jax.rl.credit import Seen, map_of, shares
from mixgrpo_jax.rl.replay import Kept
from mixgrpo_jax.rl.select import All, Replay
from mixgrpo_jax.rl.update import Batch, TrainState
from mixgrpo_jax.runtime import distributed
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.checkpoint import Checkpoints


class Drawn(NamedTuple):
    """An iteration's samples, and what they are drawn for. Arrays may still be on their way."""

    plan: Plan
    batch: dict[str, Any]  # of P prompts
    cond: Any  # what the policy is told of the prompts
    sampled: Rollout
    images: list[jax.Array]  # uint8 [b, H, W, 3], by chunk


class Lesson(NamedTuple):
    """What an iteration's scores teach: advantages of samples [B], NaN without a score, and the update's part of it."""

    advantage: np.ndarray
    given: tuple[Batch, Plan, np.ndarray | None]  # the positions [P', G'] of what is trained on; None is all
    kept: Kept | None = None  # groups that later iterations may train on again


@dataclass(frozen=True, eq=False)
class Collector:
    """Draws and scores the samples of any iteration.

    Attributes:
        prompts: batch k is iteration k's, see `tasks`.
    """

    settings: Settings
    policy: Policy
    programs: Programs
    frozen: dict[str, Any]
    prompts: Sequence[dict[str, Any]]
    rewards: Sequence[Reward]
    mesh: Any

    def __post_init__(self):
        if "reward_grad" in self.settings.objective.needs:
            with refusing():
                differentiable(self.rewards, self.settings.rewards)
        credit, known = self.settings.advantage, self.policy.tokens
        for route in credit.routes if credit.spread == "routes" else ():
            if (where := route.partition(":")[2]) not in known:
                choices = ", ".join(known)
                raise ConfigError(
                    f"advantage.routes={route!r}: the policy has no tokens {where!r}; choose from {choices}"
                )

    def check(self, scores: Mapping[str, Score]) -> None:
        """Raise ConfigError where the scores of any pictures show that the rewards are not what the config asks for."""
        settings = self.settings
        if settings.advantage.spread in ("map", "regions") or "map" in settings.objective.needs:
            with refusing():
                map_of(scores, shares(settings.rewards), settings.advantage)

    @functools.cached_property
    def group(self) -> np.ndarray:
        """Of each sample, its prompt's position in the batch, [B]."""
        return np.repeat(np.arange(self.settings.batch.prompts), self.settings.batch.group)

    def take(self, state: TrainState, planned: Any, saved: Checkpoints | None = None) -> Drawn:
        """Ask the devices for the samples of a planner's state and for their pictures, and return at once.

        The objective says which role draws them. With `saved`, they are those of its newest checkpoint.
        """
        settings, draws = self.settings, self.settings.objective.draws
        plan, batch = settings.planner.plan(planned, settings.batch.prompts), self.prompts[planned.iteration]
        cond = batch.get("features") or self.programs.features(self.frozen, self.policy.tokenize(batch["prompt"]))
        cond = meshes.spread(cond, self.mesh)
        key = jax.random.fold_in(jax.random.key(settings.config.seed), planned.iteration)
        params = state.params if draws == "train" else state.averages[draws]
        # Left to the compiler, a plan may be cut by an axis that the mesh has not, as `rollout_fsdp` makes some.
        asked = params, self.frozen, meshes.everywhere(plan, self.mesh), cond, key
        if saved:
            shapes = self.programs.rollout.eval_shape(*asked)
            sampled = saved.restore_samples(meshes.placed(shapes, self.programs.places))
        else:
            sampled = self.programs.rollout(*asked)
        images = [self.programs.decode(self.frozen, sampled.x0, chunk) for chunk in range(len(self.programs.chunks))]
        return Drawn(plan, batch, cond, sampled, images)

    def score(self, drawn: Drawn, waiting: Callable[[], None] = lambda: None) -> dict[str, Score]:
        """Scores of the samples by every reward, on every process; NaN of a sample that could not be scored.

        `waiting` is called when reward servers are away and are waited for, on the processes that do.
        """
        share, wait = self.settings.config.missing_share, self.settings.config.reward_wait
        score = functools.partial(score_chunks, self.rewards, missing_share=share, wait=wait, waiting=waiting)
        scores = distributed.map_rows(score, drawn.images, list(self.programs.chunks), *self.asked(drawn))
        return of_groups(self.rewards, scores, self.group)

    def learn(
        self, drawn: Drawn, scores: Mapping[str, Score], kept: Kept | Callable[[Any], Any] | None = None
    ) -> Lesson:
        """Advantages, and which samples are trained on with them; NaN, and not one, where there is no score.

        `kept` are the groups of earlier iterations, where the selection replays them, or what restores them.
        """
        settings, sampled = self.settings, drawn.sampled
        values = {name: score.value for name, score in scores.items()}
        advantage = settings.advantage.of_samples(values, self.group, settings.rewards)
        by_group = advantage.reshape(settings.batch.prompts, -1)  # a group stands in a row
        share = shares(settings.rewards)
        reward = np.sum([share[name] * values[name] for name in share], axis=0).reshape(by_group.shape)
        index, weight = settings.select(by_group, reward)
        everything = np.zeros(settings.samples, np.float32)
        everything[index] = weight * ~np.isnan(advantage)[index]
        needs, parts = settings.objective.needs, settings.advantage.of_rewards(values, self.group, settings.rewards)
        seen = Seen(parts, sampled, drawn.plan, self.policy.tokens, settings.planner.layout)
        batch = Batch(
            x0=sampled.x0 if "x0" in needs else None,
            rows=sampled.rows if needs & {"rows", "ode_row"} else (),
            advantage=settings.advantage.over_places(advantage, scores, settings.rewards, seen),
            weight=everything,
            cond=drawn.cond,
            extra=self._extra(drawn, scores, parts),
        )
        plan = meshes.everywhere(drawn.plan, self.mesh)
        if isinstance(settings.select, Replay):
            return Lesson(advantage, *self._replayed(settings.select, batch, plan, reward, kept))
        return Lesson(advantage, (batch, plan, None if isinstance(settings.select, All) else index))

    def _extra(self, drawn: Drawn, scores: Mapping[str, Score], parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What else of the samples the objective and the optimiser ask for, [1, B, ...]."""
        settings, extra = self.settings, dict[str, Any]()
        if "reward_grad" in settings.objective.needs:
            extra["reward_grad"] = self._reward_grad(drawn)[None]
            reward = sum(weight * scores[name].value for name, weight in settings.rewards.items() if weight)
            extra["reward"] = np.asarray(reward, np.float32)[None]
        if "map" in settings.objective.needs:
            found = map_of(scores, shares(settings.rewards), settings.advantage)
            extra["map"] = np.nan_to_num(found, nan=0.0).astype(np.float32)[None]
        if settings.optimizer.mix != "none":
            extra["by_reward"] = np.nan_to_num(np.stack(list(parts.values()), axis=-1))[None]
        return extra

    def _replayed(
        self, select: Replay, batch: Batch, plan: Plan, reward: np.ndarray, kept: Any
    ) -> tuple[tuple[Batch, Plan, np.ndarray], Kept]:
        """Fresh groups and kept ones with the positions of those that are trained on, and what is kept now."""
        prompts, group = self.settings.batch.prompts, self.settings.batch.group
        if not isinstance(kept, Kept):  # none yet: what stands there has no value
            first = replay.positions(np.arange(select.capacity) % prompts, group)
            none = meshes.everywhere(np.full(select.capacity, -np.inf, np.float32), self.mesh)
            groups, of_groups = self.programs.keep(batch, plan, first)
            fresh = Kept(groups, of_groups, none)
            kept = kept(fresh) if kept else fresh
        value, before = replay.value_of(reward), np.asarray(kept.value)
        chosen, left = select.exchange(value, before)
        batch, plan = self.programs.join(batch, plan, kept.batch, kept.plan)
        values_left = np.where(np.isin(left, chosen[chosen >= prompts]), -np.inf, np.concatenate([value, before])[left])
        given = batch, plan, replay.positions(chosen, group)
        groups, of_groups = self.programs.keep(batch, plan, replay.positions(left, group))
        return given, Kept(groups, of_groups, meshes.everywhere(values_left.astype(np.float32), self.mesh))

    def counts(self, drawn: Drawn, learned: Mapping[str, np.ndarray]) -> dict[str, int]:
        """An iteration's evaluations of the model in samples, and the programs compiled so far."""
        each = self.policy.evaluations
        return {
            "nfe/rollout": each * int(drawn.sampled.executed),
            "nfe/rollout_used": each * int(drawn.sampled.used),
            "nfe/update": each * int(learned["nfe/update"]),
            "nfe/gradient": each * int(learned["nfe/gradient"]),
            "compilations": self.programs.compilations(),
        }

    def asked(self, drawn: Drawn) -> tuple[list, list]:
        """Prompts and metadata by sample."""
        prompts, metadata = ([drawn.batch[key][group] for group in self.group] for key in ("prompt", "metadata"))
        return prompts, metadata

    def _reward_grad(self, drawn: Drawn) -> jax.Array:
        return self._gradient(self.frozen, drawn.sampled.x0, *self.asked(drawn))[1]

    @functools.cached_property
    def _gradient(self) -> RewardGrad:
        return RewardGrad(self.policy, self.rewards, self.settings.rewards, self.programs.chunks, self.mesh)
