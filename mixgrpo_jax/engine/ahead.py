"""An iteration's programs ahead of time: lowered for devices that are not here, with shapes in place of weights."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.config import Settings
from mixgrpo_jax.engine.programs import Programs, group_places, make_programs
from mixgrpo_jax.engine.reward_grad import RewardGrad
from mixgrpo_jax.flow.plans import Plan
from mixgrpo_jax.flow.rollout import Rollout
from mixgrpo_jax.models import families
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.trainable import trainable_shapes
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.scoring import sketch
from mixgrpo_jax.rl import replay
from mixgrpo_jax.rl.select import All, Replay
from mixgrpo_jax.rl.update import Batch
from mixgrpo_jax.runtime import mesh as meshes

# Resident memory each program takes as arguments; the rest stays allocated. A reward's program takes that of its name.
ARGUMENTS = {"features": ("text",), "rollout": ("parameters", "base"), "decode": ("vae",)}
ARGUMENTS["reward_grad"] = ("vae", "reward_grad")
ARGUMENTS["update"] = ("parameters", "optimiser, EMA", "base", "reference")


def lower(settings: Settings, parts: Parts, mesh: Any, host: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The programs of an iteration, lowered for a mesh, and bytes a device of what stays there all along, by kind.

    The programs that decode and that score are those of a chunk, see `programs.decode_chunks`. Each host scores its own
    rows on its own devices, of which `host` is a mesh. The program of the rewards' gradient is of all chunks; it is
    among them where the objective asks for it and every reward is a model.
    """
    config, text = settings.config, settings.config.data.name != "features"

    def place(tree: Any) -> Any:
        return meshes.placed(tree, meshes.shardings(tree, parts.family.rules, mesh))

    def spread(tree: Any, size: int) -> Any:
        return meshes.placed(tree, jax.tree.map(lambda _: meshes.batch_sharding(mesh, size), tree))

    params = place(families.shapes(parts, text=text, dtype=jnp.bfloat16 if settings.model.lora.rank else jnp.float32))
    made = trainable_shapes(parts, params.pop("transformer"), settings.model.lora, settings.keep_base)
    trainable = made._replace(params=place(made.params), base=place(made.base))
    frozen = params | {"base": trainable.base}
    programs = make_programs(settings, parts, trainable, mesh)
    state = place(jax.eval_shape(programs.init, trainable.params))
    planner, key = settings.planner, jax.eval_shape(jax.random.key, 0)
    plan = planner.plan(planner.initial(), settings.batch.prompts)
    plan = meshes.placed(plan, jax.tree.map(lambda _: meshes.replicated(mesh), plan))
    policy = parts.family.make(parts, settings.model)
    tokens, cond = policy.token_shapes(config.batch.prompts), policy.cond_shapes(config.batch.prompts)
    models = sketch([*config.rewards, *config.watched], config.reward_options)

    phases: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        if text:
            phases["features"] = programs.features.lower(frozen, tokens)
            cond = jax.eval_shape(programs.features, frozen, tokens)
        cond = spread(cond, config.batch.prompts)
        sampled = jax.eval_shape(programs.rollout, trainable.params, frozen, plan, cond, key)
        sampled = meshes.placed(sampled, programs.places)
        phases["rollout"] = programs.rollout.lower(trainable.params, frozen, plan, cond, key)
        phases["decode"] = programs.decode.lower(frozen, sampled.x0, 0)
    with jax.set_mesh(host):
        share = max(1, programs.chunks.shape[1] * host.size // mesh.size)
        scored = {name: model.lower(share, config.model.image_size, host) for name, model in models.items()}
        phases |= {name: program for name, (program, _) in scored.items()}
    asked = [name for name, weight in settings.rewards.items() if weight]
    gradient = None
    with jax.set_mesh(mesh):
        if "reward_grad" in settings.objective.needs and models.keys() >= {*asked}:
            rewards = [Reward(name, "device", models[name]) for name in asked]
            gradient = RewardGrad(policy, rewards, settings.rewards, programs.chunks, mesh)
            phases["reward_grad"] = gradient.lower(frozen, sampled.x0)
        phases["update"] = programs.update.lower(
            state, trainable.base, *_lesson(settings, programs, mesh, sampled, cond, plan)
        )
    size = meshes.bytes_per_device
    resident = {"parameters": size(state.params), "optimiser, EMA": size(state) - size(state.params)}
    encoders = {name: tree for name, tree in params.items() if name.startswith("text")}
    resident["base" if settings.model.lora.rank else "reference"] = size(trainable.base)
    resident |= {"vae": size(params.get("vae")), "text": size(encoders)}
    resident |= {name: size(params) for name, (_, params) in scored.items()}
    resident |= {"reward_grad": size(gradient.weighted.params)} if gradient else {}
    return phases, resident


def _lesson(
    settings: Settings, programs: Programs, mesh: Any, sampled: Rollout, cond: Any, plan: Plan
) -> tuple[Batch, Plan, np.ndarray | None]:
    """What an update is given, as `collect.Collector.learn` has it."""
    count, needs, batch = settings.samples, settings.objective.needs, settings.batch
    gradient: Any = jax.ShapeDtypeStruct((1, *sampled.x0.shape), np.float32)
    extra = {"reward_grad": gradient, "reward": np.zeros((1, count), np.float32)} if "reward_grad" in needs else {}
    if "map" in needs:
        extra["map"] = np.zeros((1, *sampled.x0.shape[:2]), np.float32)
    if settings.optimizer.mix != "none":
        extra["by_reward"] = np.zeros((1, count, settings.gradients), np.float32)
    given = Batch(
        x0=sampled.x0 if "x0" in needs else None,
        rows=sampled.rows if needs & {"rows", "ode_row"} else (),
        advantage=np.zeros((1, count, 1), np.float32),
        weight=np.ones(count, np.float32),
        cond=cond,
        extra=extra,
    )
    if isinstance(settings.select, Replay):
        first = replay.positions(np.arange(settings.select.capacity) % batch.prompts, batch.group)
        kept = jax.eval_shape(programs.keep, given, plan, first)
        groups = jax.eval_shape(programs.join, given, plan, *kept)
        return *meshes.placed(groups, group_places(mesh, *groups)), replay.positions(
            np.arange(batch.prompts), batch.group
        )
    index, _ = settings.select(np.zeros((batch.prompts, batch.group)))
    return given, plan, None if isinstance(settings.select, All) else index


def compile_phase(lowered: Any) -> tuple[Any, float]:
    """The compiled program and 0, or None and the bytes that it would take where they are more than the chip's."""
    try:
        return lowered.compile(), 0.0
    except jax.errors.JaxRuntimeError as error:
        asked = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not asked:
            raise
        return None, float(asked[1]) * 1024.0 ** (1 + "KMGT".index(asked[2]))


def memory(phase: str, compiled: Any, resident: dict[str, float]) -> dict[str, float]:
    """Bytes a device in a phase, by kind. What the program does not take stays beside it."""
    stats = compiled.memory_analysis()
    own = sum(resident.get(kind, 0.0) for kind in ARGUMENTS.get(phase, (phase,)))
    sizes = resident | {
        "batch": max(stats.argument_size_in_bytes - own, 0.0),
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values())}
