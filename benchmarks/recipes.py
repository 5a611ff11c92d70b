"""Every recipe on `signs`, from one weak start and for one budget of model evaluations: held-out scores.

    python -m benchmarks.recipes --workdir=runs/recipes

The start is pretrained for fewer steps than the shipped policy, so that there is much to learn. All recipes of a seed
run before the next seed, on the same prompts, and are scored on the same held-out prompts with the same noise. Every
recipe runs as it is shipped, once: nothing was tuned on what is scored. Windows move as fast as the budget is shorter
than the task's own run. A run is a row of rows.jsonl, a recipe that fails one too; started again, it makes those that
are missing, and draws the table and the picture from all.

Evaluations are forward passes, of which a gradient takes two more. Seconds are not compared: runs share the machine.
"""

import itertools
import json
import pathlib
import statistics
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
from absl import app, flags, logging
from matplotlib import pyplot as plt

from mixgrpo_jax import config as configs
from mixgrpo_jax import estimate, train
from mixgrpo_jax.engine.cost import Cost
from mixgrpo_jax.engine.loading import load_policy, mesh_of
from mixgrpo_jax.pretrain import pretrain
from mixgrpo_jax.runtime import compiler, metrics

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
MODELS = ("flux", "sd35", "quickstart", "scenes", "signs")  # what is no method
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith(MODELS))
YARDSTICK = "mixgrpo"
PARTS = 4  # of the budget, after each of which a run is scored
SCORES = ("strict", "ocr", "colour")

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
_RECIPES = flags.DEFINE_list("recipes", RECIPES, "Which.")
_SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds.")
_ITERATIONS = flags.DEFINE_integer("iterations", 20, f"Iterations of {YARDSTICK}, whose evaluations are the budget.")
_START = flags.DEFINE_integer("start", 1000, "Steps of the start's pretraining.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.7, "A strict score, and the evaluations until a run has it.")


def load(recipe: str, seed: int, folder: str) -> Any:
    """A recipe's config, with pictures' novelty in their groups watched."""
    config = configs.load(recipe, str(CONFIGS / "any.py"))
    config.seed, config.model.folder = seed, folder
    if "novelty" not in config.rewards:
        config.watched = (*config.watched, "novelty")
        config.reward_options.novelty = dict(encoder="pixels")
    config.evaluation.prompts = 512
    return config


def cost(config: Any) -> float:
    """Forward passes of a mean iteration."""
    settings = configs.resolve(config)
    mesh = mesh_of(settings)
    policy = load_policy(settings, mesh)[1]
    _, flops, _ = estimate.work(settings, policy, mesh)
    return sum(phase["useful"] for phase in flops.values()) / policy.flops


def run(recipe: str, seed: int, folder: str, workdir: pathlib.Path) -> dict[str, Any]:
    """A run, whole or what is left of it, as a row."""
    yardstick, config = load(YARDSTICK, seed, folder), load(recipe, seed, folder)
    config.iterations = max(PARTS, round(_ITERATIONS.value * cost(yardstick) / cost(config)))
    for section in ("plan", "averages"):
        if "iterations_per_window" in config[section]:
            stays = config.plan.iterations_per_window * config.iterations / yardstick.iterations
            config.plan.iterations_per_window = max(1, round(stays))
    config.evaluation.every = max(1, config.iterations // PARTS)
    train.train(config, workdir)
    lines = metrics.read(workdir / "metrics.jsonl")
    novelty = [line[f"{kind}/novelty/mean"] for line in lines for kind in ("reward", "watched")
               if f"{kind}/novelty/mean" in line]  # fmt: skip
    return {"recipe": recipe, "seed": seed, "points": points(lines), "novelty": [novelty[0], novelty[-1]]}


def points(lines: list[dict]) -> list[dict[str, float]]:
    """The held-out scores of a run, each with the evaluations that were spent by then."""
    spent, result = 0.0, []
    for line in lines:
        spent += sum(Cost(*(line.get(f"nfe/{phase}", 0) for phase in Cost._fields)).work(adapters=False).values())
        if "held_out/strict/mean" in line:
            scores = {name: line[f"held_out/{name}/mean"] for name in SCORES}
            result.append({"iteration": line["iteration"], "evaluations": spent} | scores)
    return result


def at(points: list[dict], evaluations: float, name: str = "strict") -> float:
    """A score after so many evaluations, on the line between those before and after."""
    before = max((p for p in points if p["evaluations"] <= evaluations), key=lambda p: p["evaluations"])
    after = next((p for p in points if p["evaluations"] > evaluations), before)
    share = (evaluations - before["evaluations"]) / max(after["evaluations"] - before["evaluations"], 1)
    return before[name] + share * (after[name] - before[name])


def reached(points: list[dict], threshold: float) -> float | None:
    """Evaluations until the strict score was there, on the line; None if it never was."""
    for before, after in itertools.pairwise(points):
        if after["strict"] >= threshold:
            share = (threshold - before["strict"]) / (after["strict"] - before["strict"])
            return before["evaluations"] + max(share, 0) * (after["evaluations"] - before["evaluations"])
    return None


def table(rows: list[dict], threshold: float) -> str:
    """One line a recipe, the best first; evaluations are a fraction of the yardstick's budget."""
    runs: dict[str, list[dict]] = {}
    for row in rows:
        runs.setdefault(row["recipe"], []).append(row)
    budget = statistics.mean(row["points"][-1]["evaluations"] for row in runs[YARDSTICK])
    title = f"| recipe | seeds | a quarter | half | whole (range) | OCR | colour | budget to {threshold} | novelty |"
    lines = [title, "|---" * 9 + "|"]
    whole = {recipe: [at(row["points"], budget) for row in of] for recipe, of in runs.items()}
    for recipe in sorted(runs, key=lambda recipe: -statistics.mean(whole[recipe])):
        of = runs[recipe]
        part = [statistics.mean(at(row["points"], budget * share) for row in of) for share in (0.25, 0.5)]
        ocr, colour = (statistics.mean(row["points"][-1][name] for row in of) for name in SCORES[1:])
        times = [reached(row["points"], threshold) for row in of]
        known = [each / budget for each in times if each is not None]
        took = f"{statistics.mean(known):.2f}" if len(known) == len(of) else f"{len(known)} of {len(of)} runs"
        novelty = [statistics.mean(row["novelty"][end] for row in of) for end in (0, -1)]
        low, high = min(whole[recipe]), max(whole[recipe])
        spread = f" ({low:.3f} to {high:.3f})" if len(of) > 1 else ""
        lines.append(
            f"| {recipe} | {len(of)} | {part[0]:.3f} | {part[1]:.3f} | {statistics.mean(whole[recipe]):.3f}{spread} "
            f"| {ocr:.3f} | {colour:.3f} | {took} | {novelty[0]:.3f} to {novelty[1]:.3f} |"
        )
    if len(whole[YARDSTICK]) > 2:
        deviation = statistics.stdev(whole[YARDSTICK])
        lines.append(
            f"\nThe standard deviation of {YARDSTICK}'s {len(whole[YARDSTICK])} seeds is {deviation:.3f}: recipes of "
            f"three seeds are told apart from {2 * deviation * (2 / 3) ** 0.5:.3f} on, of one seed from "
            f"{2 * deviation * 2**0.5:.3f} on."
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """A panel a recipe: strict score against evaluations, over the yardstick's."""
    recipes = sorted({row["recipe"] for row in rows})
    columns = 6
    figure, axes = plt.subplots(
        -(-len(recipes) // columns), columns, figsize=(13, 1.7 * -(-len(recipes) // columns)), sharex=True, sharey=True
    )
    for axis, recipe in zip(axes.flat, recipes):
        for name, colour in ((YARDSTICK, "0.75"), (recipe, "C0")):
            for row in rows:
                if row["recipe"] == name:
                    x = [p["evaluations"] / 1000 for p in row["points"]]
                    axis.plot(x, [p["strict"] for p in row["points"]], color=colour, linewidth=1.3)
        axis.set_title(recipe, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(recipes) :]:
        axis.axis("off")
    figure.supxlabel("thousand evaluations", fontsize=9)
    figure.supylabel(f"held-out strict score ({YARDSTICK} in grey)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(_):  # noqa: D103
    logging.set_verbosity(logging.WARNING)
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    compiler.keep_beside(workdir / "run")
    start, file = workdir / "start" / "checkpoint", workdir / "rows.jsonl"
    if not start.is_dir():
        config = configs.load("signs", str(CONFIGS / "any.py"))
        config.pretrain.steps = config.pretrain.evaluate_every = _START.value
        config.evaluation.prompts = 512
        pretrain(config, start.parent)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["recipe"], row["seed"]) for row in rows}
    for seed in map(int, _SEEDS.value):
        for recipe in _RECIPES.value:
            if (recipe, seed) not in done:
                try:
                    rows.append(run(recipe, seed, str(start), workdir / f"{recipe}-{seed}"))
                except Exception as error:  # the others can still be compared
                    print(f"{recipe}, seed {seed} FAILED: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                with file.open("a") as log:
                    log.write(json.dumps(rows[-1]) + "\n")
    told = table(rows, _THRESHOLD.value)
    (workdir / "recipes.md").write_text(told + "\n")
    plot(rows, workdir / "recipes.png")
    print(told)


if __name__ == "__main__":
    app.run(main)
