"""Post-train a policy against rewards: MixGRPO and its relatives.

    python -m mixgrpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Any field of the config is a flag: `--config.optimizer.learning_rate=1e-4`. A run that was stopped goes on where its
last checkpoint is. In workdir: metrics.jsonl (a line an iteration), checkpoints/, before_after.png and rewards.png.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from clu import parameter_overview
from jax import Array
from ml_collections import config_flags
from tqdm import tqdm

from mixgrpo_jax import config as configs
from mixgrpo_jax.config import Settings
from mixgrpo_jax.data import TASKS
from mixgrpo_jax.evaluate import HeldOut, table
from mixgrpo_jax.flow import plans
from mixgrpo_jax.flow.rollout import Rollout, Rows, initial_noise, rollout
from mixgrpo_jax.models import policy as policies
from mixgrpo_jax.rewards import REWARDS, score_all
from mixgrpo_jax.rl import objectives
from mixgrpo_jax.rl.advantages import advantages
from mixgrpo_jax.rl.update import init_state, make_update
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime import metrics, report
from mixgrpo_jax.runtime.checkpoint import Checkpoints


def train(config: Any, workdir: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Run the config's iterations in `workdir`; returns the held-out scores {name: [N]} of the result."""
    settings = configs.resolve(config)
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = meshes.make_mesh(config.mesh)
    task = TASKS[config.data.name]
    prompts = task.batches(task.load("train", config.data.folder), config.seed, config.batch.prompts)
    rewards = [REWARDS[name]() for name in dict.fromkeys([*config.rewards, *config.watched])]
    group_id = np.repeat(np.arange(config.batch.prompts), config.batch.group)

    # The policy, what is trained of it, and the two programs of an iteration.
    parts, params = policies.load(config.model.folder)
    policy = policies.make(parts, config.model)
    place = meshes.shardings(params, policies.RULES, mesh)
    params = jax.device_put(params, place)
    print(parameter_overview.get_parameter_overview(params["transformer"], include_stats=False))
    print(settings.arithmetic())
    optimiser = make_optimiser(config.optimizer)
    programs = make_programs(settings, parts, params["transformer"], optimiser, mesh)
    held_out = HeldOut(config, policy)

    # Resume, or start; the window, and with it the whole host state, is in the checkpoint.
    checkpoints = Checkpoints(workdir, config.checkpoint.every, config.checkpoint.keep)
    state, window = programs.init(params["transformer"]), plans.initial_state(settings.plan)
    if checkpoints.latest is not None:
        state, host = checkpoints.restore(state)
        window = plans.WindowState(**host["window"])
    writer = metrics.MetricWriter(workdir, resume_at=window.iteration)

    def assess(state):
        images = held_out.draw(state.ema if config.evaluation.ema else state.params, params["text_encoder"])
        return images, held_out.score(images)

    (before, scores_before), after = assess(programs.init(params["transformer"])), None
    if window.iteration == 0:
        writer.write(0, metrics.means("held_out", scores_before))

    progress = tqdm(range(window.iteration, config.iterations), "train", config.iterations, initial=window.iteration)
    for iteration in progress:
        timer = metrics.PhaseTimer()
        key = jax.random.fold_in(jax.random.key(config.seed), iteration)
        plan = plans.make_plan(settings.plan, window)

        with timer("rollout"):
            batch = prompts[iteration]
            cond = programs.features(params["text_encoder"], policy.tokenize(batch["prompt"]))
            sampled, images = jax.block_until_ready(programs.rollout(state.params, plan, cond, key))

        with timer("reward"):
            texts, metadata = ([batch[key][group] for group in group_id] for key in ("prompt", "metadata"))
            scores = score_all(rewards, images, texts, metadata)
            advantage = advantages(scores, group_id, config.rewards, settings.advantage)

        with timer("update"):
            state, learned = programs.update(
                state, programs.reference(params), sampled.rows, advantage, group_id, cond, plan.train
            )
            learned = jax.device_get(learned)

        check_ratio(learned["ratio/max_deviation"][0], plan, config.ratio_tolerance)
        window = plans.advance(settings.plan, window)
        line = (
            metrics.means("reward", {name: scores[name] for name in config.rewards})
            | metrics.means("watched", {name: scores[name] for name in config.watched})
            | summarise(learned)
            | {"advantage/abs_mean": np.abs(advantage).mean()}
            | {"window/start": int(plan.start), "window/length": settings.plan.window_length}
            | {"nfe/rollout": int(sampled.evaluations), "nfe/update": len(plan.train) * settings.samples}
            | {"compilations": programs.compilations()}
        )
        done = iteration + 1
        if (config.evaluation.every and done % config.evaluation.every == 0) or done == config.iterations:
            with timer("evaluation"):
                after, scores_after = assess(state)
            line |= metrics.means("held_out", scores_after)
        with timer("checkpoint"):
            checkpoints.save(done, state, {"window": window._asdict()}, force=done == config.iterations)
        line |= timer.metrics() | metrics.throughput(line, timer, settings.samples, policy.flops, mesh.size)
        writer.write(done, line)
        progress.set_postfix(metrics.brief(line))
    progress.close()
    checkpoints.close()

    if after is None:  # the run was finished before
        after, scores_after = assess(state)
    print(f"before\n{table(scores_before, held_out.groups)}\nafter\n{table(scores_after, held_out.groups)}")
    pictures = {"before": before[:24], "after": after[:24]}
    report.grid(workdir / "before_after.png", pictures, held_out.prompts[:24])
    report.curve(workdir)
    return scores_after


class Programs(NamedTuple):
    """The compiled programs of a run."""

    init: Any  # jitted
    features: Any  # jitted
    rollout: Any  # jitted
    update: Any  # jitted
    reference: Callable[[Any], Any]

    def compilations(self) -> int:
        """Versions of the rollout and of the update compiled so far: two, if nothing moved that should be data."""
        return self.rollout._cache_size() + self.update._cache_size()


def make_programs(
    settings: Settings, parts: policies.Parts, params: Any, optimiser: optax.GradientTransformation, mesh: Any
) -> Programs:
    """Jit the iteration's programs for a mesh: parameters by the model's rules, samples over the batch axes."""
    policy = policies.make(parts, settings.config.model)
    frugal = policies.make(parts, settings.config.model, remat="none")  # a rollout keeps nothing, so recomputes nothing
    config = settings.config
    num_prompts, group, shared = config.batch.prompts, config.batch.group, config.batch.shared_noise
    whole: Any = meshes.replicated(mesh)
    by_sample: Any = meshes.batch_sharding(mesh, settings.samples)
    by_row: Any = meshes.batch_sharding(mesh, settings.samples, axis=1)
    rows = Rows(by_row, by_row, by_row, whole, whole)

    @functools.partial(jax.jit, out_shardings=(Rollout(by_sample, rows, whole), by_sample))
    def run_rollout(params, plan, cond, key) -> tuple[Rollout, Array]:
        noise_key, step_key = jax.random.split(key)
        repeats = 1 if shared else group
        cond = jax.tree.map(lambda a: jnp.repeat(a, repeats, axis=0), cond)
        ids = jnp.arange(num_prompts * repeats)
        sampled = rollout(
            frugal.velocity,
            params,
            plan,
            initial_noise(settings.sampler, noise_key, ids, policy.latent_shape),
            cond,
            step_key,
            sampler=settings.sampler,
            window_length=settings.plan.window_length,
            group_size=group // repeats,
        )
        return sampled, policy.codec.decode(sampled.x0)

    objective = objectives.grpo(policy.velocity, settings.sampler, settings.objective)
    update = make_update(
        objective,
        optimiser,
        num_updates=config.batch.updates,
        micro_batch=config.batch.micro_batch,
        ema_decay=config.optimizer.ema_decay,
    )

    fresh = functools.partial(init_state, optimiser=optimiser)
    place = meshes.shardings(jax.eval_shape(fresh, params), policies.RULES, mesh)
    return Programs(
        init=jax.jit(fresh, out_shardings=place),
        features=jax.jit(policy.features, out_shardings=meshes.batch_sharding(mesh, num_prompts)),
        rollout=run_rollout,
        # The state must leave as it came: in another layout, it would compile both programs again.
        update=jax.jit(update, donate_argnums=(0,), out_shardings=(place, whole)),
        reference=lambda params: params["transformer"] if settings.objective.kl_reference else None,
    )


def make_optimiser(options: Any) -> optax.GradientTransformation:
    """AdamW behind gradient-norm clipping, with linear warm-up to a constant rate."""
    rate = options.learning_rate
    schedule = optax.linear_schedule(rate / options.warmup, rate, options.warmup - 1) if options.warmup > 1 else rate
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.adamw(schedule, options.b1, options.b2, options.eps, weight_decay=options.weight_decay),
    )


def check_ratio(deviation: np.ndarray, plan: plans.Plan, tolerance: float) -> None:
    """Stop unless an iteration's first update starts on policy: |ratio - 1| <= tolerance at every trained step [n]."""
    worst = int(np.argmax(np.where(np.isnan(deviation), np.inf, deviation)))
    if not deviation[worst] <= tolerance:
        step = int(plan.start + plan.train[worst])
        raise RuntimeError(
            f"rollout and update disagree: |ratio - 1| = {deviation[worst]:.3g} at step {step} (sigma "
            f"{plan.sigmas[step]:.4f}) before any update, over ratio_tolerance={tolerance:g}. Raise model.dtype's "
            "precision, or the tolerance if clip ranges are far above it"
        )


def summarise(learned: dict[str, np.ndarray]) -> dict[str, float]:
    """Metrics of the updates [U] or [U, n] as scalars.

    `ratio/max_deviation` is the first update's, zero up to rounding; `ratio/drift` is the largest of all updates'.
    """
    deviation = learned.pop("ratio/max_deviation")
    scalars = {name: values.mean() for name, values in sorted(learned.items())}
    return scalars | {"ratio/max_deviation": deviation[0].max(), "ratio/drift": deviation.max()}


def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(main)
