"""The sweep: its points, and a grid run with a stand-in for training."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from mixgrpo_jax import config as configs

ROOT = pathlib.Path(__file__).parents[2]
SIGNS_SWEEP = str(ROOT / "configs" / "signs_sweep.py")
# Training's stand-in: seed 2 fails at the lower rate; the held-out score is the seed.
TRAIN = """
import json, pathlib, sys
flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
seed, rate = flags["config.seed"], float(flags["config.optimizer.learning_rate"])
if seed == "2" and rate < 1.5e-5:
    sys.exit("ValueError: seed 2 is unlucky")
lines = [{"iteration": i, "loss/total": 0.0} for i in range(4)]
lines += [{"iteration": 4, "held_out/strict/mean": float(seed), "held_out/strict/std": 0.0}]
pathlib.Path(flags["workdir"], "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "launch" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def grid(sweep, tmp_path):
    """`grid(body)`: the points of a recipe of four iterations whose sweep(add) has that body."""

    def points(body):
        recipe = tmp_path / "recipe.py"
        recipe.write_text(f"def sweep(add):\n    {body}\n")
        config = configs.load("quickstart", SIGNS_SWEEP)
        config.iterations = 4
        return sweep.points(str(recipe), config.lock(), tmp_path / "runs")

    return points


RATES = "[add(**{'optimizer.learning_rate': rate, 'seed': seed}) for rate in (1e-5, 2e-5) for seed in (1, 2)]"


@pytest.fixture
def run(sweep, grid, tmp_path, capsys):
    """Run the unfinished points of a grid by the stand-in; returns who succeeded, and what was said."""

    def run_all():
        (tmp_path / "train.py").write_text(TRAIN)
        left = [point for point in grid(RATES) if point.done() < point.iterations]
        start = [sys.executable, str(tmp_path / "train.py")]
        succeeded = [sweep.run(p, [*start, f"--workdir={p.workdir}", *p.flags]) for p in left]
        return succeeded, capsys.readouterr().out

    return run_all


def test_points_are_run_reported_and_gone_on_with(sweep, grid, run):
    succeeded, said = run()
    assert succeeded == [True, False, True, True]
    assert "optimizer.learning_rate=1e-05,seed=2: failed with status 1" in said
    assert "ValueError: seed 2 is unlucky" in said  # the end of its log
    assert sweep.table(grid(RATES)).splitlines() == [
        "| optimizer.learning_rate | seed | iterations | held_out/strict | at iteration |",
        "| --- | --- | --- | --- | --- |",
        "| 1e-05 | 1 | 4/4 | 1.0000 | 4 |",
        "| 1e-05 | 2 | 0/4 |  |  |",
        "| 2e-05 | 1 | 4/4 | 1.0000 | 4 |",
        "| 2e-05 | 2 | 4/4 | 2.0000 | 4 |",
    ]
    succeeded, said = run()  # again: the failed point alone
    assert succeeded == [False] and said.count("started") == 1


def test_a_point_is_its_own_fields_on_top_of_the_overrides(sweep, grid):
    point = grid(RATES)[1]
    assert sweep.command(point, "configs/a_b.py:x", ["--config.iterations=4"])[1:] == [
        *("-m", "mixgrpo_jax.train", "--config=configs/a_b.py:x", f"--workdir={point.workdir}"),
        *("--config.iterations=4", "--config.optimizer.learning_rate=1e-05", "--config.seed=2"),
    ]
    launched = sweep.launch_command("launch/tpu_vm.sh --zone=z", 1, point, "configs/a_b.py:x", [])
    assert launched[:3] == ["launch/tpu_vm.sh", "--zone=z", "--name=a-b-1"]  # underscores are none of gcloud's letters
    assert launched[-3:] == ["--", "--config.optimizer.learning_rate=1e-05", "--config.seed=2"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            'add(seed=1); add(**{"optimizer.lerning_rate": 1e-5})',
            "optimizer.lerning_rate=1e-05: there is no such field",
        ),
        ('add(**{"optimiser.learning_rate": 1e-5})', "optimiser.learning_rate=1e-05: there is no such field"),
        ('add(**{"seed.more": 1})', "seed.more=1: "),
        ('add(seed="seven")', "seed='seven': "),
        ('add(**{"batch.updates": 5})', "point batch.updates=5: batch.updates=5 does not divide"),
        ("add(seed=1); add(seed=1)", "adds seed=1 twice"),
        ("pass", "adds no point"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(grid, tmp_path, body, message):
    with pytest.raises(configs.ConfigError, match=message):
        grid(body)
    assert not (tmp_path / "runs").exists()


def test_a_config_without_a_grid_is_refused(sweep, tmp_path):
    path = str(ROOT / "configs" / "quickstart.py")
    with pytest.raises(configs.ConfigError, match=r"quickstart.py has no sweep\(add\)"):
        sweep.points(path, configs.load("quickstart", path), tmp_path)


def test_the_command(tmp_path):
    """The shipped grid as a dry run, on the command line."""
    workdir = f"--workdir={tmp_path / 'runs'}"
    command = [sys.executable, "launch/sweep.py", "--config=configs/signs_sweep.py", workdir, "--config.iterations=3"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, "--dry_run"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(set(lines)) == 6
    assert lines[1].endswith("--config.iterations=3 --config.optimizer.learning_rate=2e-05 --config.seed=715")
    assert not (tmp_path / "runs").exists()
