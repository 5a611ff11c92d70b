"""Every field of a config, with its value and its meaning, which is what the docstrings of the dataclasses say."""

import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mixgrpo_jax import config as configs
from mixgrpo_jax.models.lora_config import LoraConfig

COLUMNS, LEFT = 120, 46


def listed(config: Any = None) -> str:
    """A line a field: the flag with its value in the config, by default `base()`, and its meaning."""
    lines = []
    for path, value, meaning in fields(config or configs.base()):
        flag = f"  --config.{path}={value!r}"
        flag += " " * (LEFT - len(flag))
        lines.append(f"{flag}  {textwrap.shorten(meaning, max(COLUMNS - len(flag) - 2, 40), placeholder=' ...')}")
    choices = [f"  {section}: {', '.join(sorted(table))}" for section, table in configs.TABLES.items()]
    return "\n".join(["fields of the config:", "", *lines, "", "methods, which a recipe chooses:", "", *choices])


def fields(config: Any) -> Iterator[tuple[str, Any, str]]:
    """(path, value, meaning) of each field, in the config's order."""
    yield from _fields(config, "", meanings(configs.base.__doc__ or "", list(config)))


def _fields(section: Mapping[str, Any], path: str, means: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for name, value in section.items():
        if not isinstance(value, configs.SECTION) or not len(value):
            yield f"{path}{name}", {} if isinstance(value, configs.SECTION) else value, means.get(name, "")
        elif kind := _kind(f"{path}{name}", value):
            own = {"name": f"the method, see below: {kind.__name__}."} | meanings_of(kind)
            yield from _fields(value, f"{path}{name}.", own)
        else:  # of one's own names, all of which mean the same
            yield from _fields(value, f"{path}{name}.", dict.fromkeys(value, means.get(name, "")))


def _kind(path: str, section: Any) -> type | None:
    """The dataclass of a section; None where its names are one's own."""
    if path in configs.TABLES:
        return configs.find(path, section["name"])
    if path.startswith("averages."):
        return configs.Average
    if path.endswith(".lora"):
        return LoraConfig
    kind = typing.get_type_hints(configs.Settings).get(path)
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def meanings_of(kind: type) -> dict[str, str]:
    """The meaning of each of a dataclass's fields, where its docstring or that of a class above it tells."""
    names = [field.name for field in dataclasses.fields(kind)]
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        found |= meanings(each.__doc__ or "", names)
    return found


def meanings(text: str, names: list[str]) -> dict[str, str]:
    """What a docstring says of each of the names: `name: text`, or `name, name: text`, at the start of a sentence.

    >>> meanings("Sizes. rows, columns: of the page. gap:\\n  between them.", ["rows", "columns", "gap"])
    {'rows': 'of the page.', 'columns': 'of the page.', 'gap': 'between them.'}
    """
    name = "|".join(names)
    begins = list(re.finditer(rf"(?:^|[.\n])\s*((?:{name})(?:, (?:{name}))*):\s", text)) if names else []
    found: dict[str, str] = {}
    for begin, end in zip(begins, [*(each.start() + 1 for each in begins[1:]), len(text)]):
        meaning = " ".join(text[begin.end() : end].split("\n\n")[0].split())
        found |= dict.fromkeys(begin[1].split(", "), meaning)
    return found
