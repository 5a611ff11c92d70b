"""The package as a library: its public names, its example, and the documents that show how to add to it."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import mixgrpo_jax as mj
from mixgrpo_jax import config as configs
from mixgrpo_jax.flow.sampler import Sampler
from mixgrpo_jax.rl.samples import Tools
from mixgrpo_jax.rl.terms import make_terms
from mixgrpo_jax.rl.update import count_evaluations

ROOT = pathlib.Path(__file__).parents[1]
TREE = ast.parse((ROOT / "mixgrpo_jax" / "__init__.py").read_text())
DOC = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("add_a_*.md")))
BLOCKS = re.findall(r"^```python (\S+)\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)


def test_what_a_type_checker_sees_is_what_is_there():
    imported = {node.module: node for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom) and node.module}
    seen = {alias.name: module for module, node in imported.items() for alias in node.names if "mixgrpo" in module}
    assert {*seen, "__version__"} == set(mj.__all__)
    assert set(mj.__all__) <= set(dir(mj))
    for name, module in seen.items():
        assert getattr(mj, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mj.nonsense


def test_the_version_has_one_source():
    printed = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert printed.stdout.split()[-1] == mj.__version__


def test_two_moons(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples")
    two_moons = importlib.import_module("two_moons")
    before, after = two_moons.main(tmp_path / "moons.png", pretraining=800, iterations=30)
    assert before < 0.5
    assert after > before + 0.3
    assert (tmp_path / "moons.png").stat().st_size > 10_000


def test_documents_quote_files_as_they_are():
    quoted = [(path, text) for path, text in BLOCKS if not path.startswith("my_")]
    nft = {"mixgrpo_jax/rl/objectives/nft.py", "configs/nft.py", "tests/rl/test_nft.py"}
    assert nft | {"mixgrpo_jax/models/sd3/policy.py"} <= {path for path, _ in quoted}
    for path, text in quoted:
        assert text in (ROOT / path).read_text(), f"docs/ quotes {path} otherwise than it is:\n{text}"
    for whole in ("mixgrpo_jax/rl/objectives/nft.py", "configs/nft.py"):
        lines = [line for path, text in quoted if path == whole for line in text.splitlines() if line]
        assert lines == [line for line in (ROOT / whole).read_text().splitlines() if line], f"{whole} is shown in full"


def test_documents_name_what_exists():
    tables = re.findall(r"`([A-Z]{4,})` in\s`([\w/]+\.py)`", DOC)
    assert len(tables) > 8
    for name, path in tables:
        assert re.search(rf"^{name}\b", (ROOT / "mixgrpo_jax" / path).read_text(), re.MULTILINE), (name, path)
    files = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
    for path in files:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (path.parent / link).exists(), f"{path} links to {link}"
        for name in re.findall(r"`mj\.(\w+)", text):
            assert name in mj.__all__, f"{path} names mj.{name}"


def test_the_map_is_of_this_tree():
    tree = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
    there = {path.name for path in (ROOT / "mixgrpo_jax").rglob("*.py")}
    named = re.findall(r"(\w+\.py)", tree)
    assert len(named) > 40
    assert set(named) <= there
    folders = {path.name for path in (ROOT / "mixgrpo_jax").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))


def test_the_documents_own_objective_is_taken_from_its_module(monkeypatch, tmp_path):
    for path, text in BLOCKS:
        if path.startswith("my_"):
            (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    settings = configs.resolve(importlib.import_module("my_config").get_config())
    assert settings.objective.temperature == 0.5
    tools = Tools(Sampler(), make_terms({"mse_base": 1.0}, Sampler()), {})
    assert count_evaluations(settings.objective, ["base"], tools, (4, 3), places=5) == (10, 5)
    with pytest.raises(
        configs.ConfigError, match=r"temprature is no field of RewardWeighted, did you mean temperature\?"
    ):
        configs.choose("objective", "my_module:RewardWeighted", temprature=1.0)
