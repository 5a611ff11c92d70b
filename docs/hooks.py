"""What `mkdocs build` makes of the pages: references from the code, equations as MathML, links that hold on the site.

Pages are written as GitHub shows them. A line `<!-- NAME -->` of theirs is where the reference of that name goes.
"""

import ast
import dataclasses
import html
import importlib
import inspect
import os
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags

from mixgrpo_jax import config as configs
from mixgrpo_jax.__main__ import commands
from mixgrpo_jax.engine import fields
from mixgrpo_jax.rewards import REWARDS
from mixgrpo_jax.runtime import app

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What the site has beside docs/, and where.
BESIDE = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "launch/README.md": "launch.md",
    "benchmarks/RESULTS.md": "results.md",
    "examples/two_moons.png": "two_moons.png",
}
ELSEWHERE = {"README.md": "index.md"} | BESIDE


def on_files(files, config):
    """Add what lies beside docs/."""
    from mkdocs.structure.files import File  # not there where tests read this file

    for path, name in BESIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The page as Python-Markdown reads it, with its references."""
    here = {name: path for path, name in BESIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    for name, make in REFERENCES.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", make())
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    text = [_fence(part) if part.startswith("```") else _text(part, here, page.file.src_uri) for part in parts]
    return "".join(text)


def _fence(block: str) -> str:
    """A block of code; what it quotes is its title."""
    return re.sub(r"\A```(\w+) (\S+)$", r'```\1 title="\2"', block, flags=re.MULTILINE)


def _text(text: str, here: str, page: str) -> str:
    def linked(found: re.Match) -> str:
        label, target, anchor = found.groups()
        path = os.path.normpath(os.path.join(os.path.dirname(here), target))
        name = ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        relative = os.path.relpath(name, os.path.dirname(page) or ".") if name else ""
        return f"[{label}]({relative}{anchor or ''})" if name else label  # of a file that the site has not

    text = re.sub(r"\[((?:[^][]|\[[^]]*\])*)\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)", linked, text)
    return re.sub(r"^\$\$(.+?)\$\$$", lambda found: _equation(found[1]), text, flags=re.MULTILINE | re.DOTALL)


def _equation(latex: str) -> str:
    from latex2mathml.converter import convert  # likewise

    return f'<div class="equation">{convert(latex, display="block")}</div>'


def defined(command: str, use: Callable[[list[flags.Flag]], Any]) -> Any:
    """What `use` makes of a command's own flags, while they are defined."""
    module = importlib.import_module(f"mixgrpo_jax.{command}")
    block = ast.parse(inspect.getsource(module)).body[-1]  # if __name__ == "__main__"
    before, run = set(flags.FLAGS), app.run
    app.run = lambda *_, **__: None
    try:
        exec(compile(ast.Module(block.body, []), module.__name__, "exec"), dict(vars(module)))
        return use([flags.FLAGS[name] for name in flags.FLAGS if name not in before])
    finally:
        app.run = run
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def command_reference() -> str:
    """Every command: what its docstring says, and its flags."""
    parts = []
    for name in commands():
        rows = [[code(f"--{flag}"), default, words(meaning)] for flag, default, meaning in defined(name, _flags)]
        module = importlib.import_module(f"mixgrpo_jax.{name}")
        if "with_own_config" in vars(module):
            rows[0][1] = "the run's"
        parts += [f"## {name}", prose(module.__doc__), table(["flag", "default", "meaning"], rows)]
    return "\n\n".join(parts)


def _flags(found: list[flags.Flag]) -> list[tuple[str, str, str]]:
    def default(flag: flags.Flag) -> str:
        return code(flag.default) if flag.default not in (None, "") else "required" if flag.validators else ""

    def meaning(flag: flags.Flag) -> str:
        text = re.sub("^<(.*)>: ", lambda choices: f"{choices[1].strip('|').replace('|', ', ')}: ", flag.help)
        return text.removesuffix("; repeat this option to specify a list of values")

    return [(each.name, default(each), meaning(each)) for each in found]


def config_reference() -> str:
    """Every field of the default config, by section; then the fields of each method that a recipe may choose."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for path, value, meaning in fields.fields(configs.base()):
        section = path.partition(".")[0] if "." in path else "the run"
        groups.setdefault(section, []).append((code(path), code(repr(value)), words(meaning)))
    head = ["field", "default", "meaning"]
    parts = []
    for section in ["the run", *sorted(set(groups) - {"the run"})]:
        parts += [f"## {section}", table(head, groups[section])]
    for section, names in configs.TABLES.items():
        parts.append(
            f'## {section}: methods\n\nA recipe chooses one, as `config.{section} = choose("{section}", NAME)`.'
        )
        for name in sorted(names):
            kind = configs.find(section, name)
            means, own = fields.meanings_of(kind), [each for each in dataclasses.fields(kind) if not each.kw_only]
            rows = [(code(each.name), code(repr(each.default)), words(means.get(each.name, ""))) for each in own]
            parts += [f"### {section} {name}", words(kind.__doc__.partition("\n\n")[0])]
            parts += [table(head, rows)] if rows else []
    return "\n\n".join(parts)


def recipe_reference() -> str:
    """Every recipe: its docstring, with the command, the hardware and the result to expect."""
    texts = {
        path.stem: ast.get_docstring(ast.parse(path.read_text())) for path in sorted((ROOT / "configs").glob("*.py"))
    }
    return "\n\n".join(f"## {name}\n\n{prose(text)}" for name, text in texts.items())


def reward_reference() -> str:
    """Every reward that a config may name: the options of its builder, and what it is."""
    rows = []
    for name, where in REWARDS.items():
        module, function = where.split(":")
        path = ROOT / f"{module.replace('.', '/')}.py"
        [found] = [each for each in ast.parse(path.read_text()).body if getattr(each, "name", "") == function]
        options = [each.arg for each in [*found.args.args, *found.args.kwonlyargs]]
        options = ", ".join(code(each) for each in options if each not in ("config", "name"))
        rows.append((code(name), options, words(ast.get_docstring(found).partition("\n\n")[0])))
    return table(["reward", "options", "what it is"], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(each.replace("|", "\\|") for each in line) + " |" for line in lines)


def code(text: Any) -> str:
    """As code."""
    return f"`{text}`"


def words(text: str) -> str:
    """A docstring's words in one line, in which nothing but code is Markdown."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", html.escape(part)) for part in parts
    )


def prose(docstring: str) -> str:
    """A docstring as Markdown: what is indented is code."""

    def block(found: re.Match) -> str:
        return f"```text\n{textwrap.dedent(found[0]).rstrip()}\n```\n"

    return re.sub(r"(?:^    .*\n?)+", block, docstring.strip() + "\n", flags=re.MULTILINE)


REFERENCES = {
    "commands": command_reference,
    "config": config_reference,
    "recipes": recipe_reference,
    "rewards": reward_reference,
}
