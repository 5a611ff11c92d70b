"""A config's policy on a mesh, and what a run has trained of it."""

import copy
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mixgrpo_jax.config import Settings, refusing
from mixgrpo_jax.engine.workdir import check
from mixgrpo_jax.models import families, lora, lora_files
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.weights import Rule
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.models.trainable import Trainable, make_trainable
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.scoring import build
from mixgrpo_jax.rl.update import TrainState
from mixgrpo_jax.runtime import distributed
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.checkpoint import Checkpoints
from mixgrpo_jax.tasks import load_task


def mesh_of(settings: Settings) -> Any:
    """The config's mesh over all devices. Raises ConfigError where it does not fill them."""
    with refusing():
        return meshes.make_mesh(settings.config.mesh, samples=settings.update_samples)


def load_policy(
    settings: Settings, mesh: Any, *, master: bool = False, text: bool = True
) -> tuple[Parts, Policy, Trainable, dict[str, Any]]:
    """A config's model on a mesh: its parts, the policy, what is trained of it, and its other parameters by part.

    The other parameters hold the trainable's base as "base". `master` takes fully trained parameters in the optimiser's
    dtype; otherwise they keep the file's, as adapters' base and encoders do anyway. Without `text` the text encoders
    stay away: the data have their features.

    Says where the schedule is not that of the model's own scheduler. Raises ValueError for a folder that cannot be
    read, and for features of another negative prompt.
    """
    options, config = settings.model, settings.config
    if not text and options.guidance > 1:
        load_task(settings.data.name).check_negative(settings.data.folder, options.negative_prompt)
    parts, params = families.load(
        options.folder,
        transformer=options.transformer,
        text=text,
        dtype=jnp.dtype(settings.optimizer.dtype) if master and not options.lora.rank else None,
        place=lambda tree, rules: meshes.shardings(tree, rules, mesh),
    )
    own = parts.fixed_shift
    for field, shift in ("plan.shift", config.plan.shift), ("evaluation.shift", config.evaluation.shift):
        if own is not None and shift != own and distributed.is_first():
            scheduler = f"{options.folder}/{families.SCHEDULER}"
            print(f"WARNING: {field}={shift}, and {scheduler} has shift={own}: set it so, unless you mean otherwise")
    key = jax.random.key(config.seed)
    trainable = make_trainable(parts, params.pop("transformer"), options.lora, key, settings.keep_base)
    return parts, parts.family.make(parts, options), trainable, params | {"base": trainable.base}


def load_rewards(settings: Settings) -> list[Reward]:
    """The rewards of a config, those that are trained on and those that are watched. A command builds them once."""
    config = settings.config
    return build(dict.fromkeys([*config.rewards, *config.watched]), config.reward_options)


# Of what a checkpoint holds. 2 had the channels of heads in released files' order, see `weights.halves`; 1 as well, and
# it had the average "ema" as a field, and called the planner's state window.
VERSION = 3

# Adafactor's second moments are means over one of a parameter's two longest axes: its place in the order of lengths.
FACTORED = {"v_row": -1, "v_col": -2}


def host_state(planned: Any) -> dict[str, Any]:
    """What a checkpoint holds of the host: the planner's state, and the version of the whole."""
    return {"version": VERSION, "planned": planned._asdict()}


def restore_run(
    checkpoints: Checkpoints, state: TrainState, planned: Any, table: Sequence[Rule]
) -> tuple[TrainState, Any]:
    """The newest state, and the planner's, laid out as these; of an earlier version, they are converted.

    `table` is of the transformer's tensors. Raises ValueError for a later version, or for what cannot be converted, and
    `Damaged`.
    """
    host = checkpoints.restore_host()
    version = version_of(host, checkpoints)
    if version > 1:
        restored, planned = checkpoints.restore(state), type(planned)(**host["planned"])
    else:
        restored, planned = _restore_first(checkpoints, state), type(planned)(**host["window"])
    if version < 3:
        restored = TrainState(
            converted(restored.params, version, table),
            _moments(restored.opt_state, state.params, table, checkpoints),
            {name: converted(average, version, table) for name, average in restored.averages.items()},
            restored.step,
        )
    return _finite(restored, checkpoints), planned


def _restore_first(checkpoints: Checkpoints, state: TrainState) -> TrainState:
    """A state of version 1."""
    if checkpoints.has_samples():
        raise ValueError(
            f"{checkpoints.folder}: version 1 of mixgrpo_jax's checkpoints holds samples of another layout. "
            "Remove its folder samples/, and they are drawn anew; or finish the run with the version it was begun with"
        )
    if others := sorted(state.averages.keys() - {"ema"}):
        raise ValueError(
            f"{checkpoints.folder}: version 1 of mixgrpo_jax's checkpoints has no averages.{others[0]}: begin "
            "the run anew"
        )
    old = {"params": state.params, "opt_state": state.opt_state, "ema": state.averages.get("ema"), "step": state.step}
    found = checkpoints.restore(old)
    averages = {name: found["ema"] for name in state.averages}
    return TrainState(found["params"], found["opt_state"], averages, found["step"])


def converted(trained: Any, version: int, table: Sequence[Rule]) -> Any:
    """Trained parameters (arrays or `Lazy`) of a checkpoint of a version, as they are laid out now.

    `table` is of the transformer's tensors; where adapters are trained, their rules follow from it.
    """
    return trained if version > 2 else weights.reordered([*table, *lora_files.rules(table)], trained, weights.halves)


def _moments(opt_state: Any, params: Any, table: Sequence[Rule], checkpoints: Checkpoints) -> Any:
    """An optimiser's state of version 1 or 2, as it is laid out now."""
    rotary = {rule.ours: rule.heads for rule in (*table, *lora_files.rules(table)) if rule.rotary}
    leaves = traverse_util.flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in leaves.items() if path in rotary}

    def convert(path: Any, leaf: Any) -> Any:
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        of = next((path for path in shapes if name.endswith(f"/{path}")), None)
        if of is None or leaf.shape == (1,):  # Adafactor's place of a moment that it keeps otherwise
            return leaf
        shape, field = shapes[of], name.removesuffix(f"/{of}").split("/")[-1]
        if leaf.shape != shape:
            axis = int(np.argsort(shape)[FACTORED[field]]) if field in FACTORED else None
            if axis is None or leaf.shape != shape[:axis] + shape[axis + 1 :]:
                raise ValueError(
                    f"{checkpoints.folder} is of an earlier version of mixgrpo_jax, and its optimiser's {name[1:]} of "
                    f"shape {leaf.shape} is not known: finish the run with the version it was begun with"
                )
            if axis == len(shape) - 1:
                return leaf
        return weights.reorder(leaf, weights.halves, *rotary[of])

    return jax.tree_util.tree_map_with_path(convert, opt_state)


def _finite(tree: Any, checkpoints: Checkpoints) -> Any:
    """What was restored. Raises ValueError where a number in it is not finite."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not jax.jit(lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all())(numbers):
        raise ValueError(
            f"{checkpoints.folder} holds parameters that are not finite: remove it, and the one before is taken"
        )
    return tree


def version_of(host: dict[str, Any], checkpoints: Checkpoints) -> int:
    """Of the newest checkpoint, whose host state is given. Raises ValueError for a later one than is known here."""
    version = host.get("version", 1)
    if version > VERSION:
        raise ValueError(
            f"{checkpoints.folder} is version {version} of mixgrpo_jax's checkpoints, and this is {VERSION}: install a "
            "later mixgrpo_jax"
        )
    return version


def restore_trained(
    settings: Settings,
    parts: Parts,
    workdir: str | os.PathLike,
    trained: Any,
    base: bool = False,
    step: int | None = None,
) -> tuple[Any, str]:
    """Trained parameters (an average or raw) from the newest checkpoint of workdir, or that of an iteration, `step`.

    With `base` they are those given, from before training. Second comes where they are from, in words. Raises
    ValueError for a workdir without such a checkpoint, or of a run of another model.
    """
    model = settings.model
    if base:
        return trained, model.lora.init_from or model.transformer or model.folder or "the shipped checkpoint"
    checkpoints, average = Checkpoints(workdir, step=step), settings.evaluation.average
    if checkpoints.latest is None:
        raise ValueError(
            f"workdir={str(workdir)!r} holds no checkpoint: let the run save one, or take the model as it was before "
            "training (sample --base, evaluate --policy=base)"
        )
    check(settings.config, workdir, reads=True)
    version = version_of(checkpoints.restore_host(), checkpoints)
    found = converted(checkpoints.restore_part(average_path(average, version), trained), version, parts.table)
    return _finite(found, checkpoints), f"iteration {checkpoints.latest} ({average or 'params'})"


def model_at(config: Any, source: str | os.PathLike, field: str) -> Any:
    """A config with the model that lies at `source`, untrained; the config that is given stays as it is.

    It is a whole model's folder, see `families.find`; or a transformer, or adapters in a LoRA file, which take the
    place of the config's own in its model. Raises ValueError, which names `field`, where nothing is.
    """
    config = copy.deepcopy(config)
    model = config.model
    place = families.find(source, *families.CONFIGS, lora_files.FILE_NAME, lora_files.PEFT_FILE, field=field)
    model.lora.rank, model.lora.init_from = 0, ""
    if (place / "transformer").is_dir():
        model.folder, model.transformer = str(source), ""
    elif (place / "config.json").is_file() or _is_release(place):
        model.transformer = str(source)
    else:
        parts = families.read_parts(model.folder, model.transformer)
        rules = parts.family.transformer.rules(parts.configs["transformer"])
        adapted = lora.pairs(lora_files.load(place, rules, families.shapes(parts, text=False)["transformer"]))
        model.lora.rank = next(iter(adapted.values()))[0].shape[-1]
        model.lora.targets, model.lora.init_from = "|".join(sorted(adapted)), str(source)
    return config


def _is_release(file: pathlib.Path) -> bool:
    """Whether a file is an original release of a known model, and no LoRA file."""
    try:
        return file.is_file() and bool(families.of(file))
    except ValueError:
        return False


def average_path(average: str, version: int) -> tuple[str, ...]:
    """Where a checkpoint of a version holds an average of the parameters, or with "" the parameters."""
    if not average:
        return ("params",)
    return ("averages", average) if version > 1 else (average,)
