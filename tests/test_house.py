"""The shape of the package: imports run downwards only, and what is optional stays away until it is named."""

import ast
import pathlib
import subprocess
import sys

import pytest

import mixgrpo_jax
from mixgrpo_jax.models.families import FAMILIES
from tests.python import run_program

PACKAGE = pathlib.Path(__file__).parents[1] / "mixgrpo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = {path.stem for path in PACKAGE.glob("*.py") if "app.run(main" in path.read_text()}

# A room, and the rooms that it may import beside itself.
MAY_IMPORT = {
    "flow": set(),
    "rl": {"flow"},
    "models": set(),
    "rewards": {"models"},
    "data": {"models", "runtime.files"},
    "tasks": {"data", "models", "rewards"},
    "runtime": set(),
    "engine": {"config", "flow", "rl", "models", "rewards", "data", "tasks", "runtime", "runtime.files"},
}
FILES_OF = ["runtime", "files"]  # where runs and data lie: apart, since it imports none of the others
# What the config reads of models: names and settings, and no model.
LIGHT = {"models", "models.nn", "models.nn.attention", "models.nn.placement", "models.nn.remat", "models.lora_config"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, line {node.lineno}: the other tests do not see that"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ours(path):
    return [name.split(".")[1:] for name in imports(path) if name.startswith("mixgrpo_jax.")]


def test_every_folder_is_a_room():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(MAY_IMPORT)
    assert {
        "train",
        "evaluate",
        "sample",
        "encode",
        "convert",
        "estimate",
        "pretrain",
        "report",
        "serve_rewards",
    } <= COMMANDS


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_downwards(room):
    files = [path for path in FILES if path.is_relative_to(PACKAGE / room)]
    assert files
    for path in files:
        names = (".".join(name[:2] if name[:2] == FILES_OF and room != "runtime" else name[:1]) for name in ours(path))
        others = {*names} - {room}
        assert others <= MAY_IMPORT[room], f"{path} imports {sorted(others - MAY_IMPORT[room])}"


def test_nothing_imports_a_command():
    for path in FILES:
        assert not {name[0] for name in ours(path)} & COMMANDS, f"{path} imports a command"


def test_no_model_family_is_imported():
    for family in {name.split(".")[2] for name in FAMILIES.values()}:
        for path in set(FILES) - set((PACKAGE / "models" / family).rglob("*.py")):
            found = [name for name in ours(path) if name[0] == "models" and family in name]
            assert not found, f"{path} imports {found}: families are loaded by their names"


def test_no_torch_or_tensorflow_at_run_time():
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "diffusers", "tensorflow"}, path


def brought_by(module):
    """Which of our modules an import brings along, without the package's name."""
    printed = run_program(f"import sys, {module}\nprint(*sys.modules)")
    return {name.partition(".")[2] for name in printed.split() if name.startswith("mixgrpo_jax.")}


def test_the_package_alone_brings_nothing():
    printed = run_program("import sys, mixgrpo_jax\nprint(*sys.modules)").split()
    assert "mixgrpo_jax" in printed
    assert not [name for name in printed if name.split(".")[0] in ("jax", "numpy") or name.startswith("mixgrpo_jax.")]


@pytest.mark.parametrize("module", ["flow", "flow.rollout", "rl.update"])
def test_the_method_alone_brings_no_model_reward_task_or_data(module):
    assert {name.split(".")[0] for name in brought_by(f"mixgrpo_jax.{module}")} <= {"flow", "rl"}


def test_the_config_alone_brings_no_model_reward_task_or_data():
    others = {name for name in brought_by("mixgrpo_jax.config") if name.split(".")[0] not in ("config", "flow", "rl")}
    assert others - LIGHT == {"rewards", "tasks"}, "their tables, and nothing that these name"


def test_commands_are_listed_and_run_by_name():
    def said(*arguments):
        command = [sys.executable, "-m", "mixgrpo_jax", *arguments]
        done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    status, listed = said()
    lines = [line.split(maxsplit=1) for line in listed.splitlines()[2:-2]]
    assert (
        status == 0 and {name for name, _ in lines} == COMMANDS and all(text.endswith(("?", ".")) for _, text in lines)
    )
    assert listed.splitlines()[-1] == f"Recipes are in {PACKAGE.with_name('configs')}"
    assert said("--version") == (0, f"mixgrpo_jax {mixgrpo_jax.__version__}\n")
    assert said("tarin") == (1, "ERROR: there is no command 'tarin'; did you mean train?\n")
    status, text = said("convert", "--source=nothing")
    missing = "--target is missing: new folder. --to is missing: <orbax|diffusers|lora>: What to write."
    assert (status, text) == (1, f"ERROR: {missing}\n")
