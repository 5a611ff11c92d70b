"""That the documents are true: their commands parse, their code runs, and they miss no recipe, command or metric."""

import ast
import importlib.util
import itertools
import json
import pathlib
import re
import shlex
import string
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.data import prompts
from mixgrpo_jax.encode import encode
from mixgrpo_jax.engine import fields
from mixgrpo_jax.engine.loading import load_rewards
from mixgrpo_jax.rewards import REWARDS, score_all
from mixgrpo_jax.tasks.signs.rendering import Sign, render

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
FENCE = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = sorted((ROOT / "configs").glob("*.py"))
LITERAL = r'"((?:ratio|loss|velocity|gradient|reward|preference|replay|advantage|window|nfe|time|optimizer)/\w+)"'

_spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


def blocks(language):
    """(document, title, text) of each block of code in the documents."""
    for path in DOCUMENTS:
        for kind, title, text in FENCE.findall(path.read_text()):
            if kind == language:
                yield path.relative_to(ROOT), title, text


def undocumented(names):
    """Those metrics that docs/metrics.md has no row for."""
    rows = re.findall(r"^\| (.+?) \| ", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    forms = [re.sub("[A-Z]+", "[^/]+", form) for row in rows for form in re.findall("`([^`]+)`", row)]
    return [name for name in names if name != "iteration" and not any(re.fullmatch(form, name) for form in forms)]


@pytest.fixture
def newcomer(monkeypatch, tmp_path):
    """A folder in which the documents' commands run: with a checkout's folders, and the documents' own files."""
    for folder in ("configs", "launch", "examples", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for language in ("python", "text"):
        for _, title, text in blocks(language):
            if title and "/" not in title:
                (tmp_path / title).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def commands():
    """(document, words) of each command in blocks of shell, and of those that the text gives whole."""
    for path, _, text in blocks("sh"):
        values = dict(re.findall(r"^(\w+)=(\S+)$", text, re.MULTILINE))
        for line in re.split(r"\n|&&", string.Template(text.replace("\\\n", " ")).safe_substitute(values)):
            words = list(itertools.dropwhile(re.compile(r"\w+=").match, shlex.split(line)))
            if words:
                yield path, words
    for path in DOCUMENTS:
        for text in re.findall(r"`((?:python -m|python launch/|launch/|sbatch)[^`]+)`", path.read_text()):
            if not re.search(r"\.\.\.|RECIPE|COMMAND|=[A-Z],", text) and " " in text:
                yield path.relative_to(ROOT), shlex.split(text)


def check(words, monkeypatch):
    """Raise for a command that is not there, or that does not take what it is given."""
    match words:
        case ["python", "-m", module, *given] if module.startswith("mixgrpo_jax."):
            if not {"--help"} & {*given}:
                check_flags(module.removeprefix("mixgrpo_jax."), given, monkeypatch)
        case ["python", "-m", module, *_] if module.startswith("benchmarks."):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        case ["python", "-m", "mixgrpo_jax" | "pytest", *_] | ["mkdocs" | "mypy" | "ruff" | "pre-commit", *_]:
            pass
        case ["pip", "install", *given]:
            extras = (ROOT / "setup.py").read_text()
            assert all(
                f'"{extra}": [' in extras for each in given for extra in re.findall(r"\w+", each.partition("[")[2])
            )
        case ["python", file, *_]:
            assert (ROOT / file).is_file()
        case ["sbatch", *given]:
            assert all((ROOT / each).is_file() for each in given if each.startswith("launch/"))
        case [script, *given] if script.startswith("launch/"):
            subprocess.run(["bash", ROOT / script, *given, "--dry-run"], check=True, capture_output=True, cwd=ROOT)
        case _:
            raise AssertionError("a command that this test does not know")


def check_flags(command, given, monkeypatch):
    """Parse a command's flags and its config's fields; the quickstart's, where the config is that of the workdir."""

    def parse(defined):
        own = [] if any("--config=" in each for each in given) else ["--config=configs/quickstart.py"]
        monkeypatch.setattr(sys, "argv", [command, *(own if "config" in flags.FLAGS else []), *given])
        assert flags.FLAGS(sys.argv) == [command], "words that are no flags"
        if "config" in flags.FLAGS:
            configs.resolve(flags.FLAGS["config"].value)

    try:
        hooks.defined(command, parse)
    finally:
        flags.FLAGS.unparse_flags()


def test_every_command_in_the_documents_parses(newcomer, monkeypatch):
    found = list(commands())
    assert len(found) > 60
    for path, words in found:
        try:
            check(words, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{path}: {shlex.join(words)}: {error}") from error
    for wrong in (["--workdir=a", "--no_such_flag=1"], ["--workdir=a", "--config.batch.gruop=3"], []):
        with pytest.raises((flags.Error, ValueError)):
            check_flags("train", wrong, monkeypatch)


def test_python_in_the_documents_runs(newcomer):
    found = [(path, text) for path, title, text in blocks("python") if not title]
    assert len(found) >= 2
    for path, text in found:
        config = configs.base()
        config.watched = ()
        exec(compile(text, str(path), "exec"), {"config": config})
        configs.resolve(config)


def test_a_newcomers_own_reward_scores_pictures(newcomer):
    assert len((newcomer / "my_reward.py").read_text().splitlines()) < 20
    settings = configs.resolve(configs.load("my_recipe", str(newcomer / "any.py")))
    found = [prompt.text for prompt in prompts.read("mine.txt")]
    images = np.stack([render(sign) for sign in (Sign("4270", "blue", "white"), Sign("31", "red", "yellow"))])
    scores = score_all(load_rewards(settings), images, found[:2], [{}, {}])
    assert set(scores) == {"redness", "jpeg_compressibility"}
    blue, red = scores["redness"].value
    assert blue < 0.01 and red > 0.3
    assert settings.evaluation.prompts <= len(found)


@pytest.mark.slow
def test_a_newcomers_own_reward_and_prompts(newcomer, small_policy):
    """The documents' reward, prompts and recipe, as they are, on a small policy."""
    from tests.test_train import fast  # which imports this module

    for split in ("train", "test"):
        encode(str(small_policy), "mine.txt", "data/mine", split=split)
    own, config = configs.load("my_recipe", str(newcomer / "any.py")), fast(small_policy)
    for section in ("data", "rewards", "reward_options", "watched"):
        config[section] = own[section]
    train.train(config, "runs/mine")
    before, after = [json.loads(line) for line in pathlib.Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert {"held_out/redness/mean", "held_out/jpeg_compressibility/mean"} <= before.keys() & after.keys()
    assert 0 <= after["reward/redness/mean"] <= 1 and after["grad_norm"] > 0
    assert not undocumented({*before, *after})


def test_every_recipe_says_its_command_its_hardware_and_its_result():
    for path in RECIPES:
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert re.search(r"^    python (-m mixgrpo_jax\.\w+|launch/sweep\.py) --", text, re.MULTILINE), (
            f"{path}: command"
        )
        assert f"configs/{path.name}" in text or "encode" in text, f"{path}: a command of another recipe"
        for said in ("Hardware: ", "Expected result: "):
            assert said in text, f"{path}: its docstring has no '{said}'; 'Expected result: not measured yet' is one"


def test_every_recipe_is_in_a_document_and_every_one_there_exists():
    documents = "".join(path.read_text() for path in DOCUMENTS)
    known = {path.stem for path in RECIPES}
    assert not [name for name in known if not re.search(rf"`{name}`|configs/{name}\.py", documents)]
    named = re.findall(r"configs/(\w+)\.py", documents)
    assert not {*named} - known - {"any", "RECIPE"}
    rows = re.findall(r"^\| (\d+) \| .*$", (ROOT / "docs" / "systems.md").read_text(), re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 45))


def test_every_metric_is_documented():
    paths = [
        *ROOT.glob("mixgrpo_jax/rl/**/*.py"),
        *ROOT.glob("mixgrpo_jax/engine/collect.py"),
        ROOT / "mixgrpo_jax/train.py",
    ]
    paths += [ROOT / "mixgrpo_jax/runtime/metrics.py"]
    found = {name for path in paths for name in re.findall(LITERAL, path.read_text())}
    assert {"ratio/drift", "loss/reflow", "velocity/moved", "time/left"} <= found
    assert not undocumented(found | {"kl/base", "mse/old", "share/0", "grad_norm", "compilations"})
    assert undocumented({"ratio/nonsense", "reward/ocr/media"})  # the table is no pattern for everything


def test_references_are_whole():
    made = {name: make() for name, make in hooks.REFERENCES.items()}
    for name in hooks.commands():
        assert f"\n## {name}\n" in f"\n{made['commands']}"
    assert "`--against`" in made["commands"] and "`--no_such_flag`" not in made["commands"]
    for path, _, meaning in fields.fields(configs.base()):
        assert f"| `{path}` |" in made["config"] and hooks.words(meaning) in made["config"].replace("\\|", "|")
    assert all(
        f"\n### {section} {name}\n" in made["config"] for section in configs.TABLES for name in configs.TABLES[section]
    )
    assert all(f"| `{name}` |" in made["rewards"] for name in REWARDS)
    assert all(f"## {path.stem}\n" in made["recipes"] for path in RECIPES)
