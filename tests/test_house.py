"""The shape of the package: imports run downwards only, and what a newcomer is told is true."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "mixgrpo_jax"
MAY_IMPORT = {
    "flow": {"flow"},
    "models": {"models"},
    "data": {"data", "models"},
    "tasks": {"tasks", "data", "models", "rewards"},
    "runtime": {"runtime"},
    "rl": {"rl", "flow"},
    "rewards": {"rewards", "models"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_downwards(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("mixgrpo_jax.")}
        assert ours <= MAY_IMPORT[room], f"{path} imports {sorted(ours - MAY_IMPORT[room])}"


def test_no_torch_or_tensorflow_at_run_time():
    for path in PACKAGE.rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "diffusers", "tensorflow"}, path
