"""Post-train a policy against rewards: MixGRPO and its relatives.

    python -m mixgrpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Any field of the config is a flag: `--config.optimizer.learning_rate=1e-4`; a method is chosen by its recipe. A run that
was stopped goes on where its last checkpoint is. In workdir: config.json, metrics.jsonl (a line an iteration),
drawn/ (a table of samples an iteration), warnings.jsonl where monitors have warned, with pictures in warnings/,
checkpoints/, held_out/ (scores and pictures of each evaluation), before_after.png, rewards.png, and report.html, which
shows it all and is written anew at every evaluation; with profile.start a trace of some iterations, profile/. The
workdir may be in a bucket, gs://bucket/runs/flux, and so may data.folder. Beside it is jax_cache/, the compiled
programs, unless JAX_COMPILATION_CACHE_DIR says where: a run that starts again compiles what has changed.
"""

from mixgrpo_jax.runtime import progress

if __name__ == "__main__":
    progress.begin()  # the imports below take seconds

import collections
import contextlib
import dataclasses
import functools
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from mixgrpo_jax import config as configs
from mixgrpo_jax.config import Settings
from mixgrpo_jax.engine import drawn as tables
from mixgrpo_jax.engine import workdir as workdirs
from mixgrpo_jax.engine.collect import Collector, Drawn, Lesson
from mixgrpo_jax.engine.cost import Cost
from mixgrpo_jax.engine.fields import listed
from mixgrpo_jax.engine.held_out import Assessment, HeldOut, table
from mixgrpo_jax.engine.loading import host_state, load_policy, load_rewards, mesh_of, restore_run
from mixgrpo_jax.engine.monitors import Watch
from mixgrpo_jax.engine.programs import fit, idle, learning_rate, make_programs, rollout_fsdp
from mixgrpo_jax.flow.plans import Plan
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rewards.contract import Score
from mixgrpo_jax.rl.samples import Objective
from mixgrpo_jax.rl.select import Replay
from mixgrpo_jax.rl.update import TrainState
from mixgrpo_jax.runtime import app, boards, compiler, distributed, metrics, report
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.checkpoint import Checkpoints, Damaged, Finished, finished
from mixgrpo_jax.runtime.files import Path, locked, place
from mixgrpo_jax.runtime.page import refresh_report
from mixgrpo_jax.runtime.preemption import Notice, Stopped
from mixgrpo_jax.tasks import load_task


def train(config: Any, workdir: str | os.PathLike) -> dict[str, np.ndarray]:
    """Run the config's iterations in `workdir`, a folder or a bucket's URL; returns the held-out scores {name: [N]}.

    Of several processes, each must find `workdir` at the same place.
    """
    settings = configs.resolve(config)
    boards.check(settings.config.wandb)
    mesh, workdir = mesh_of(settings), place(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    notice = Notice()
    # The mesh is set for the attention kernels that are placed by hand.
    lock = locked(workdir) if distributed.is_first() else contextlib.nullcontext(lambda: None)
    with jax.set_mesh(mesh), notice.watched(), lock as check_lock:
        checkpoints = Checkpoints(workdir, **dataclasses.asdict(settings.checkpoint))
        with _closing(checkpoints):
            return _train(settings, workdir, mesh, checkpoints, notice, check_lock)


@contextlib.contextmanager
def _closing(writes: Checkpoints | metrics.MetricWriter) -> Iterator[None]:
    """Finish what is being written, also of a run that fails, whose error is then told."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            writes.close()
        raise
    writes.close()


def _train(
    settings: Settings,
    workdir: Path,
    mesh: Any,
    checkpoints: Checkpoints,
    notice: Notice,
    check_lock: Callable[[], None],
) -> dict[str, np.ndarray]:
    planner, total, begun = settings.planner, settings.config.iterations, time.monotonic()
    with progress.doing("reading the model and the prompts"):
        parts, collector, held_out, state = _set_up(settings, mesh)
    fresh = checkpoints.latest is None
    state, planned, upcoming, before = _begin(state, parts, collector, held_out, workdir, checkpoints)
    resume_at, after = None if fresh else planned.iteration, None
    writer = metrics.MetricWriter(workdir, resume_at, check_lock, settings.config.wandb, settings.config.to_dict())
    watch = Watch(collector, workdir, None if fresh else checkpoints.restore_host().get("monitors"))
    pace = metrics.Pace(total, begun - writer.seconds)
    checkpoints.before += [check_lock, writer.flush]
    if fresh and before:
        writer.write(0, metrics.means("held_out", before.scores) | pace.metrics(0), first_pictures(before.excerpt()))

    kept: Any = checkpoints.restore_samples if isinstance(settings.select, Replay) and not fresh else None
    last: Finished | None = None  # what can be saved, if it is not yet
    norms: collections.deque[float] = collections.deque(maxlen=50)  # of the last gradients
    timer = metrics.PhaseTimer()
    iterations = range(planned.iteration, total)
    shown, profile = progress.over(iterations, "iteration", total, planned.iteration), settings.profile
    with _closing(writer), notice.agreed(), _saving(checkpoints, notice, lambda: last):
        for iteration in metrics.traced(shown, workdir / "profile", profile.start, profile.iterations):
            done = iteration + 1

            with timer("rollout"):
                on_policy = upcoming is None
                drawn = upcoming or collector.take(state, planned)
                notice.wait(drawn.sampled)
                planned, upcoming = planner.advance(planned), None
                if settings.config.one_step_off_policy and done < total:
                    upcoming = collector.take(state, planned)

            with timer("decode"):  # of the first pictures; the others are made while these are scored
                notice.wait(drawn.images[0])
            notice.agree()

            with timer("reward"):
                scores = collector.score(drawn, waiting=functools.partial(_keep, checkpoints, notice, last))
                lesson = collector.learn(drawn, scores, kept)
                kept = lesson.kept
                monitored = watch.look(done, drawn, scores)
            notice.agree()

            with notice.held():  # the update takes the last state's buffers over
                with timer("rollout"):  # what of the next one the rewards did not hide
                    jax.block_until_ready(upcoming and (upcoming.sampled, upcoming.images))

                with timer("update"):
                    state, learned = collector.programs.update(state, collector.frozen["base"], *lesson.given)
                    learned = jax.device_get(learned)

                check_finite(learned, done)
                check_norms(norms, learned["grad_norm"], settings.config.optimizer.max_grad_ratio, done)
                check_on_policy(settings, learned, drawn.plan, on_policy)
                line = describe(settings, drawn, scores, lesson, learned) | collector.counts(drawn, learned) | monitored
                line, pictures = line | {"optimizer/learning_rate": learning_rate(settings, done)}, {}
                after = None
                if done == total or (settings.evaluation.every and done % settings.evaluation.every == 0):
                    with timer("evaluation"):
                        after = held_out.assess(chosen_average(settings, state), collector.frozen)
                        excerpt = held_out.keep(workdir, done, after)
                        line |= watch.compare(done, before, after)
                    line, pictures = line | metrics.means("held_out", after.scores), first_pictures(excerpt)
                host = host_state(planned) | {"monitors": watch.state}
                last = finished(done, state, host, upcoming.sampled if upcoming else kept, line)
                line |= timer.metrics() | throughput(settings, line, timer, collector.policy, mesh) | pace.metrics(done)
                tables.write(workdir, done, collector.asked(drawn)[0], scores, lesson.advantage)
                writer.write(done, line, pictures)  # before the save: a run that goes on has the line
                progress.say(metrics.brief(done, total, line))
                timer = metrics.PhaseTimer()  # a save's seconds are in the next line
                with timer("checkpoint"):
                    checkpoints.save(last, force=done == total or watch.stops)
                watch.check()
            notice.agree()
            if after and done < total:
                with timer("report"):
                    writer.flush()
                    refresh_report(workdir)

    if not after:  # it was finished before
        after = held_out.assess(chosen_average(settings, state), collector.frozen)
        held_out.keep(workdir, planned.iteration, after)
    if distributed.is_first():
        _report(workdir, held_out, before, after)
    return after.scores


@contextlib.contextmanager
def _saving(checkpoints: Checkpoints, notice: Notice, last: Callable[[], Finished | None]) -> Iterator[None]:
    """A run that is told to stop saves what is finished, and says so; what is not is discarded."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Stopped) and not notice.raised:
            raise
        stopped = error if isinstance(error, Stopped) else Stopped(notice.number, together=False)
        begun = time.monotonic()
        state = last()
        if state is not None:
            checkpoints.save(state, force=True)
        checkpoints.wait()
        if distributed.is_first():
            waited, took = begun - notice.since, time.monotonic() - begun
            saved = f"iteration {checkpoints.latest} is saved" if checkpoints.latest else "no iteration was finished"
            print(
                f"\n{stopped.name}: stopped after {waited:.1f} s, and {saved} after {took:.1f} s more, in "
                f"{checkpoints.directory}. Started again, the run goes on from there",
                file=sys.stderr,
                flush=True,
            )
        raise stopped from None


def _keep(checkpoints: Checkpoints, notice: Notice, last: Finished | None) -> None:
    """Save what is finished while reward servers are waited for. Several processes save together or not at all."""
    if last and jax.process_count() == 1:
        with notice.held():
            checkpoints.save(last, force=True)


def _set_up(settings: Settings, mesh: Any) -> tuple[Parts, Collector, HeldOut, TrainState]:
    """The policy's parts, what is trained of it, the rewards, and the programs of an iteration."""
    task, data = load_task(settings.data.name), settings.data
    with progress.doing("preparing the data"):  # which takes time once
        prompts = task.batches(task.load("train", data.folder), settings.config.seed, settings.batch.prompts)
    rewards = load_rewards(settings)
    parts, policy, trainable, frozen = load_policy(settings, mesh, master=True, text=data.name != "features")
    settings = fit(settings, parts, mesh)
    if distributed.is_first():
        sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in frozen.items()}
        trained = sum(leaf.size for leaf in jax.tree.leaves(trainable.params))
        kept = ", ".join(f"{size:,} of {name}" for name, size in sizes.items() if size)
        progress.say(f"{trained:,} parameters are trained, and {kept or 'none'} kept")
        progress.say(textwrap.fill(settings.arithmetic(meshes.batch_ways(mesh)), progress.COLUMNS))
        progress.say(compiler.describe(mesh.devices.flat))
        progress.say(meshes.describe(mesh, rollout_fsdp(settings, parts, mesh)))
        for note in idle(settings, mesh):
            progress.say(f"WARNING: {note}")
    programs = make_programs(settings, parts, trainable, mesh)
    collector = Collector(settings, policy, programs, frozen, prompts, rewards, mesh)
    held_out = HeldOut(settings, policy, rewards, trainable.attach, check=collector.check)
    return parts, collector, held_out, programs.init(trainable.params)


def _begin(
    state: TrainState,
    parts: Parts,
    collector: Collector,
    held_out: HeldOut,
    workdir: Path,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Any, Drawn | None, Assessment | None]:
    """The state of the policy and of the planner, samples that are drawn ahead, and the held-out scores of before.

    A run that was stopped resumes: the planner's state, and with it the whole host state, is in the checkpoint. One
    that is damaged is set aside.
    """
    settings, before = collector.settings, workdir / "before.npz"
    changed = workdirs.check(settings.config, workdir) if checkpoints.latest is not None else {}
    while checkpoints.latest is not None:
        damage = None
        try:
            found, planned = restore_run(checkpoints, state, settings.planner.initial(), parts.table)
            upcoming = None
            if settings.config.one_step_off_policy and checkpoints.has_samples():
                upcoming = collector.take(found, planned, saved=checkpoints)
        except Damaged as error:
            damage = error
        if distributed.anywhere(damage is not None):
            checkpoints.set_aside(str(damage or f"{checkpoints.folder} cannot be read by another process"))
            continue
        if distributed.is_first():
            progress.say(f"Resumed at iteration {planned.iteration}, from {checkpoints.folder}")
            if (total := settings.config.iterations) <= planned.iteration:
                progress.say(f"iterations={total} are finished, and nothing is trained: raise iterations")
        workdirs.record(settings.config, workdir, changed, planned.iteration)
        return found, planned, upcoming, Assessment.load(before)
    with progress.doing("before training"):
        assessment = held_out.assess(state.params, collector.frozen)
    held_out.keep(workdir, 0, assessment)
    workdirs.record(settings.config, workdir)
    if distributed.is_first():
        assessment.save(before)
    return state, settings.planner.initial(), None, assessment


def chosen_average(settings: Settings, state: TrainState) -> Any:
    """The parameters that are evaluated."""
    return state.averages[settings.evaluation.average] if settings.evaluation.average else state.params


def first_pictures(excerpt: Assessment) -> dict[str, np.ndarray]:
    """The first held-out pictures, on one page, as TensorBoard and Weights & Biases get them."""
    return {"held_out": report.tile(excerpt.images[:24], columns=4)}


def _report(workdir: Path, held_out: HeldOut, before: Assessment | None, after: Assessment) -> None:
    """What a person reads at the end: the scores, what to try next, and, as the last lines, where the files are."""
    shown = {"before": before, "after": after} if before else {"after": after}
    with progress.doing("drawing figures"):
        pictures = {when: assessment.images for when, assessment in shown.items()}
        report.grid(workdir / "before_after.png", pictures, held_out.prompts[:24])
        report.curve(workdir)
        refresh_report(workdir)
    progress.say("\n" + table(after.scores, held_out.groups, before and before.scores) + "\n")
    prompt = shlex.quote(held_out.prompts[0])
    progress.say(f"next: python -m mixgrpo_jax.sample --workdir={shlex.quote(str(workdir))} --prompt={prompt}\n")
    paths = {
        "metrics": "metrics.jsonl",
        "curve": "rewards.png",
        "pictures": "before_after.png",
        "report": "report.html",
    }
    for what, name in paths.items():
        progress.say(f"{what + ':':<10}{workdir / name}")


def describe(
    settings: Settings, drawn: Drawn, scores: Mapping[str, Score], lesson: Lesson, learned: dict[str, np.ndarray]
) -> dict[str, Any]:
    """An iteration's metrics: of its scores, its advantages, its updates, and what it cost in evaluations."""
    values = {name: score.value for name, score in scores.items()}
    by_group = np.nan_to_num(lesson.advantage).reshape(settings.batch.prompts, -1)
    stochastic = [(s, steps) for s, steps in zip(settings.planner.layout, drawn.plan.segments) if s.sde]
    line = (
        metrics.means("reward", {name: values[name] for name in settings.rewards}, settings.batch.prompts)
        | metrics.means("watched", {name: values[name] for name in settings.config.watched}, settings.batch.prompts)
        | summarise(learned, settings.objective)
        | {"advantage/abs_mean": np.abs(metrics.scored(lesson.advantage)).mean()}
        | {"advantage/missing": int(np.isnan(lesson.advantage).sum())}
        | {"advantage/flat_groups": int((by_group == 0).all(1).sum())}  # which teach nothing
    )
    if stochastic:  # where it begins first, of all prompts
        line |= {"window/start": int(stochastic[0][1].address[0].min())}
        line |= {"window/length": sum(segment.steps for segment, _ in stochastic)}
    return line


def check_finite(learned: Mapping[str, np.ndarray], iteration: int) -> None:
    """Stop where an update's metrics, among them the norms of gradients and parameters, are not finite; nothing of the
    iteration is saved."""
    for update in range(len(learned["grad_norm"])):
        for name, values in sorted(learned.items()):
            if not name.startswith("nfe/") and not np.isfinite(values[update]).all():
                raise RuntimeError(
                    f"iteration {iteration}, update {update + 1}: {name} is not finite, with grad_norm="
                    f"{learned['grad_norm'][update]:.3g}. Nothing of this iteration is saved. Lower "
                    "optimizer.learning_rate or optimizer.max_grad_norm, and start the run again: it goes on where it "
                    "was saved last"
                )


def check_norms(norms: collections.deque[float], found: np.ndarray, limit: float, iteration: int) -> None:
    """Stop where an update's gradient is far above those before; nothing of the iteration is saved. Adds it to them."""
    for update, norm in enumerate(found.tolist()):
        usual = float(np.median(norms)) if len(norms) >= 10 else 0.0  # fewer say little
        if limit and usual and norm > limit * usual:
            raise RuntimeError(
                f"iteration {iteration}, update {update + 1}: grad_norm={norm:.3g} is {norm / usual:.0f} times the "
                f"median of the last {len(norms)}, {usual:.3g}, over optimizer.max_grad_ratio={limit:g}. Nothing of "
                "this iteration is saved. Look at its rewards, lower optimizer.learning_rate or raise the bound, and "
                "start the run again"
            )
        norms.append(norm)


def check_on_policy(settings: Settings, learned: Mapping[str, np.ndarray], plan: Plan, on_policy: bool) -> None:
    """Stop unless an iteration's first update starts on policy: what must be 0 is within its tolerance everywhere.

    Samples of earlier parameters have no such tolerance: there, what is NaN is refused, and nothing else.
    """
    for name, field in settings.objective.on_policy.items():
        if name not in learned:
            continue
        if settings.config.one_step_off_policy:  # the ratio is to what the rollout's program says, also at first
            field = "rollout_tolerance"
        tolerance = settings.config[field] if on_policy else np.inf
        deviation = learned[name][0]  # by place
        worst = int(np.argmax(np.where(np.isnan(deviation), np.inf, deviation)))
        if not deviation[worst] <= tolerance:
            remedy = "raise model.dtype's precision, or the tolerance if this is rounding"
            if field == "ratio_tolerance":
                remedy += (
                    "; objective.old_log_prob='update' takes the log-probs of before from the update's own program"
                )
            raise RuntimeError(
                f"rollout and update disagree: {name} = {deviation[worst]:.3g} at step {plan.step[worst].min()} (sigma "
                f"{plan.sigma[worst].max():.4f}) before any update, over {field}={tolerance:g}: {remedy}"
            )


def summarise(learned: Mapping[str, np.ndarray], objective: Objective) -> dict[str, float]:
    """Metrics of the updates [U] or [U, n] as scalars.

    What must be 0 on policy is the first update's, and `ratio/drift` is the largest of all updates'.
    """
    result = {}
    for name, values in sorted(learned.items()):
        if name.startswith("nfe/"):
            continue
        result[name] = values[0].max() if name in objective.on_policy else values.mean()
    if "ratio/max_deviation" in learned:
        result["ratio/drift"] = learned["ratio/max_deviation"].max()
    return result


def throughput(
    settings: Settings, line: Mapping[str, Any], timer: metrics.PhaseTimer, policy: Policy, mesh: Any
) -> dict[str, float]:
    """Pictures a second, and the share of the devices' peak where that is known; what is recomputed does not count."""
    cost = Cost(line["nfe/rollout"], line["nfe/update"], line["nfe/gradient"])
    flops = policy.flops * sum(cost.work(adapters=settings.model.lora.rank > 0).values())
    return metrics.throughput(timer, settings.samples, flops, mesh.size, settings.config.one_step_off_policy)


@distributed.joined()
def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    compiler.keep_beside(_WORKDIR.value)
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = app.config_flag(listed)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(main)
