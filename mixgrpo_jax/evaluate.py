"""Score policies on prompts that they were not trained on.

    python -m mixgrpo_jax.evaluate --workdir=runs/quickstart
    python -m mixgrpo_jax.evaluate --workdir=runs/quickstart --against=base
    python -m mixgrpo_jax.evaluate --workdir=runs/quickstart --policy=25 --samples=4 --rewards=config,brisque
    python -m mixgrpo_jax.evaluate --workdir=out --config=configs/flux_dev.py --policy=adapters/ --prompts=mine.txt

A policy is "newest", the newest checkpoint in workdir; "base", the model that its run began with; an iteration that a
checkpoint is kept of; or what lies elsewhere: a model's folder, a transformer, or adapters (LoRA) for the config's
model. The config is that of the run (or --config), whose fields are flags: `--config.evaluation.average=''` takes the
raw parameters, and `--config.evaluation.solver=dpm_midpoint --config.evaluation.num_steps=10` another sampler.

Prints mean scores with 95 % intervals; with --against, the change of each for the same prompts and noise. Writes to
workdir/evaluation scores.csv, of every picture, and scores.json, which has the intervals and settings too; pictures as
NNNN.png, numbered as in scores.csv, and those of --against in before/. held_out.png in workdir has the first ones.
"""

from mixgrpo_jax.runtime import progress

if __name__ == "__main__":
    progress.begin()  # the imports below take seconds

import csv
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging

from mixgrpo_jax import config as configs
from mixgrpo_jax.config import Settings
from mixgrpo_jax.data import prompts as prompt_sources
from mixgrpo_jax.engine import fields
from mixgrpo_jax.engine.held_out import HeldOut, table
from mixgrpo_jax.engine.loading import load_policy, mesh_of, model_at, restore_trained
from mixgrpo_jax.engine.workdir import with_own_config
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.trainable import Trainable
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.scoring import build
from mixgrpo_jax.runtime import app, distributed, report
from mixgrpo_jax.runtime.files import Path, place, replaced
from mixgrpo_jax.runtime.intervals import bootstrap, paired
from mixgrpo_jax.runtime.metrics import scored

NEWEST, BASE = "newest", "base"
CONFIG = "config"  # stands for the rewards of the config, among others
FOLDER = "evaluation"
# What a table shows of a score.
MEAN = {"n": "{n}", "mean": "{mean:.3f}", "95 % interval": "{low:.3f} to {high:.3f}"}
CHANGE = {"n": "{n}", "before": "{before:.3f}", "after": "{after:.3f}", "change": "{change:+.3f}"}
CHANGE |= {"95 % interval": "{low:+.3f} to {high:+.3f}", "improved": "{improved:.0%}", "worsened": "{worsened:.0%}"}


class Scored(NamedTuple):
    """A policy's pictures [N k, H, W, 3] and scores {name: [N k]}, k samples of each prompt, and where it is from."""

    source: str
    images: np.ndarray
    scores: dict[str, np.ndarray]


def evaluate(
    config: Any,
    workdir: str | os.PathLike,
    *,
    policy: str = NEWEST,
    against: str = "",
    prompts: str = "",
    rewards: Sequence[str] = (CONFIG,),
    samples: int = 1,
    pictures: int = 100,
) -> dict[str, float]:
    """Score a policy, print the table, and write what the module says; returns the mean scores.

    Args:
        config: of the run; its section `evaluation` says how pictures are drawn.
        workdir: of the run, and where results go.
        policy: which one, see the module.
        against: the one that it is compared with, likewise; "" is none.
        prompts: a file of prompts and what its rewards need to know, see `data.prompts.read`, of which all are taken;
            "" is the task's own, evaluation.prompts of them.
        rewards: by name. "config" stands for those that the config trains on or watches; options are its
            `reward_options`.
        samples: pictures of each prompt. Of several, their diversity is a score too, see `HeldOut`.
        pictures: so many are written one by one, at most.

    Raises ValueError for a policy or a reward that is not there, prompts that cannot be read, and policies of which one
    draws larger pictures than the other.
    """
    for name, value, least in (("samples", samples, 1), ("pictures", pictures, 0)):
        if value < least:
            raise configs.ConfigError(f"{name}={value}: it must be at least {least}")
    configs.resolve(config)
    listed = prompt_sources.read(prompts, split="test") if prompts else None
    own = [*config.rewards, *config.watched]
    names = dict.fromkeys(name for given in rewards for name in (own if given == CONFIG else [given]))
    built = build(names, config.reward_options)
    policies = {"against": against, "policy": policy} if against else {"policy": policy}
    try:
        held_out, found = _assess(config, workdir, policies, rewards=built, listed=listed, samples=samples)
    except KeyError as error:
        notes = " ".join(getattr(error, "__notes__", ()))  # of a reward, where it is one's
        if not (prompts and notes):
            raise
        raise configs.ConfigError(
            f"prompts={prompts!r}: a prompt has no {error}. {notes} Give each prompt what it needs, in .jsonl, or name "
            "other rewards by --rewards"
        ) from error
    if distributed.is_first():
        results = Results(held_out, *reversed(found))
        sampler = f"{config.evaluation.num_steps} steps of {config.evaluation.solver}"
        progress.say(f"{' against '.join(each.source for each in reversed(found))}, {sampler}\n{results.table()}")
        given = {"prompts": prompts or config.data.name, "seed": config.seed, "model": config.model.to_dict()}
        given |= {"evaluation": config.evaluation.to_dict()}
        results.write(place(workdir) / FOLDER, pictures, given)
        report.save_png(place(workdir) / "held_out.png", report.tile(results.after.images[:96], columns=8))
    return {name: float(scored(values).mean()) for name, values in found[-1].scores.items()}


class Opened(NamedTuple):
    """A model on the mesh, and the prompts that it is scored on."""

    settings: Settings
    parts: Parts
    trainable: Trainable
    frozen: dict[str, Any]
    held_out: HeldOut

    def scored(self, workdir: str | os.PathLike, **which: Any) -> Scored:
        """What its parameters give, those of a checkpoint or of before training, see `restore_trained`."""
        trained, source = restore_trained(self.settings, self.parts, workdir, self.trainable.params, **which)
        return Scored(source, *self.held_out.assess(trained, self.frozen))


def _open(settings: Settings, mesh: Any, rewards: Sequence[Reward], listed: Any, samples: int) -> Opened:
    text = listed is not None or settings.data.name != "features"
    parts, policy, trainable, frozen = load_policy(settings, mesh, text=text)
    held_out = HeldOut(settings, policy, rewards, trainable.attach, listed, samples)
    return Opened(settings, parts, trainable, frozen, held_out)


def _assess(
    config: Any, workdir: str | os.PathLike, policies: Mapping[str, str], **prompts: Any
) -> tuple[HeldOut, list[Scored]]:
    """The prompts, and what each policy gives for them, by its flag's name."""
    mesh, found, shapes = mesh_of(configs.resolve(config)), list[Scored](), set()
    opened: Opened | None = None
    with jax.set_mesh(mesh):
        for field, name in policies.items():
            step = int(name) if name.isdigit() else None
            of_run = name in (NEWEST, BASE) or step is not None
            settings = configs.resolve(config if of_run else model_at(config, name, field))
            if opened is None or opened.settings.model != settings.model:
                opened = None  # two models may be more than memory holds
                opened = _open(settings, mesh, **prompts)
            shapes.add(opened.held_out.policy.latent_shape)
            if len(shapes) > 1:
                raise ValueError(
                    f"{field}={name!r}: its latents and those of what it is compared with have the shapes "
                    f"{', '.join(map(str, shapes))}, and cannot begin from the same noise"
                )
            found.append(opened.scored(workdir, base=name != NEWEST and step is None, step=step))
    assert opened is not None
    return opened.held_out, found


@dataclass(frozen=True, eq=False)
class Results:
    """What a policy gives for prompts, and where there is one, another policy before it."""

    held_out: HeldOut
    after: Scored
    before: Scored | None = None

    def by_prompt(self, of: Scored) -> dict[str, np.ndarray]:
        """Scores {name: [N]}, the mean of each prompt's samples that have one; NaN where none has."""
        k = self.held_out.samples
        rows = {name: np.ma.masked_invalid(value.reshape(-1, k).astype(float)) for name, value in of.scores.items()}
        return {name: row.mean(1).filled(np.nan) for name, row in rows.items()}

    @functools.cached_property
    def intervals(self) -> dict[str, dict[str, Any]]:
        """Of each score the prompts that have one, the mean and its interval."""
        scores = self.by_prompt(self.after)
        return {name: {"n": int((~np.isnan(v)).sum()), **bootstrap(v)._asdict()} for name, v in scores.items()}

    @functools.cached_property
    def changes(self) -> dict[str, dict[str, Any]]:
        """Of each score the prompts that have both, and how it changed, see `paired`; none without a policy before."""
        if self.before is None:
            return {}
        before, result = self.by_prompt(self.before), {}
        for name, after in self.by_prompt(self.after).items():
            found = paired(before[name], after)._asdict()
            _, low, high = found["change"]
            n = int((~np.isnan(after - before[name])).sum())
            result[name] = {"n": n, **found, "change": found["after"] - found["before"], "low": low, "high": high}
        return result

    def table(self) -> str:
        """Each score's mean with its interval, or its change; then means, or changes, by group."""
        columns, rows = (CHANGE, self.changes) if self.before else (MEAN, self.intervals)
        cells = [["", *columns]]
        cells += [[name, *(form.format(**row) for form in columns.values())] for name, row in rows.items()]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
        if any(self.held_out.groups):
            shown = self.by_prompt(self.after)
            if self.before:
                before = self.by_prompt(self.before)
                shown = {name: value - before[name] for name, value in shown.items()}
            lines += ["", "changes by group" if self.before else "by group", table(shown, self.held_out.groups)]
        return "\n".join(lines)

    def write(self, folder: Path, pictures: int, settings: Mapping[str, Any]) -> None:
        """scores.csv, scores.json with the settings, and so many pictures, into a folder."""
        k, scores = self.held_out.samples, dict(self.after.scores)
        if self.before:
            scores |= {f"before/{name}": value for name, value in self.before.scores.items()}
        rows = [
            {"id": i, "prompt": self.held_out.prompts[i // k], "sample": i % k}
            | {name: _plain(value[i]) for name, value in scores.items()}
            for i in range(len(self.after.images))
        ]
        about = dict(settings, policy=self.after.source, against=self.before and self.before.source, samples=k)
        about |= dict(scores=self.intervals, change=self.changes)
        about |= dict(pictures=[row | {"groups": self.held_out.groups[row["id"] // k]} for row in rows])
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / "scores.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        with replaced(folder / "scores.json") as draft:
            draft.write_text(json.dumps(_plain(about), indent=1) + "\n")
        for into, of in ((folder, self.after), (folder / "before", self.before)):
            for old in into.glob("[0-9]*.png"):  # of an evaluation that wrote more
                old.unlink()
            for i, image in enumerate(of.images[:pictures] if of else ()):
                into.mkdir(exist_ok=True)
                report.save_png(into / f"{i:04}.png", image)


def _plain(value: Any) -> Any:
    """As JSON has it: numbers to six digits, null for what is not finite."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


@distributed.joined()
def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)
    evaluate(
        _CONFIG.value,
        _WORKDIR.value,
        policy=_POLICY.value,
        against=_AGAINST.value,
        prompts=_PROMPTS.value,
        rewards=_REWARDS.value,
        samples=_SAMPLES.value,
        pictures=_PICTURES.value,
    )


if __name__ == "__main__":
    _CONFIG = app.config_flag(fields.listed)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, and of the results.", required=True)
    _POLICY = flags.DEFINE_string("policy", NEWEST, "newest, base, an iteration, or a model's folder or LoRA file.")
    _AGAINST = flags.DEFINE_string("against", "", "Compare with this policy, named likewise.")
    _PROMPTS = flags.DEFINE_string(
        "prompts", "", "File of prompts (.txt, .jsonl); by default the task's held-out ones."
    )
    _REWARDS = flags.DEFINE_list("rewards", [CONFIG], "Rewards by name; config stands for all of the config's.")
    _SAMPLES = flags.DEFINE_integer("samples", 1, "Pictures of each prompt; of several, their diversity is scored.")
    _PICTURES = flags.DEFINE_integer("pictures", 100, "So many pictures are written one by one.")
    app.run(main, with_own_config(sys.argv))
