"""Every setting there is, its default and its check.

A recipe in configs/ starts from `base()` or from another recipe (`load`) and changes fields. Configs are locked: a
field that is not here is refused. `resolve` turns a config into the typed settings that the program runs on, or raises
`ConfigError` before anything is compiled.
"""

import dataclasses
import functools
import pathlib
import runpy
from dataclasses import dataclass

import ml_collections

from mixgrpo_jax.flow.plans import PlanConfig
from mixgrpo_jax.flow.rollout import Sampler
from mixgrpo_jax.flow.solvers import SOLVERS
from mixgrpo_jax.models.lora import LoraConfig
from mixgrpo_jax.models.nn.attention import ATTENTION_BACKENDS
from mixgrpo_jax.models.nn.remat import REMAT
from mixgrpo_jax.rewards import REWARDS
from mixgrpo_jax.rl.advantages import AdvantageConfig
from mixgrpo_jax.rl.objectives import GRPOConfig
from mixgrpo_jax.tasks import TASKS

DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
    """A setting that cannot be: the message names the field, the value and the remedy."""


def base() -> ml_collections.ConfigDict:
    """The defaults: MixGRPO's own, on the embedded `signs` task."""
    return ml_collections.ConfigDict(
        dict(
            seed=714,
            iterations=300,
            model=dict(
                folder="",  # in diffusers' layout; "shipped:NAME" is in the package, and so is "", of signs
                transformer="",  # another place for the transformer alone: a folder, or the original file
                image_size=(16, 48),  # rows, columns
                text_length=12,  # T5 tokens of a prompt, padding included
                guidance=3.5,  # the embedded guidance scale that the transformer is told
                dtype="float32",  # of the matrix products; master weights are fp32
                remat="none",  # what the update recomputes: "none", "block"
                attention="xla",  # the kernel: "xla", "cudnn" on NVIDIA GPUs, "splash" on TPU
                lora=_fields(LoraConfig),  # rank 0 trains all parameters
            ),
            data=dict(
                name="signs", folder=""
            ),  # "features": what `encode` wrote to the folder; "": ~/.cache/mixgrpo_jax
            mesh=dict(  # devices by axis; -1 takes what is left
                data=-1,  # samples
                fsdp=1,  # samples, and a part of each parameter
                context=1,  # tokens of a sample, and a part of each parameter
                tensor=1,  # heads and features
                rollout_fsdp=ml_collections.config_dict.placeholder(int),  # parts of each parameter in rollouts: fsdp's
            ),
            batch=dict(
                prompts=8,  # an iteration
                group=12,  # samples a prompt
                updates=4,  # optimiser steps an iteration
                micro_batch=24,  # samples a forward and backward pass, over all devices
                decode=24,  # samples decoded at a time, at most, over all devices; the host scores them meanwhile
                shared_noise=True,  # a group starts from one noise, and shares its prefix
            ),
            plan=_fields(PlanConfig, num_steps=25, shift=3.0, strategy="progressive", length=4),
            sampler=_fields(Sampler),
            rewards=dict(ocr=1.0, colour=1.0),  # trained on, by weight
            watched=("strict",),  # scored and logged, not trained on
            reward_options=dict(),  # {name: its options}; with `kind`, a name of one's own for a reward of that kind
            advantage=_fields(AdvantageConfig),
            objective=_fields(GRPOConfig),
            optimizer=dict(
                name="adamw",  # or "adafactor"
                dtype="float32",  # of fully trained parameters; "bfloat16" rounds stochastically
                learning_rate=1e-5,
                warmup=0,  # updates of linear warm-up
                final_rate=1.0,  # of the rate, reached linearly at the last update; 1 keeps it constant
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                weight_decay=1e-4,
                max_grad_norm=1.0,
                ema_decay=0.99,  # by update; 0 keeps no average
            ),
            # While the host scores an iteration's samples, draw the next ones, by the parameters of before the update:
            # they are one iteration stale, which the ratio corrects. Two iterations' samples are then in memory.
            one_step_off_policy=False,
            ratio_tolerance=1e-4,  # largest |ratio - 1| of an iteration's first update; beyond it the run stops
            evaluation=dict(
                prompts=256,  # held-out prompts
                batch=64,
                num_steps=20,
                shift=3.0,  # 0 takes the one that FLUX derives from the image's size
                solver="euler",
                solver_order=1,
                trained_steps=ml_collections.config_dict.placeholder(int),  # the base takes the steps after them
                ema=True,
                every=0,  # iterations between evaluations during training; 0 is before and after only
            ),
            checkpoint=dict(every=25, keep=2),
            pretrain=dict(
                steps=1000,
                clean_steps=0,  # the first of them, which see the pictures with less noise
                batch=64,
                shift=3.0,  # of the noise levels that are trained
                learning_rate=1.5e-3,
                bias_scale=1.0,  # of T5's initial biases by distance: large ones tell the order of words
                warmup=100,  # then the rate falls to zero as a cosine
                b2=0.99,
                weight_decay=0.0,
                max_grad_norm=0.5,
                ema_decay=0.99,
                evaluate_every=200,
            ),
        ),
        convert_dict=True,
    )


def _fields(settings, **changes):
    """The fields of a dataclass of settings with their defaults; None becomes a placeholder of its type."""
    values = {}
    for field in dataclasses.fields(settings):
        default = None if field.default is dataclasses.MISSING else field.default
        value = changes.get(field.name, default)
        values[field.name] = ml_collections.config_dict.placeholder(int) if value is None else value
    return values


def load(name: str, beside: str, *args: str) -> ml_collections.ConfigDict:
    """`get_config(*args)` of the recipe `name`, a file in the folder of `beside` (a recipe's own `__file__`)."""
    path = pathlib.Path(beside).with_name(f"{name}.py")
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.py"))
        raise ConfigError(f"config {name!r}: there is no {path}; choose from {', '.join(known)}")
    return runpy.run_path(str(path))["get_config"](*args)


@dataclass(frozen=True)
class Settings:
    """A checked config: its typed parts, and the arithmetic that follows from it."""

    config: ml_collections.ConfigDict
    plan: PlanConfig
    sampler: Sampler
    advantage: AdvantageConfig
    objective: GRPOConfig
    lora: LoraConfig
    samples: int  # an iteration
    passes: int  # forward and backward passes an update

    @property
    def keep_base(self) -> bool:
        """Whether the parameters before training are needed: as the KL's reference, or to sample the later steps."""
        return self.objective.kl_reference > 0 or self.config.evaluation.trained_steps is not None

    def arithmetic(self) -> str:
        """The numbers that users get wrong, in words."""
        batch, plan = self.config.batch, self.plan
        return (
            f"{batch.prompts} prompts x {batch.group} = {self.samples} samples an iteration; {batch.updates} updates "
            f"of {self.samples // batch.updates} samples x {plan.num_trained} steps in {self.passes} passes of "
            f"{batch.micro_batch}; {plan.num_steps} steps, {plan.window_length} stochastic, {plan.num_trained} trained"
        )


def resolve(config: ml_collections.ConfigDict) -> Settings:
    """Check a config and derive what follows from it; raises ConfigError."""
    try:
        plan, sampler = PlanConfig(**config.plan), Sampler(**config.sampler)
        advantage, objective = AdvantageConfig(**config.advantage), GRPOConfig(**config.objective)
        lora = LoraConfig(**config.model.lora)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    batch = config.batch
    samples = batch.prompts * batch.group
    _positive(config, "iterations", "batch.prompts", "batch.updates", "batch.micro_batch", "batch.decode")
    _positive(config, "evaluation.prompts", "evaluation.batch", "evaluation.num_steps", "checkpoint.every")
    _positive(config, "optimizer.learning_rate")
    if batch.group < 2:
        raise ConfigError(f"batch.group={batch.group}: a group of one has no advantage; use at least 2")
    _divides("batch.updates", batch.updates, "samples an iteration (batch.prompts * batch.group)", samples)
    _divides("batch.micro_batch", batch.micro_batch, "samples an update", samples // batch.updates)
    _divides("evaluation.batch", config.evaluation.batch, "evaluation.prompts", config.evaluation.prompts)
    choices = {"data.name": TASKS, "evaluation.solver": SOLVERS, "model.remat": REMAT}
    choices |= {"model.dtype": DTYPES, "optimizer.dtype": DTYPES, "model.attention": ATTENTION_BACKENDS}
    choices["optimizer.name"] = ("adamw", "adafactor")
    for field, known in choices.items():
        _choice(field, _get(config, field), known)
    for name in [*config.rewards, *config.watched]:
        kind = config.reward_options.get(name, {}).get("kind", name)
        if ":" not in kind:  # "module:function", of a builder that is not in the table
            _choice("watched" if name in config.watched else f"rewards.{name}", kind, REWARDS)
    if min(config.rewards.values(), default=0) < 0 or sum(config.rewards.values()) <= 0:
        raise ConfigError(f"rewards={dict(config.rewards)}: give one a positive weight, and none a negative one")
    if not 0 <= config.optimizer.final_rate <= 1:
        raise ConfigError(f"optimizer.final_rate={config.optimizer.final_rate} is not in [0, 1]; 1 keeps it constant")
    if not 0 <= config.optimizer.ema_decay < 1:
        raise ConfigError(f"optimizer.ema_decay={config.optimizer.ema_decay} is not in [0, 1); 0 keeps no average")
    if config.evaluation.ema and not config.optimizer.ema_decay:
        raise ConfigError("evaluation.ema=True with optimizer.ema_decay=0: no average is kept; set one of the two")
    trained_steps = config.evaluation.trained_steps
    if trained_steps is not None and not 0 <= trained_steps <= config.evaluation.num_steps:
        raise ConfigError(
            f"evaluation.trained_steps={trained_steps} is not in 0..{config.evaluation.num_steps} "
            "(evaluation.num_steps); None lets the trained policy take all"
        )
    passes = samples // batch.updates // batch.micro_batch * plan.num_trained
    return Settings(config, plan, sampler, advantage, objective, lora, samples, passes)


def _positive(config, *fields):
    for field in fields:
        if not _get(config, field) > 0:
            raise ConfigError(f"{field}={_get(config, field)} must be positive")


def _get(config, field):
    return functools.reduce(lambda section, name: section[name], field.split("."), config)


def _choice(field, value, known):
    if value not in known:
        raise ConfigError(f"{field}={value!r} is unknown; choose from {', '.join(sorted(known))}")


def _divides(field, value, what, whole):
    if whole % value:
        near = [d for d in range(1, whole + 1) if whole % d == 0]
        raise ConfigError(
            f"{field}={value} does not divide the {whole} {what}; nearest that do: "
            f"{', '.join(str(d) for d in sorted(near, key=lambda d: abs(d - value))[:3])}"
        )
