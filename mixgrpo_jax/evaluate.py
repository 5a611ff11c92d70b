"""Score a policy on held-out prompts.

    python -m mixgrpo_jax.evaluate --workdir=runs/quickstart

Uses the newest checkpoint in workdir (with --base the model's folder), and the config of its run (or --config), whose
fields are flags: `--config.evaluation.average=''` takes the raw parameters, and
`--config.evaluation.solver=dpm_midpoint --config.evaluation.num_steps=10` another sampler.
"""

from mixgrpo_jax.runtime import progress

if __name__ == "__main__":
    progress.begin()  # the imports below take seconds

import os
import sys
from typing import Any

from absl import flags, logging

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.fields import listed
from mixgrpo_jax.engine.held_out import HeldOut, table
from mixgrpo_jax.engine.loading import load_policy, load_rewards, mesh_of, restore_trained
from mixgrpo_jax.engine.workdir import with_own_config
from mixgrpo_jax.runtime import app, distributed, report
from mixgrpo_jax.runtime.files import place
from mixgrpo_jax.runtime.metrics import scored


def evaluate(config: Any, workdir: str | os.PathLike, *, base: bool = False) -> dict[str, float]:
    """Score, print the table, write the pictures to `workdir`/held_out.png; returns the mean scores.

    With `base` the policy is not what the run in `workdir` has trained, but what it began with.
    """
    settings = configs.resolve(config)
    text = config.data.name != "features"
    mesh = mesh_of(settings)
    parts, policy, trainable, frozen = load_policy(settings, mesh, text=text)
    trained, source = restore_trained(settings, parts, workdir, trainable.params, base)
    held_out = HeldOut(settings, policy, load_rewards(settings), trainable.attach)
    images, scores = held_out.assess(trained, frozen)
    if distributed.is_first():
        print(f"{source}, {config.evaluation.num_steps} steps of {config.evaluation.solver}")
        print(table(scores, held_out.groups))
        place(workdir).mkdir(parents=True, exist_ok=True)
        report.save_png(place(workdir) / "held_out.png", report.tile(images[:96], columns=8))
    return {name: float(scored(values).mean()) for name, values in scores.items()}


@distributed.joined()
def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)
    evaluate(_CONFIG.value, _WORKDIR.value, base=_BASE.value)


if __name__ == "__main__":
    _CONFIG = app.config_flag(listed)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    _BASE = flags.DEFINE_bool("base", False, "Take the model's folder, as it was before training.")
    app.run(main, with_own_config(sys.argv))
