"""Does a config fit a TPU slice, and what does an iteration cost there? Answered by the TPU's compiler, without a TPU.

    pip install "mixgrpo_jax[tpu]"
    python -m mixgrpo_jax.estimate --config=configs/flux_dev_mixgrpo.py --topology=v5p:4x4x4

Compiles the run's own programs for the slice, with shapes in place of weights; minutes for a large model. Where
model.folder is not here, the sizes are those of `--architecture`. A config that does not fit is tried on larger slices
of the kind; `--smallest` looks for the smallest of every kind that does. `--json=FILE` writes the figures down.

Seconds are given twice: at best, which no program can beat, and by the schedule of the compiler, which estimates each
operation, see `runtime.schedule`. `--topology=2xv5p:4x4x4` is two slices, with the data-centre network between them.

The environment variable JAX_OPTIMIZATION_LEVEL=O1 makes the compiler try less: of FLUX.1-dev's run it takes 4 minutes
in place of 15 on one core, with the same FLOPs and transfers, and with temporaries that are a tenth more or less. Its
schedule is then no measure of speed, and is left out.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from tqdm import tqdm

from mixgrpo_jax import config as configs
from mixgrpo_jax.config import Settings, share
from mixgrpo_jax.engine import ahead
from mixgrpo_jax.engine.cost import Cost
from mixgrpo_jax.engine.fields import listed
from mixgrpo_jax.engine.programs import decode_chunks, drawing, fit, idle, prefix_rows, rollout_fsdp
from mixgrpo_jax.flow import plans
from mixgrpo_jax.models import families
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.nn import attention
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rl.samples import Tools
from mixgrpo_jax.rl.terms import make_terms
from mixgrpo_jax.rl.update import count_evaluations
from mixgrpo_jax.runtime import app, chips, compiler, hlo, schedule
from mixgrpo_jax.runtime import mesh as meshes

GIB = 2.0**30
BOUND = (
    "the largest of compute, memory and interconnect in each phase, at full utilisation: peak bf16 products, the "
    "operands and results of products once through memory, all links of a device busy, nothing overlapped between "
    "phases, no host"
)
RATES = {str(rate): rate for rate in (0.4, schedule.RATE, 0.8)}  # of peak, that kernels are assumed to reach
SCHEDULE = (
    "the compiler's cycles, and transfers by bytes over bandwidth less what is computed meanwhile; nothing overlapped "
    "between phases, no latency, no host"
)
NO_SCHEDULE = "JAX_OPTIMIZATION_LEVEL={}: the compiler tries too little for its schedule to tell speed; leave it unset"


def work(settings: Settings, policy: Policy, mesh: Any) -> tuple[dict[str, float], dict[str, dict[str, float]], tuple]:
    """A mean iteration of the run: evaluations, FLOPs by phase, and the shares of gated steps that run.

    FLOPs are those expected, and those of them that are useful: what is recomputed is not.
    """
    planner, layout, seen = settings.planner, settings.planner.layout, []
    rows, state = prefix_rows(layout, settings.batch, drawing(settings, mesh)), planner.initial()
    for _ in range(settings.config.iterations):
        plan = planner.plan(state, settings.batch.prompts)
        seen.append((plans.evaluations(layout, plan, rows, settings.samples), *plans.executed(layout, plan)))
        state = planner.advance(state)
    rollout, *steps = np.mean(seen, axis=0).tolist()
    tools = Tools(settings.sampler, make_terms(settings.terms, settings.sampler), policy.tokens)
    of_update = count_evaluations(
        settings.objective, settings.roles, tools, policy.latent_shape, planner.num_trained, settings.gradients
    )
    cost = Cost(*(policy.evaluations * n for n in (rollout, *(settings.trained_samples * each for each in of_update))))
    adapters = settings.model.lora.rank > 0
    recomputed = settings.model.remat in ("attention", "block")  # the former all but attention
    passes = {"expected": cost.work(adapters, recomputed), "useful": cost.work(adapters)}
    shares = tuple(n / segment.steps for n, segment in zip(steps, layout) if segment.steps and not segment.record)
    phases = {"rollout": cost.rollout, "update": cost.update}
    flops = {phase: {name: policy.flops * count[phase] for name, count in passes.items()} for phase in phases}
    return phases, flops, shares


def slice_mesh(settings: Settings, topology: str) -> Any:
    """The config's mesh over a slice's devices. Raises ValueError where it does not fill them."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU's compiler is not installed: pip install 'mixgrpo_jax[tpu]'")
    return meshes.make_mesh(settings.config.mesh, slice_devices(topology), settings.update_samples)


def host_mesh(topology: str) -> Any:
    """A mesh over the devices of one of the slice's hosts: of every kind of TPU, those of the smallest slice."""
    _, kind, _ = chips.parse(topology)
    devices = slice_devices(f"{kind}:{chips.CHIPS[kind].slices[0]}")
    return meshes.make_mesh({"data": -1}, devices)


def slice_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of one slice or several, which are not here."""
    slices, kind, shape = chips.parse(topology)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # as JAX has it: a device is a chip, not a core
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices


def estimate(settings: Settings, parts: Parts, topology: str) -> dict[str, Any]:
    """Figures of a config on a slice, as `--json` writes them."""
    chip, mesh = chips.chip(topology), slice_mesh(settings, topology)
    settings = fit(settings, parts, mesh)
    phases, resident = ahead.lower(settings, parts, mesh, host_mesh(topology))
    evaluations, expected, shares = work(settings, parts.family.make(parts, settings.model), mesh)
    result: dict[str, Any] = {"topology": topology, "devices": mesh.size, "mesh": dict(mesh.shape), "fits": True}
    result |= {"hbm_bytes": chip.hbm, "evaluations_per_iteration": evaluations}
    result |= {"remat": settings.model.remat, "samples_per_pass": _each(settings, mesh)}
    result["notes"] = notes(settings, mesh, phases)
    result |= {field: {} for field in ("bytes_per_device", "flops_per_iteration", "collectives")}
    result |= {"seconds_per_iteration": {}, "schedule": {}}
    level = jax.config.jax_optimization_level  # type: ignore[attr-defined]
    if level in ("O0", "O1"):
        result["notes"].append(NO_SCHEDULE.format(level))
    chunks = len(decode_chunks(settings.samples, settings.config.batch.decode, meshes.batch_ways(mesh)))
    for phase, lowered in (progress := tqdm(phases.items(), desc="compile")):
        progress.set_postfix_str(phase)
        compiled, asked = ahead.compile_phase(lowered)
        sizes = {"total": asked} if compiled is None else ahead.memory(phase, compiled, resident)
        result["bytes_per_device"][phase] = sizes
        if sizes["total"] > chip.hbm:
            result["fits"] = False
            result["notes"].append(remedy(phase, settings, mesh, sum(resident.values()) / chip.hbm))
        if compiled is None:
            continue
        times = 1 if phase in ("features", "rollout", "reward_grad", "update") else chunks
        text, gates = compiled.as_text(), shares if phase == "rollout" else ()
        cost = hlo.cost(text, gates, attention.kernel_flops) * times
        flops = {"compiled": cost.flops * mesh.size, **expected.get(phase, {})}
        if phase in expected:
            flops["ratio"] = flops["compiled"] / flops["expected"]
        result["flops_per_iteration"][phase] = flops
        result["collectives"][phase] = {k: {"count": n, "bytes": b} for k, (n, b) in cost.collectives.items()}
        result["seconds_per_iteration"][phase] = {
            "compute": cost.flops / chip.flops,
            "memory": cost.bytes / chip.hbm_bandwidth,
            "interconnect": cost.moved / chip.link_bandwidth,
        } | ({"network": cost.across / chip.network_bandwidth} if cost.across else {})
        if level not in ("O0", "O1"):
            plan = schedule.read(text, gates, attention.kernel_flops) * times
            result["schedule"][phase] = _scheduled(plan, chip, flops, chip.flops * mesh.size)
    return result


def _scheduled(plan: schedule.Schedule, chip: chips.Chip, flops: dict[str, float], peak: float) -> dict[str, Any]:
    """Figures of a phase by the compiler's schedule, by kernels' rate. `peak` is the whole mesh's, in FLOP/s."""
    seconds = {name: plan.seconds(chip, rate) for name, rate in RATES.items()}
    work = {"with recomputation": flops["compiled"]}
    work |= {"without recomputation": flops["useful"]} if "useful" in flops else {}
    return {
        "seconds": seconds,
        "hidden": {name: plan.hidden(chip, rate) for name, rate in RATES.items()},
        "utilisation": {
            name: {which: count / peak / by_kind["total"] for which, count in work.items() if by_kind["total"]}
            for name, by_kind in seconds.items()
        },
        "costliest": plan.costliest(chip),
    }


def notes(settings: Settings, mesh: Any, phases: Collection[str]) -> list[str]:
    """What of a config sits badly on a mesh, and what is not among the phases."""
    found, batch, drawn = idle(settings, mesh), settings.batch, drawing(settings, mesh)
    rows, ways = prefix_rows(settings.planner.layout, batch, drawn), meshes.batch_ways(drawn)
    computed = rows if rows % ways == 0 else rows * ways
    if batch.shared_noise and computed > batch.prompts:
        found.append(
            f"a group shares its prefix, and {batch.prompts} prompts do not keep data x fsdp = {ways} at work on it: "
            f"{1 - batch.prompts / computed:.0%} of what devices compute there, others compute too"
        )
    rewards = dict.fromkeys([*settings.config.rewards, *settings.config.watched])
    if "reward_grad" in settings.objective.needs and "reward_grad" not in phases:
        found.append("not counted: the gradient of the rewards, some of which are formulas")
    if rest := [name for name in rewards if name not in phases]:
        found.append(f"not counted: rewards {', '.join(rest)}")
    if settings.config.model.attention == "xla":
        found.append("model.attention='xla' makes the scores of all pairs of tokens; 'auto' takes TPU's fused kernel")
    if settings.config.model.remat == "auto":
        found.append(
            f"model.remat='auto' is {settings.model.remat!r} here, with {_each(settings, mesh)} samples of a device in "
            f"a pass, of batch.micro_batch={settings.config.batch.micro_batch} at most: what should fit"
        )
    return found


def _each(settings: Settings, mesh: Any) -> int:
    """Samples of a device in a forward and backward pass."""
    return share(settings.update_samples, settings.batch.micro_batch, meshes.batch_ways(mesh))


def remedy(phase: str, settings: Settings, mesh: Any, resident: float) -> str:
    """What would help a phase that does not fit, where `resident` is the share of memory that is never free."""
    config, ways = settings.config, meshes.batch_ways(mesh)
    steps = ["a larger slice" if config.mesh.fsdp == -1 else "mesh.fsdp=-1 with mesh.data=1 on a larger slice"]
    if resident > 0.5 and not settings.model.lora.rank:
        steps.append("adapters (model.lora.rank=64)")
    if phase == "update" and settings.model.remat != "block":
        steps.append("model.remat='block'")
    for program, field, size in (
        ("update", "micro_batch", _each(settings, mesh)),
        ("decode", "decode", share(settings.samples, config.batch.decode, ways)),
    ):
        if phase == program and size > 1:
            steps.append(f"a smaller batch.{field} (now {size} samples a device)")
    if phase in ("rollout", "decode") and settings.samples > ways:
        steps.append(f"fewer batch.prompts (now {settings.samples // ways} samples a device)")
    return f"{phase} does not fit; what helps: " + "; ".join(steps)


def smallest(settings: Settings, parts: Parts, kind: str, beyond: int = 0) -> str | None:
    """The first slice of a kind that the config fits, of those with more than `beyond` chips, from small to large."""
    for shape in chips.CHIPS[kind].slices:
        topology = f"{kind}:{shape}"
        with contextlib.suppress(ValueError):  # the config's mesh does not fill every slice
            mesh = slice_mesh(settings, topology)
            if chips.size(topology) > beyond and _fits(settings, parts, mesh, topology):
                return topology
    return None


def _fits(settings: Settings, parts: Parts, mesh: Any, topology: str) -> bool:
    phases, resident = ahead.lower(settings, parts, mesh, host_mesh(topology))
    hbm = chips.chip(topology).hbm
    if sum(resident.values()) > hbm:
        return False
    for phase in reversed(phases):  # the update takes the most
        compiled, _ = ahead.compile_phase(phases[phase])
        if compiled is None or ahead.memory(phase, compiled, resident)["total"] > hbm:
            return False
    return True


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    axes = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    hbm = result["hbm_bytes"] / GIB
    lines = [f"{result['topology']}: {result['devices']} devices ({axes}), {hbm:.2f} GiB each"]
    lines += [f"update: {result['samples_per_pass']} samples of a device in a pass, remat {result['remat']!r}", ""]
    lines += _block("GiB a device", result["bytes_per_device"], GIB)
    lines += _block("evaluations", {k: {"an iteration": v} for k, v in result["evaluations_per_iteration"].items()})
    flops = result["flops_per_iteration"]
    lines += _block("PFLOP an iteration", {k: {n: v[n] for n in v if n != "ratio"} for k, v in flops.items()}, 1e15)
    lines += _block("", {k: {"compiled / expected": v.get("ratio")} for k, v in flops.items()})
    moved = result["collectives"]
    lines += _block("collectives", {p: {k: v["count"] for k, v in moved[p].items()} for p in moved})
    lines += _block("GiB received a device", {p: {k: v["bytes"] for k, v in moved[p].items()} for p in moved}, GIB)
    seconds, phases = result["seconds_per_iteration"], result["schedule"]
    lines += _block("seconds at best", seconds)
    lines += _schedule_lines(phases) if phases else []
    if result["fits"]:
        lines.append(
            f"fits; an iteration takes at least {sum(max(s.values()) for s in seconds.values()):.3f} s: {BOUND}"
        )
    else:
        lines.append("does not fit")
    if phases and result["fits"]:
        by_rate = ", ".join(
            f"{sum(s['seconds'][rate]['total'] for s in phases.values()):.3f} s at {rate}" for rate in RATES
        )
        lines.append(f"by the schedule it takes, with kernels at so much of peak, {by_rate}: {SCHEDULE}")
    return "\n".join(lines + [f"- {note}" for note in result["notes"]])


def _schedule_lines(phases: dict[str, Any]) -> list[str]:
    """The figures of `_scheduled`, and the costliest operations of the phases whose useful work is known."""
    middle = str(schedule.RATE)
    lines = _block("seconds by the schedule", {phase: s["seconds"][middle] for phase, s in phases.items()})
    lines += _block("", {phase: {"transfers, hidden": s["hidden"][middle]} for phase, s in phases.items()})
    for rate in RATES:
        lines += _block(f"of peak, kernels at {rate}", {phase: s["utilisation"][rate] for phase, s in phases.items()})
    for phase, s in phases.items():
        if "without recomputation" not in s["utilisation"][middle]:
            continue
        lines.append(f"costliest of {phase:<14}{'share':>8}{'seconds':>12}{'times':>12}{'cycles':>12}")
        for i in s["costliest"]:
            scope = [part for part in i["scope"].split("/")[1:] if part not in ("while", "body", "closed_call")]
            about = f"{i['place'] or '-'} {'/'.join(scope)}"
            figures = f"{i['share']:>8.1%}{i['seconds']:>12.4g}{i['times']:>12.5g}{i['cycles']:>12.5g}"
            lines.append(f"  {i['kind']:<25}{figures}  {i['name']}: {about}")
        lines.append("")
    return lines


def _block(title: str, columns: Mapping[str, Mapping[str, float | None]], scale: float = 1.0) -> list[str]:
    widths = [max(12, len(phase) + 2) for phase in columns]
    lines = [f"{title:<24}" + "".join(f"{phase:>{width}}" for phase, width in zip(columns, widths))]
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        cells = (f"{value / scale:.5g}" if (value := c.get(row)) is not None else "-" for c in columns.values())
        lines.append(f"  {row:<22}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    return [*lines, ""]


def find_parts(settings: Settings, architecture: str) -> Parts:
    """The parts of a config's model: from its folder's configs, or where there is none a released model's."""
    options = settings.config.model
    if families.is_here(options.folder):
        return families.read_parts(options.folder, options.transformer)
    print(f"model.folder={options.folder!r} is not here: sizes are those of {architecture}")
    return families.architectures()[architecture]()


def main(_):  # noqa: D103
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or the TPU's library asks the cloud which TPU this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # or it refuses where another process has loaded it
    jax.config.update("jax_platforms", "cpu")
    config = _CONFIG.value
    if config.model.attention == "auto":
        config.model.attention = "splash"  # what it is on a TPU
    settings = configs.resolve(config)
    parts = find_parts(settings, _ARCHITECTURE.value)
    mesh = slice_mesh(settings, _TOPOLOGY.value)
    print(fit(settings, parts, mesh).arithmetic(meshes.batch_ways(mesh)))
    print(compiler.describe(mesh.devices.flat))
    print(meshes.describe(mesh, rollout_fsdp(settings, parts, mesh)))
    result = estimate(settings, parts, _TOPOLOGY.value)
    print(table(result))
    if _SMALLEST.value:
        result["smallest"] = {kind: smallest(settings, parts, kind) for kind in chips.CHIPS}
    elif not result["fits"]:
        _, kind, _ = chips.parse(_TOPOLOGY.value)
        result["smallest"] = {kind: smallest(settings, parts, kind, beyond=chips.size(_TOPOLOGY.value))}
    if "smallest" in result:
        print("smallest slices that fit:", ", ".join(f"{v or f'no {k}'}" for k, v in result["smallest"].items()))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    _CONFIG = app.config_flag(listed)
    _TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, as v5p:4x4x4.", required=True)
    _ARCHITECTURE = flags.DEFINE_enum("architecture", "flux1-dev", list(families.architectures()), "Without a folder.")
    _SMALLEST = flags.DEFINE_bool("smallest", False, "Look for the smallest slice of every kind that fits.")
    _JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
    app.run(main)
