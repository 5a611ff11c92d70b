"""Every setting there is, its default and its check.

A recipe in configs/ starts from `base()` or from another recipe (`load`) and changes fields; a method is put in by
`choose`. Configs are locked: a field that is not here is refused. `resolve` turns a config into the typed settings that
the program runs on, or raises `ConfigError` before anything is compiled.

Each section is a frozen dataclass, here or beside what it sets, and its docstring says what the fields mean. No model,
reward or task is imported before it is named.
"""

import contextlib
import dataclasses
import difflib
import math
import numbers
import operator
import pathlib
import pkgutil
import runpy
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from mixgrpo_jax.flow.plans import PLANS, Planner
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.flow.schedules import SPACINGS
from mixgrpo_jax.flow.solvers import SOLVERS
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.models.nn.attention import ATTENTION_BACKENDS
from mixgrpo_jax.models.nn.remat import REMAT
from mixgrpo_jax.rewards import REWARDS
from mixgrpo_jax.rl import terms
from mixgrpo_jax.rl.credit import Credit
from mixgrpo_jax.rl.objectives import OBJECTIVES
from mixgrpo_jax.rl.samples import Objective
from mixgrpo_jax.rl.select import SELECTIONS, Replay, Selection
from mixgrpo_jax.rl.update import Average
from mixgrpo_jax.tasks import TASKS

DTYPES = ("float32", "bfloat16")
TABLES = {"plan": PLANS, "objective": OBJECTIVES, "select": SELECTIONS}  # sections of which there are several

# Where fields are that were elsewhere.
RENAMED = {
    "plan.seed": "seed",
    "optimizer.ema_decay": "averages.ema.decay",
    "evaluation.ema": "evaluation.average ('ema', or '' for the raw parameters)",
    "objective.kl_reference": "terms.kl_base",
    "objective.kl_rollout": "terms.kl_rollout",
}


class ConfigError(ValueError):
    """An invalid setting: the message names the field, its value and the fix."""


@contextlib.contextmanager
def refusing(begins: str = "") -> Iterator[None]:
    """Raise as ConfigError what a part of the project refuses by a ValueError; its words begin with `begins`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{begins}{error}") from None


def _require(valid: bool, name: str, value: Any, remedy: str) -> None:
    if not valid:
        raise ConfigError(f"{name}={value!r}: {remedy}")


def _choice(name: str, value: Any, known: Collection[str]) -> None:
    if value not in known:
        choices = ", ".join(sorted(known)) + near(value, known).replace(",", ";", 1)
        raise ConfigError(f"{name}={value!r} is unknown; choose from {choices}")


def near(name: Any, known: Collection[str]) -> str:
    """A question that names the nearest of the known names, where one is near; else nothing."""
    return "".join(f", did you mean {found}?" for found in difflib.get_close_matches(str(name), known, 1))


def _number(default: Any, **bounds: float) -> Any:
    """A field with bounds: `above`, `at_least`, `below` or `at_most`."""
    return field(default=default, metadata=bounds)


def _check_numbers(settings: Any, path: str) -> None:
    """Raise ConfigError for the first of a section's numbers, or of a tuple's, that is out of bounds."""
    holds = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}
    for each in dataclasses.fields(settings):
        value, bounds = getattr(settings, each.name), {key: each.metadata[key] for key in holds if key in each.metadata}
        values = value if isinstance(value, tuple | list) else () if value is None else (value,)
        if not all(holds[key](v, bound) for key, bound in bounds.items() for v in values):
            words = " and ".join(f"{key.replace('_', ' ')} {bound:g}" for key, bound in bounds.items())
            words = "positive" if words in ("above 0", "at least 1") else words
            raise ConfigError(f"{path}.{each.name}={value!r}: it must be {words}")


SECTION = Mapping | ml_collections.ConfigDict
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
WORDS |= {SECTION: "a section", types.NoneType: "None"}
ABSTRACT: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}  # numpy's count, too


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotation; a list may stand for a tuple, as JSON has it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, each) for each in arguments)
    if origin is typing.Literal:
        return isinstance(value, str)  # which one, its dataclass checks
    if origin is tuple:
        each = arguments[:1] * len(value) if arguments[-1] is ... and isinstance(value, tuple | list) else arguments
        return isinstance(value, tuple | list) and len(value) == len(each) and all(map(_is, value, each))
    if kind in ABSTRACT:
        return isinstance(value, ABSTRACT[kind]) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind != SECTION and origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if origin is tuple:
        count = "a tuple" if arguments[-1] is ... else f"a tuple of {len(arguments)}"
        return f"{count}, each {_words(arguments[0])}"
    return WORDS.get(str if origin is typing.Literal else kind, str(kind))


def _check_type(name: str, value: Any, kind: Any) -> None:
    if not _is(value, kind):
        raise ConfigError(f"{name}={value!r}: it must be {_words(kind)}")


def _make(kind: type, path: str, section: Any, **others: Any) -> Any:
    """A section as its dataclass; fields that it does not have, and values of another type, are refused by name."""
    _check_type(path, section, SECTION)
    fields, annotations = dict(section), typing.get_type_hints(kind)
    known = [each.name for each in dataclasses.fields(kind) if not each.kw_only]
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(_no_field(f"{path}.{name}", known, kind.__name__))
        if annotations[name] is LoraConfig:
            fields[name] = _make(LoraConfig, f"{path}.{name}", value)
        else:
            _check_type(f"{path}.{name}", value, annotations[name])
            fields[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields, **others)


def _check_finite(section: Mapping[str, Any], path: str = "") -> None:
    """Raise ConfigError for the first number, anywhere in a config, that is NaN or infinite."""
    for name, value in section.items():
        if isinstance(value, SECTION):
            _check_finite(value, f"{path}{name}.")
        elif isinstance(value, float):
            _require(math.isfinite(value), f"{path}{name}", value, "it must be finite")


@dataclass(frozen=True)
class Model:
    """The policy that is trained.

    folder: the model: a folder in diffusers' layout, or a name on the hub, "owner/model". "shipped:NAME" is in the
      package; "" is the shipped one of signs.
    transformer: another place for the transformer alone: a folder, the original file, or its name on the hub.
    image_size: rows and columns of a picture, in pixels.
    text_length: T5 tokens of a prompt, padding included.
    guidance: the scale that a guidance-distilled transformer is told; or the scale of classifier-free guidance, in
      training as in sampling: two evaluations for each velocity, or one, without guidance, at a scale of 1.
    negative_prompt: what classifier-free guidance leads away from.
    dtype: the dtype of the matrix products; master weights are fp32.
    reduce_dtype: the dtype in which gradients of kernels are summed over devices; bfloat16 moves half as much.
    remat: what the update recomputes, see `remat.rematerialise`: "none", "dots", "attention", "block"; "auto" is the
      one that fits a device, see `engine.programs.fit`.
    attention: the attention kernel: "xla", "cudnn" on NVIDIA GPUs, "splash" on TPU, "auto" for the accelerator's own.
    lora: rank 0 trains all parameters.
    """

    folder: str = ""
    transformer: str = ""
    image_size: tuple[int, int] = _number((16, 48), at_least=1)
    text_length: int = _number(12, at_least=1)
    guidance: float = _number(3.5, at_least=0)
    negative_prompt: str = ""
    dtype: str = "float32"
    reduce_dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        _check_numbers(self, "model")
        if self.negative_prompt and self.guidance <= 1:
            raise ConfigError(
                f"model.negative_prompt={self.negative_prompt!r} has no part in model.guidance={self.guidance}: set a "
                "guidance above 1, or leave the prompt empty"
            )
        _choice("model.dtype", self.dtype, DTYPES)
        _choice("model.reduce_dtype", self.reduce_dtype, DTYPES)
        _choice("model.remat", self.remat, REMAT)
        _choice("model.attention", self.attention, ATTENTION_BACKENDS)


@dataclass(frozen=True)
class Data:
    """What prompts come from.

    name: the task; "features" is what `encode` wrote to the folder.
    folder: where the data are; "" is ~/.cache/mixgrpo_jax.
    """

    name: str = "signs"
    folder: str = ""

    def __post_init__(self):
        _choice("data.name", self.name, TASKS)


@dataclass(frozen=True)
class Mesh:
    """Devices by axis; -1 takes what is left.

    data: devices over which samples are spread.
    fsdp: devices over which samples and each parameter are spread.
    context: devices over which a sample's tokens and each parameter are spread.
    tensor: devices over which heads and features are spread. If one of data and fsdp is -1, and one of context and
      tensor, the first takes as many as the samples of an update divide over, and the second the rest.
    rollout_fsdp: parts of each parameter in rollouts; None is the fewest that fit, see `engine.programs.rollout_fsdp`.
    """

    data: int = _number(-1, at_least=-1)
    fsdp: int = _number(1, at_least=-1)
    context: int = _number(1, at_least=-1)
    tensor: int = _number(1, at_least=-1)
    rollout_fsdp: int | None = _number(None, at_least=1)

    def __post_init__(self):
        _check_numbers(self, "mesh")
        for name in ("data", "fsdp", "context", "tensor"):
            _require(getattr(self, name) != 0, f"mesh.{name}", 0, "give a number of devices, or -1 for what is left")


@dataclass(frozen=True)
class BatchSizes:
    """An iteration's samples.

    prompts: prompts of an iteration.
    group: samples a prompt.
    updates: optimiser steps an iteration.
    micro_batch: samples of each device in a forward and backward pass, at most, see `share`; with model.remat="auto"
      no more than fit.
    decode: samples of each device that are decoded at a time, at most; the host scores them meanwhile.
    shared_noise: whether a group starts from one noise, and shares its prefix.
    """

    prompts: int = _number(8, at_least=1)
    group: int = 12
    updates: int = _number(4, at_least=1)
    micro_batch: int = _number(24, at_least=1)
    decode: int = _number(24, at_least=1)
    shared_noise: bool = True

    def __post_init__(self):
        _check_numbers(self, "batch")
        _require(self.group >= 2, "batch.group", self.group, "a group of one has no advantage; use at least 2")


@dataclass(frozen=True)
class Optimizer:
    """How gradients change parameters.

    name: the optimiser, "adamw" or "adafactor".
    dtype: the dtype of fully trained parameters; "bfloat16" rounds stochastically.
    learning_rate: the rate after warm-up.
    warmup: updates of linear warm-up.
    final_rate: the share of the rate that is reached, linearly, at the last update; 1 keeps it constant.
    b1, b2, eps: AdamW's.
    weight_decay: decoupled weight decay, which follows the rate.
    max_grad_norm: the largest norm of all gradients together; larger ones are scaled down to it.
    max_grad_ratio: the largest ratio of that norm to the median of the last 50 updates'; beyond it the run stops. 0 is
      no bound.
    mix: "min_norm" computes a gradient of each reward and mixes them, see `rl.marble`; weights of rewards then do not
      count. "none" mixes advantages, see `Credit.combine`.
    mix_decay: the decay of the average of the gradients' shares.
    """

    name: str = "adamw"
    dtype: str = "float32"
    learning_rate: float = _number(1e-5, above=0)
    warmup: int = _number(0, at_least=0)
    final_rate: float = _number(1.0, at_least=0, at_most=1)
    b1: float = _number(0.9, at_least=0, below=1)
    b2: float = _number(0.999, at_least=0, below=1)
    eps: float = _number(1e-8, above=0)
    weight_decay: float = _number(1e-4, at_least=0)
    max_grad_norm: float = _number(1.0, above=0)
    max_grad_ratio: float = _number(100.0, at_least=0)
    mix: str = "none"
    mix_decay: float = _number(0.7, at_least=0, below=1)

    def __post_init__(self):
        _choice("optimizer.mix", self.mix, ("none", "min_norm"))
        _choice("optimizer.name", self.name, ("adamw", "adafactor"))
        _choice("optimizer.dtype", self.dtype, DTYPES)
        _check_numbers(self, "optimizer")


@dataclass(frozen=True)
class Evaluation:
    """How held-out prompts are drawn.

    prompts: how many held-out prompts are drawn.
    batch: prompts drawn at a time.
    num_steps: steps of the evaluation's sampler, which is deterministic.
    shift: the shift of its noise levels; 0 takes the one that FLUX derives from the image's size.
    spacing: the spacing of its steps, see `flow.schedules.shifted_sigmas`.
    solver: its solver.
    solver_order: the order of that solver.
    trained_steps: steps that the trained policy takes before the base takes over; None lets it take all.
    average: the average that is evaluated; "" is the raw parameters.
    every: iterations between evaluations during training; 0 is before and after only.
    """

    prompts: int = _number(256, at_least=1)
    batch: int = _number(64, at_least=1)
    num_steps: int = _number(20, at_least=1)
    shift: float = _number(3.0, at_least=0)
    spacing: str = "trailing"
    solver: str = "euler"
    solver_order: int = 1
    trained_steps: int | None = None
    average: str = "ema"
    every: int = _number(0, at_least=0)

    def __post_init__(self):
        _check_numbers(self, "evaluation")
        _choice("evaluation.solver", self.solver, SOLVERS)
        _choice("evaluation.spacing", self.spacing, SPACINGS)
        _check_order("evaluation.solver_order", self.solver_order, "evaluation.solver", self.solver)
        if self.trained_steps is not None and not 0 <= self.trained_steps <= self.num_steps:
            raise ConfigError(
                f"evaluation.trained_steps={self.trained_steps} is not in 0..{self.num_steps} "
                "(evaluation.num_steps); None lets the trained policy take all"
            )


@dataclass(frozen=True)
class Saves:
    """When a run is saved.

    Beside these, the last finished iteration is saved when a run is told to stop.

    every: iterations between saves. The first that is finished is saved too.
    minutes: minutes after which an iteration is saved out of turn; 0 is never.
    keep: how many of the last checkpoints stay.
    keep_every: checkpoints whose iteration is a multiple of this stay, too; 0 is none.
    best: the checkpoint with the largest of this metric of metrics.jsonl stays, too, as "held_out/strict/mean"; "" is
      none.
    """

    every: int = _number(25, at_least=1)
    minutes: float = _number(0.0, at_least=0)
    keep: int = _number(2, at_least=1)
    keep_every: int = _number(0, at_least=0)
    best: str = ""

    def __post_init__(self):
        _check_numbers(self, "checkpoint")


@dataclass(frozen=True)
class Profile:
    """Which iterations are traced by JAX's profiler, into the folder profile/ of the workdir.

    start: the first iteration that is traced, from 1; 0 traces none.
    iterations: how many iterations are traced.
    """

    start: int = _number(0, at_least=0)
    iterations: int = _number(1, at_least=1)

    def __post_init__(self):
        _check_numbers(self, "profile")


@dataclass(frozen=True)
class Monitors:
    """When a run is suspected of hacking its rewards, see `engine.monitors`.

    limit: of a monitor's change since the run began, in standard deviations of what it measured of the first pictures;
      beyond it the run warns. 0 warns of nothing.
    stop: whether a warning stops the run, once the iteration is saved.
    """

    limit: float = _number(1.0, at_least=0)
    stop: bool = False

    def __post_init__(self):
        _check_numbers(self, "monitors")


@dataclass(frozen=True)
class Pretrain:
    """How a small policy is made from scratch.

    steps: optimiser steps.
    clean_steps: the first of the steps, which see the pictures with less noise.
    batch: pictures a step.
    shift: the shift of the noise levels that are trained.
    learning_rate, b2, weight_decay, max_grad_norm: AdamW's.
    bias_scale: the scale of T5's initial biases by distance: large ones tell the order of words.
    warmup: steps of linear warm-up; then the rate falls to zero as a cosine.
    ema_decay: the decay of the parameters' average, which is evaluated and kept.
    evaluate_every: steps between held-out scores.
    """

    steps: int = _number(1000, at_least=1)
    clean_steps: int = _number(0, at_least=0)
    batch: int = _number(64, at_least=1)
    shift: float = _number(3.0, above=0)
    learning_rate: float = _number(1.5e-3, above=0)
    bias_scale: float = 1.0
    warmup: int = _number(100, at_least=0)
    b2: float = _number(0.99, at_least=0, below=1)
    weight_decay: float = _number(0.0, at_least=0)
    max_grad_norm: float = _number(0.5, above=0)
    ema_decay: float = _number(0.99, at_least=0, below=1)
    evaluate_every: int = _number(200, at_least=1)

    def __post_init__(self):
        _check_numbers(self, "pretrain")


class Section(ml_collections.ConfigDict):
    """A section of a config, which says where a renamed field is now, and remembers what was chosen."""

    path = ""
    chosen = ""

    def __getitem__(self, key):
        """The field's value."""
        self._check_renamed(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        """Set a field, of the type that it has."""
        self._check_renamed(key)
        super().__setitem__(key, value)

    def _check_renamed(self, key):
        if new := RENAMED.get(f"{self.path}.{key}"):
            raise KeyError(f"{self.path}.{key} is now {new}")


def _section(fields: Mapping[str, Any], path: str = "", chosen: str = "") -> Section:
    section = Section(dict(fields), convert_dict=True)
    object.__setattr__(section, "path", path)
    object.__setattr__(section, "chosen", chosen)
    return section


def _fields(settings: type, path: str, chosen: str = "", /, **changes: Any) -> Section:
    """A section of a dataclass's fields with their defaults; a field of None may be set to an int."""
    values: dict[str, Any] = {"name": chosen} if chosen else {}
    for each in dataclasses.fields(settings):
        if each.kw_only:  # the config's, from elsewhere
            continue
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        value = changes.pop(each.name, default)
        if isinstance(value, LoraConfig):
            value = _fields(LoraConfig, f"{path}.{each.name}", **dataclasses.asdict(value))
        values[each.name] = ml_collections.config_dict.placeholder(int) if value is None else value
    if changes:
        wrong, known = next(iter(changes)), [name for name in values if name != "name"]
        raise ConfigError(_no_field(f"{path}.{wrong}", known, settings.__name__))
    return _section(values, path, chosen)


def _no_field(path: str, known: Collection[str], of: str) -> str:
    name = path.rpartition(".")[2]
    return f"{path} is no field of {of}{near(name, known)}; it has {', '.join(known)}"


SCHEDULE = ("num_steps", "shift", "spacing")  # of a plan


def choose(section: str, name: str, scheduled: Section | None = None, **changes: Any) -> Section:
    """A section in which a method is chosen by name, with its own fields.

    `config.objective = choose("objective", "nft", beta=0.1)`. The section is "plan", "objective" or "select"; a name is
    one of its table, or "module:Class" of one's own. A plan may be `scheduled` as another one: a model's schedule stays
    when a recipe chooses another plan, `config.plan = choose("plan", "ode", config.plan)`.
    """
    if scheduled is not None:
        changes = {field: scheduled[field] for field in SCHEDULE} | changes
    return _fields(find(section, name), section, name, **changes)


def find(section: str, name: str) -> type:
    """The class of a method by the name that its section has."""
    _choice("section", section, TABLES)
    table = TABLES[section]
    if name not in table and ":" not in name:
        _choice(f"{section}.name", name, table)
    try:
        return pkgutil.resolve_name(table.get(name, name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{section}.name={name!r}: {error}; write 'module:Class' of what can be imported") from None


def average(name: str, **changes: Any) -> Section:
    """The rule of an average that the config keeps: `config.averages.old = average("old", by="iteration")`."""
    return _fields(Average, f"averages.{name}", **changes)


def base() -> Section:
    """The defaults: MixGRPO's own, on the embedded `signs` task.

    seed: the seed of every random number.
    iterations: iterations of the run.
    rewards: rewards that are trained on, by weight.
    watched: rewards that are scored and logged, and not trained on.
    reward_options: {name: its options}; with `kind`, a name of one's own for a reward of that kind.
    missing_share: the share of a process's images that reward servers may fail at; these teach nothing.
    reward_wait: seconds for which servers that are away are asked again, beyond that share.
    terms: penalties by weight, see `rl.terms`; 0 costs nothing.
    averages: averages of the parameters, by name, each with its rule.
    one_step_off_policy: while the host scores an iteration's samples, draw the next ones, by the parameters of before
      the update. They are one iteration stale, which the ratio corrects; two iterations' samples are then in memory.
    ratio_tolerance: the largest |ratio - 1| of an iteration's first update; beyond it the run stops.
    rollout_tolerance: the largest deviation of the update's program from the rollout's; beyond it the run stops.
    wandb: the project at Weights & Biases that gets metrics and pictures, too; "" is none.
    """
    return _section(
        dict(
            seed=714,
            iterations=300,
            model=_fields(Model, "model"),
            data=_fields(Data, "data"),
            mesh=_fields(Mesh, "mesh"),
            batch=_fields(BatchSizes, "batch"),
            plan=choose("plan", "window"),
            sampler=_fields(Sampler, "sampler"),
            rewards=dict(ocr=1.0, colour=1.0),
            watched=("strict",),
            reward_options=dict(),
            missing_share=0.25,
            reward_wait=600.0,
            advantage=_fields(Credit, "advantage"),
            select=choose("select", "all"),
            objective=choose("objective", "grpo"),
            terms=dict(kl_base=0.0, kl_rollout=0.0, mse_base=0.0),
            optimizer=_fields(Optimizer, "optimizer"),
            averages=dict(ema=average("ema")),
            one_step_off_policy=False,
            ratio_tolerance=5e-5,
            rollout_tolerance=1e-2,
            evaluation=_fields(Evaluation, "evaluation"),
            monitors=_fields(Monitors, "monitors"),
            checkpoint=_fields(Saves, "checkpoint"),
            profile=_fields(Profile, "profile"),
            wandb="",
            pretrain=_fields(Pretrain, "pretrain"),
        )
    )


def load(name: str, beside: str, *args: str) -> Section:
    """`get_config(*args)` of the recipe `name`, a file in the folder of `beside` (a recipe's own `__file__`)."""
    path = pathlib.Path(beside).with_name(f"{name}.py")
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.py"))
        raise ConfigError(f"config {name!r}: there is no {path}; choose from {', '.join(known)}")
    return runpy.run_path(str(path))["get_config"](*args)


def from_values(values: Mapping[str, Any]) -> Section:
    """A config of values as JSON has them. Raises ValueError or KeyError for what is no field."""
    config, values = base(), dict(values)
    for section in TABLES:
        fields = dict(values.pop(section))
        config[section] = choose(section, fields.pop("name"), **fields)
    config.averages = {name: average(name, **fields) for name, fields in values.pop("averages").items()}
    for name in ("rewards", "reward_options", "terms"):
        config[name] = ml_collections.ConfigDict(values.pop(name))
    config.update(values)
    return config


@dataclass(frozen=True)
class Settings:
    """A checked config: its typed parts, and the arithmetic that follows from it."""

    config: ml_collections.ConfigDict
    model: Model
    data: Data
    mesh: Mesh
    batch: BatchSizes
    planner: Planner
    sampler: Sampler
    advantage: Credit
    select: Selection
    objective: Objective
    optimizer: Optimizer
    averages: Mapping[str, Average]
    evaluation: Evaluation
    monitors: Monitors
    checkpoint: Saves
    profile: Profile
    pretrain: Pretrain
    rewards: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Samples of an iteration."""
        return self.batch.prompts * self.batch.group

    @property
    def trained_samples(self) -> int:
        """Samples of an iteration that are trained on."""
        return self.batch.prompts * self.select.kept(self.batch.group)

    @property
    def update_samples(self) -> int:
        """Samples of an update."""
        return self.trained_samples // self.batch.updates

    def micro_batch(self, ways: int = 1) -> int:
        """Samples of a forward and backward pass on all devices, over `ways` of which an update's are spread."""
        whole = ways if self.update_samples % ways == 0 else 1
        return whole * share(self.update_samples, self.batch.micro_batch, ways)

    def passes(self, ways: int = 1) -> int:
        """Forward and backward passes an update."""
        return self.update_samples // self.micro_batch(ways) * self.planner.num_trained

    @property
    def gradients(self) -> int:
        """Gradients of an update: one, or one of each reward with a weight."""
        return sum(weight > 0 for weight in self.rewards.values()) if self.optimizer.mix != "none" else 1

    @property
    def roles(self) -> frozenset[str]:
        """Whom the update asks for a velocity, beside the trained policy."""
        return self.objective.roles | terms.roles_of(self.terms)

    @property
    def keep_base(self) -> bool:
        """Whether the parameters before training are needed: as a reference, or to sample the later steps."""
        return "base" in self.roles or self.evaluation.trained_steps is not None

    def arithmetic(self, ways: int = 1) -> str:
        """The numbers that users get wrong, in words, where samples are spread over `ways` devices."""
        batch, planner = self.batch, self.planner
        stochastic = sum(segment.steps for segment in planner.layout if segment.sde)
        each = share(self.update_samples, batch.micro_batch, ways)
        return (
            f"{batch.prompts} prompts x {batch.group} = {self.samples} samples an iteration; {batch.updates} updates "
            f"of {self.update_samples} samples x {planner.num_trained} steps in {self.passes(ways)} passes "
            f"of {self.micro_batch(ways)}; {planner.num_steps} steps, {stochastic} stochastic, {planner.num_trained} "
            f"trained; {each} samples of a device in a pass, remat {self.model.remat!r}"
        )


def share(samples: int, at_most: int, ways: int) -> int:
    """Samples that each of `ways` devices takes at a time: the largest divisor of its part of all that is `at_most`.

    Where samples do not divide over the devices, every one has all of them.

    >>> share(96, 4, ways=16), share(96, 4, ways=32), share(96, 4, ways=64)
    (3, 3, 4)
    """
    own = samples // ways if samples % ways == 0 else samples
    return max(n for n in range(1, min(own, at_most) + 1) if own % n == 0)


def resolve(config: ml_collections.ConfigDict) -> Settings:
    """Check a config and derive what follows from it; raises ConfigError."""
    try:
        return _resolve(config)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None


def _resolve(config: ml_collections.ConfigDict) -> Settings:
    _check_shape(config)
    _check_finite(config)
    _require(config.iterations > 0, "iterations", config.iterations, "it must be positive")
    _require(0 <= config.seed < 2**32, "seed", config.seed, "it must be in 0..4294967295")
    for name in ("ratio_tolerance", "rollout_tolerance"):
        _require(config[name] >= 0, name, config[name], "it must be at least 0")
    share, wait = config.missing_share, config.reward_wait
    _require(0 <= share < 1, "missing_share", share, "a share of the images, from 0 to below 1; 0 lets none be missing")
    _require(wait >= 0, "reward_wait", wait, "seconds, at least 0; 0 stops when no server answers")
    batch = _make(BatchSizes, "batch", config.batch)
    settings = Settings(
        config,
        model=_make(Model, "model", config.model),
        data=_make(Data, "data", config.data),
        mesh=_make(Mesh, "mesh", config.mesh),
        batch=batch,
        planner=_chosen(config, "plan", group=batch.group, seed=config.seed),
        sampler=_make(Sampler, "sampler", config.sampler),
        advantage=_make(Credit, "advantage", config.advantage),
        select=_chosen(config, "select"),
        objective=_chosen(config, "objective").settled(config.model.dtype, config.one_step_off_policy),
        optimizer=_make(Optimizer, "optimizer", config.optimizer),
        averages=_averages(config),
        evaluation=_make(Evaluation, "evaluation", config.evaluation),
        monitors=_make(Monitors, "monitors", config.monitors),
        checkpoint=_make(Saves, "checkpoint", config.checkpoint),
        profile=_make(Profile, "profile", config.profile),
        pretrain=_make(Pretrain, "pretrain", config.pretrain),
        rewards=dict(config.rewards),
        terms=dict(config.terms),
    )
    _check_rewards(config)
    _check_sizes(settings)
    _check_roles(settings)
    _check_plan(settings)
    _check_tolerance(settings)
    order = getattr(settings.planner, "solver_order", 1)
    _check_order("plan.solver_order", order, "sampler.solver", settings.sampler.solver)
    return settings


def _check_shape(config: ml_collections.ConfigDict) -> None:
    """Refuse a config that lacks what base() has, has what base() lacks, or has another kind of value there."""
    of = base()
    for name in config:
        _require(name in of, name, config[name], f"the config has no such field{near(name, list(of))}")
    for name, default in of.items():
        _require(name in config, name, None, "the config lacks it: start from base()")
        value = config[name]
        if isinstance(default, ml_collections.ConfigDict):
            _check_type(name, value, SECTION)
        else:
            _check_type(name, value, tuple[str, ...] if name == "watched" else type(default))
    for section in ("rewards", "terms"):
        for name, weight in config[section].items():
            _check_type(f"{section}.{name}", weight, float)
    for name, options in config.reward_options.items():
        _check_type(f"reward_options.{name}", options, SECTION)


def _chosen(config: ml_collections.ConfigDict, section: str, **others: Any) -> Any:
    """The method of a section, with what of the config's other settings it takes."""
    fields = dict(config[section])
    name = fields.pop("name")
    found = find(section, name)
    own = {each.name: each.kw_only for each in dataclasses.fields(found)}
    was = getattr(config[section], "chosen", "") or name
    if was != name or not fields.keys() >= {each for each, kw_only in own.items() if not kw_only}:
        raise ConfigError(
            f"{section}.name={name!r}: the section's fields are those of another method ({', '.join(fields)}). Choose "
            f"a method by its recipe (--config=configs/RECIPE.py), or in Python: "
            f'config.{section} = choose("{section}", "{name}")'
        )
    return _make(found, section, fields, **{key: value for key, value in others.items() if own.get(key)})


def _averages(config: ml_collections.ConfigDict) -> dict[str, Average]:
    averages = {}
    for name, fields in config.averages.items():
        with refusing(f"averages.{name}."):
            averages[name] = _make(Average, f"averages.{name}", fields)
    return {name: rule for name, rule in averages.items() if rule.decay or rule.by == "iteration"}


def _check_rewards(config: ml_collections.ConfigDict) -> None:
    for name in [*config.rewards, *config.watched]:
        kind = config.reward_options.get(name, {}).get("kind", name)
        if ":" not in kind:  # a builder of one's own
            _choice("watched" if name in config.watched else f"rewards.{name}", kind, REWARDS)
    for name, weight in config.rewards.items():
        _require(weight >= 0, f"rewards.{name}", weight, "a weight must not be negative; 0 only watches")
    if not sum(config.rewards.values()) > 0:
        raise ConfigError(f"rewards={dict(config.rewards)}: give one a positive weight")
    for name in config.reward_options:
        if name not in (known := [*config.rewards, *config.watched]):
            found = difflib.get_close_matches(name, known, 1) or known
            raise ConfigError(f"reward_options.{name}: there is no reward of this name; did you mean {found[0]}?")


def _check_sizes(settings: Settings) -> None:
    batch, trained = settings.batch, settings.trained_samples
    _divides("batch.updates", batch.updates, "trained samples an iteration", trained)
    if batch.shared_noise and not any(segment.sde and segment.steps for segment in settings.planner.layout):
        raise ConfigError(
            f"batch.shared_noise=True with plan.name={settings.config.plan.name!r}: the plan has no stochastic step, "
            "and a group that starts from one noise would be one picture; set batch.shared_noise=False"
        )
    if settings.optimizer.mix != "none" and settings.advantage.spread != "even":
        raise ConfigError(
            f"advantage.spread={settings.advantage.spread!r} with optimizer.mix={settings.optimizer.mix!r}: each "
            "reward has its gradient, of whole samples; set advantage.spread='even', or optimizer.mix='none'"
        )
    if settings.optimizer.mix != "none" and "reward_grad" in settings.objective.needs:
        raise ConfigError(
            f"optimizer.mix={settings.optimizer.mix!r} with objective.name={settings.config.objective.name!r}: it is "
            "given one gradient of all rewards; set optimizer.mix='none', and weigh them in `rewards`"
        )
    _check_credit(settings)
    if isinstance(settings.select, Replay) and "replay" not in settings.objective.needs:
        raise ConfigError(
            f"select.name='replay', objective.name={settings.config.objective.name!r}: the objective does not correct "
            'for who drew replayed samples; set config.objective = choose("objective", "op_grpo")'
        )
    if settings.objective.span == "group":
        _divides("batch.updates", batch.updates, "batch.prompts (an update takes whole groups)", batch.prompts)


def _check_credit(settings: Settings) -> None:
    credit = settings.advantage
    if credit.spread == "temporal" and "rows" not in settings.objective.needs:
        raise ConfigError(
            f"advantage.spread='temporal' with objective.name={settings.config.objective.name!r}: it trains on clean "
            "samples, and no step of theirs; set advantage.spread='even'"
        )
    if credit.spread == "nodes" and not settings.batch.shared_noise:
        raise ConfigError(
            "advantage.spread='nodes' with batch.shared_noise=False: samples that each have their own noise are below "
            "no common node; set batch.shared_noise=True, or advantage.spread='even'"
        )
    for reward, _, where in (route.partition(":") for route in credit.routes):
        _choice("advantage.routes", reward, settings.rewards)
        if credit.spread == "regions":
            _choice("advantage.routes", where, ("inside", "outside"))


def _check_roles(settings: Settings) -> None:
    kept, chosen = settings.averages, settings.evaluation.average
    if chosen and chosen not in kept:
        raise ConfigError(
            f"evaluation.average={chosen!r}: no such average is kept; give averages.{chosen}.decay a value above 0, or "
            "set evaluation.average='' for the raw parameters"
        )
    averages = (settings.roles - {"base"}) | ({settings.objective.draws} - {"train"})
    for role in sorted(averages - kept.keys()):
        raise ConfigError(
            f"objective.name={settings.config.objective.name!r} or a term needs the role {role!r}: keep it as an "
            f'average, config.averages.{role} = average("{role}")'
        )


def _check_plan(settings: Settings) -> None:
    """Refuse a plan that does not record what the objective learns from, or whose noise the kernel has not."""
    scale, eta = max(getattr(settings.planner, "noise", ()), default=1.0), settings.sampler.eta
    if settings.sampler.kernel == "cps" and scale * eta > 1:
        raise ConfigError(
            f"sampler.eta={eta} with sampler.kernel='cps' and noise scales up to {scale}: the kernel takes an eta up "
            "to 1, which is all noise; lower it, or plan.noise"
        )
    recorded = [segment for segment in settings.planner.layout if segment.record]
    for need, sde, kind, plan in (("rows", True, "stochastic", "window"), ("ode_row", False, "deterministic", "ode")):
        if need in settings.objective.needs and {segment.sde for segment in recorded} != {sde}:
            names = f"objective.name={settings.config.objective.name!r}, plan.name={settings.config.plan.name!r}"
            raise ConfigError(
                f"{names}: the objective needs recorded {kind} steps, and no others; "
                f'set config.plan = choose("plan", "{plan}")'
            )
    if "ode_tail" in settings.objective.needs and not settings.planner.layout[-1].record:
        raise ConfigError(
            f"objective.name={settings.config.objective.name!r}, plan.name={settings.config.plan.name!r}: the "
            'objective needs recorded steps up to the clean sample; set config.plan = choose("plan", "tail")'
        )


def _check_tolerance(settings: Settings) -> None:
    tolerance, bound = settings.config.ratio_tolerance, settings.objective.tolerance
    if tolerance > bound:
        raise ConfigError(
            f"ratio_tolerance={tolerance}: beyond half the clip range, {bound:g}, rounding decides what is clipped; "
            "lower it or raise objective.clip_low and clip_high, and in bfloat16 let objective.old_log_prob='update' "
            "make the ratio exact"
        )


def _check_order(name: str, order: int, of: str, solver: str) -> None:
    _require(order in (1, 2, 3), name, order, "choose 1, 2 or 3")
    _require(order == 1 or solver != "euler", name, order, f"{of}='euler' is of order 1; choose {of}='dpm_midpoint'")


def _divides(name, value, what, whole):
    if whole % value:
        fit = [d for d in range(1, whole + 1) if whole % d == 0]
        raise ConfigError(
            f"{name}={value} does not divide the {whole} {what}; nearest that do: "
            f"{', '.join(str(d) for d in sorted(fit, key=lambda d: abs(d - value))[:3])}"
        )
