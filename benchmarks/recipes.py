"""The recipes on `signs` with equal prompts, groups, steps and seeds: held-out score against evaluations and seconds.

    python -m benchmarks.recipes --workdir=runs/recipes

Runs are interleaved (all recipes of a seed before the next seed) and resumed if interrupted. Seconds are of rollout,
decoding, rewards and update: a recipe's median iteration over all of its runs, times the iterations, since machines
have other things to do; they are compared within a run of this program only. Evaluations are forward passes, of which
a gradient takes two more. Windows move as fast as the task's own run is longer.
"""

import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")
from absl import app, flags
from matplotlib import pyplot as plt

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.engine.cost import Cost
from mixgrpo_jax.runtime import metrics

RECIPES = ("dancegrpo", "flow_grpo", "mixgrpo", "mixgrpo_flash", "mixgrpo_flash_star", "nft")
CONFIGS = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds.")
_ITERATIONS = flags.DEFINE_integer("iterations", 24, "Iterations a run.")
_EVERY = flags.DEFINE_integer("every", 8, "Iterations between held-out scores.")


def run(recipe: str, seed: int, workdir: pathlib.Path) -> list[dict]:
    """The metrics of one run, which is done unless it is there."""
    config = configs.load(recipe, CONFIGS)
    config.seed = seed
    if config.plan.name == "window":
        stays = config.plan.iterations_per_window * _ITERATIONS.value / config.iterations
        config.plan.iterations_per_window = max(1, round(stays))
    config.iterations, config.evaluation.every = _ITERATIONS.value, _EVERY.value
    if len(metrics.read(workdir / "metrics.jsonl")) <= config.iterations:
        train.train(config, workdir)
    return metrics.read(workdir / "metrics.jsonl")


def points(lines: list[dict], seconds: float) -> list[dict[str, float]]:
    """The held-out scores of a run, each with what had been spent by then, at `seconds` an iteration."""
    spent, result = {"evaluations": 0.0}, []
    for line in lines:
        cost = Cost(*(line.get(f"nfe/{phase}", 0) for phase in Cost._fields))
        spent["evaluations"] += sum(cost.work(adapters=False).values())
        spent |= {"iteration": line["iteration"], "seconds": seconds * line["iteration"]}
        if "held_out/strict/mean" in line:
            result.append(spent | {name: line[f"held_out/{name}/mean"] for name in ("strict", "ocr", "colour")})
    return result


def table(runs: dict[str, list[list[dict]]]) -> str:
    """One row a recipe: the final scores (mean and range over seeds), and its cost as a fraction of dancegrpo's."""
    rows = ["| recipe | strict | ocr | colour | evaluations | seconds |", "|---|---|---|---|---|---|"]
    cost = {recipe: {k: statistics.mean(p[-1][k] for p in seeds) for k in ("evaluations", "seconds")}
            for recipe, seeds in runs.items()}  # fmt: skip
    for recipe, seeds in runs.items():
        last = [p[-1] for p in seeds]
        means = {name: statistics.mean(p[name] for p in last) for name in ("strict", "ocr", "colour")}
        low, high = min(p["strict"] for p in last), max(p["strict"] for p in last)
        ratio = {k: cost[recipe][k] / cost["dancegrpo"][k] for k in ("evaluations", "seconds")}
        rows.append(
            f"| {recipe} | {means['strict']:.3f} ({low:.3f} to {high:.3f}) | {means['ocr']:.3f} "
            f"| {means['colour']:.3f} | {ratio['evaluations']:.2f} | {ratio['seconds']:.2f} |"
        )
    return "\n".join(rows)


def plot(runs: dict[str, list[list[dict]]], path: pathlib.Path) -> None:
    """Held-out strict score against evaluations and against seconds; a line a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for index, (recipe, seeds) in enumerate(runs.items()):
        for axis, key in zip(axes, ("evaluations", "seconds")):
            for number, series in enumerate(seeds):
                x, y = [p[key] for p in series], [p["strict"] for p in series]
                axis.plot(x, y, "o-", color=f"C{index}", alpha=0.7, markersize=3, label=None if number else recipe)
            axis.set_xlabel(key)
            axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out strict score")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(_):  # noqa: D103
    workdir = pathlib.Path(_WORKDIR.value)
    lines: dict[str, list[list[dict]]] = {recipe: [] for recipe in RECIPES}
    for seed in _SEEDS.value:
        for recipe in RECIPES:
            lines[recipe].append(run(recipe, int(seed), workdir / f"{recipe}-{seed}"))
    times = {r: [line["time/iteration"] for run in lines[r] for line in run[2:]] for r in RECIPES}  # the first compiles
    runs = {r: [points(run, statistics.median(times[r])) for run in lines[r]] for r in RECIPES}
    plot(runs, workdir / "recipes.png")
    (workdir / "recipes.md").write_text(table(runs) + "\n")
    print(table(runs))


if __name__ == "__main__":
    app.run(main)
