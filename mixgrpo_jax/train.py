"""Post-train a policy against rewards: MixGRPO and its relatives.

    python -m mixgrpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Any field of the config is a flag: `--config.optimizer.learning_rate=1e-4`. A run that was stopped goes on where its
last checkpoint is. In workdir: config.json, metrics.jsonl (a line an iteration), checkpoints/, before_after.png and
rewards.png.
"""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from clu import parameter_overview
from ml_collections import config_flags
from tqdm import tqdm

from mixgrpo_jax import config as configs
from mixgrpo_jax.config import Settings
from mixgrpo_jax.engine.collect import Drawing, Drawn
from mixgrpo_jax.engine.programs import make_programs
from mixgrpo_jax.evaluate import Assessment, HeldOut, load_policy, table
from mixgrpo_jax.flow import plans
from mixgrpo_jax.rewards.scoring import build
from mixgrpo_jax.rl.advantages import advantages
from mixgrpo_jax.runtime import distributed, metrics, report
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.checkpoint import Checkpoints
from mixgrpo_jax.tasks import load_task


def train(config: Any, workdir: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Run the config's iterations in `workdir`; returns the held-out scores {name: [N]} of the result.

    Of several processes, each must find `workdir` at the same place.
    """
    if "://" in str(workdir):
        raise configs.ConfigError(f"workdir={str(workdir)!r} is no folder: mount the bucket, and name the folder there")
    settings, mesh = configs.resolve(config), meshes.make_mesh(config.mesh)
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint = settings.config.checkpoint
    # The mesh is set for the attention kernels that are placed by hand. A run that fails finishes the save under way.
    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(workdir, checkpoint.every, checkpoint.keep)) as checkpoints:
        return _train(settings, workdir, mesh, checkpoints)


def _train(settings: Settings, workdir: pathlib.Path, mesh: Any, checkpoints: Checkpoints) -> dict[str, np.ndarray]:
    config, first = settings.config, distributed.is_first()
    task = load_task(config.data.name)
    prompts = task.batches(task.load("train", config.data.folder), config.seed, config.batch.prompts)
    rewards = build(dict.fromkeys([*config.rewards, *config.watched]), config.reward_options)
    group_id = np.repeat(np.arange(config.batch.prompts), config.batch.group)

    # The policy, what is trained of it, and the programs of an iteration.
    parts, policy, trainable, frozen = load_policy(settings, mesh, master=True, text=config.data.name != "features")
    if first:
        print(parameter_overview.get_parameter_overview(trainable.params, include_stats=False))
        print(settings.arithmetic())
    programs = make_programs(settings, parts, trainable, mesh)
    drawing = Drawing(settings, policy, programs, frozen, prompts, rewards, group_id, mesh)
    held_out = HeldOut(config, policy, trainable.attach)

    # Start, or resume; the window, and with it the whole host state, is in the checkpoint.
    state, window = programs.init(trainable.params), plans.initial_state(settings.plan)
    upcoming: Drawn | None = None  # samples that are drawn already, by the parameters of before the last update
    if checkpoints.latest is not None:
        state, host = checkpoints.restore(state)
        window = plans.WindowState(**host["window"])
        if config.one_step_off_policy and checkpoints.has_samples():
            upcoming = drawing.start(state.params, window, saved=checkpoints)
        before = Assessment.load(workdir / "before.npz")
    else:
        before = held_out.assess(state.params, frozen)
        if first:
            (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
            before.save(workdir / "before.npz")
    writer = metrics.MetricWriter(workdir, resume_at=window.iteration)
    if window.iteration == 0:
        writer.write(0, metrics.means("held_out", before.scores))

    after = None
    iterations = range(window.iteration, config.iterations)
    progress = tqdm(iterations, "train", config.iterations, initial=window.iteration, disable=not first)
    for iteration in progress:
        timer, done = metrics.PhaseTimer(), iteration + 1

        with timer("rollout"):
            on_policy = upcoming is None
            drawn = upcoming or drawing.start(state.params, window)
            jax.block_until_ready(drawn.sampled)
            window, upcoming = plans.advance(settings.plan, window), None
            if config.one_step_off_policy and done < config.iterations:
                upcoming = drawing.start(state.params, window)

        with timer("decode"):  # of the first pictures; the others are made while these are scored
            jax.block_until_ready(drawn.images[0])

        with timer("reward"):
            scores = {name: score.value for name, score in drawing.score(drawn).items()}
            advantage = advantages(scores, group_id, config.rewards, settings.advantage)

        with timer("rollout"):  # what of the next one the rewards did not hide
            jax.block_until_ready(upcoming and (upcoming.sampled, upcoming.images))

        with timer("update"):
            trained_on = drawn.sampled.rows, advantage, drawn.cond, drawn.plan.train
            state, learned = programs.update(state, frozen["base"], *trained_on)
            learned = jax.device_get(learned)

        check_ratio(learned["ratio/max_deviation"][0], drawn.plan, config.ratio_tolerance if on_policy else np.inf)
        line = describe(settings, drawn, scores, advantage, learned) | {"compilations": programs.compilations()}
        if done == config.iterations or (config.evaluation.every and done % config.evaluation.every == 0):
            with timer("evaluation"):
                after = held_out.assess(state.ema if config.evaluation.ema else state.params, frozen)
            line |= metrics.means("held_out", after.scores)
        with timer("checkpoint"):
            host, samples = {"window": window._asdict()}, upcoming and upcoming.sampled
            checkpoints.save(done, state, host, samples, force=done == config.iterations)
        cost = settings.samples, policy.flops, mesh.size, config.one_step_off_policy
        line |= timer.metrics() | metrics.throughput(line, timer, *cost)
        writer.write(done, line)
        progress.set_postfix(metrics.brief(line))

    if after is None:  # the run was finished before
        after = held_out.assess(state.ema if config.evaluation.ema else state.params, frozen)
    if first:
        print(f"before\n{table(before.scores, held_out.groups)}\nafter\n{table(after.scores, held_out.groups)}")
        pictures = {"before": before.images, "after": after.images}
        report.grid(workdir / "before_after.png", pictures, held_out.prompts[:24])
        report.curve(workdir)
    return after.scores


def describe(settings: Settings, drawn: Drawn, scores: dict, advantage: np.ndarray, learned: dict) -> dict[str, Any]:
    """An iteration's metrics: of its scores {name: [B]}, its advantages [B], its updates, and what it cost."""
    config = settings.config
    return (
        metrics.means("reward", {name: scores[name] for name in config.rewards})
        | metrics.means("watched", {name: scores[name] for name in config.watched})
        | summarise(learned)
        | {"advantage/abs_mean": np.abs(advantage).mean()}
        | {"window/start": int(drawn.plan.start), "window/length": settings.plan.window_length}
        | {"nfe/rollout": int(drawn.sampled.evaluations), "nfe/update": len(drawn.plan.train) * settings.samples}
    )


def check_ratio(deviation: np.ndarray, plan: plans.Plan, tolerance: float) -> None:
    """Stop unless an iteration's first update starts on policy: |ratio - 1| <= tolerance at every trained step [n].

    Samples of earlier parameters have no such tolerance: np.inf refuses a ratio that is NaN, and no other.
    """
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

    `ratio/max_deviation` is the first update's, zero up to rounding where samples are on policy; `ratio/drift` is the
    largest of all updates'.
    """
    deviation = learned.pop("ratio/max_deviation")
    scalars = {name: values.mean() for name, values in sorted(learned.items())}
    return scalars | {"ratio/max_deviation": deviation[0].max(), "ratio/drift": deviation.max()}


def main(_):  # noqa: D103
    distributed.initialize()
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(main)
