"""Which prompts of a source are kept: by their length, their characters, and lists of words."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixgrpo_jax.data.prompts import Prompt, lines


@dataclass(frozen=True)
class Filters:
    r"""What a prompt must be like; the defaults keep every prompt.

    A word is a run of letters, digits and underscores, whatever their case; "a red-haired fox" has four. Prompts in
    writing without spaces are therefore hardly filtered by words.

    Attributes:
        min_characters, max_characters: limits of the prompt's length; 0 is no limit.
        min_words, max_words: likewise in words.
        characters: those that a prompt may have, as in the brackets of a regular expression: " -~" is ASCII, and
            r"^\u4e00-\u9fff" all but Chinese. "" allows any.
        drop_words: a file with a word or phrase a line; prompts that have one of them are dropped.
        keep_words: such a file; prompts that have none of them are dropped.

    Raises:
        ValueError: a limit that is negative or crosses the other one, characters that cannot be read, or a list of
            words that is not there, is empty, or has a line without a word.
    """

    min_characters: int = 0
    max_characters: int = 0
    min_words: int = 0
    max_words: int = 0
    characters: str = ""
    drop_words: str = ""
    keep_words: str = ""

    def __post_init__(self):
        for unit in ("characters", "words"):
            low, high = (getattr(self, f"{end}_{unit}") for end in ("min", "max"))
            for end, limit in (("min", low), ("max", high)):
                if limit < 0:
                    raise ValueError(f"{end}_{unit}={limit} is negative; 0 is no limit")
            if high and low > high:
                raise ValueError(f"min_{unit}={low} is above max_{unit}={high}: no prompt is both; lower one")
        self._tests()

    def _tests(self) -> dict[str, Callable[[str], bool]]:
        """By setting, whether a prompt passes; of the settings that are not at their default."""
        tests: dict[str, Callable[[str], bool]] = {
            "min_characters": lambda text: len(text) >= self.min_characters,
            "max_characters": lambda text: len(text) <= self.max_characters,
            "min_words": lambda text: len(_words(text)) >= self.min_words,
            "max_words": lambda text: len(_words(text)) <= self.max_words,
        }
        if self.characters:
            allowed = _character_class(self.characters)
            tests["characters"] = lambda text: allowed.fullmatch(text) is not None
        if self.drop_words:
            dropped = _read_list("drop_words", self.drop_words)
            tests["drop_words"] = lambda text: not _has_any(text, dropped)
        if self.keep_words:
            kept = _read_list("keep_words", self.keep_words)
            tests["keep_words"] = lambda text: _has_any(text, kept)
        return {name: test for name, test in tests.items() if getattr(self, name)}

    def apply(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that pass, in their order; prints how many do, and which setting dropped the others first.

        Raises ValueError if none passes.
        """
        tests = self._tests()
        if not tests:
            return list(prompts)
        failed = [next((name for name, test in tests.items() if not test(prompt.text)), None) for prompt in prompts]
        kept = [prompt for prompt, name in zip(prompts, failed) if name is None]
        by_setting = ", ".join(f"{failed.count(name):,} by {name}={getattr(self, name)!r}" for name in tests)
        print(f"{len(kept):,} of {len(prompts):,} prompts are kept; dropped: {by_setting}")
        if not kept:
            raise ValueError(f"no prompt is left of {len(prompts):,}; dropped: {by_setting}: loosen one of these")
        return kept


NAMES = tuple(field.name for field in dataclasses.fields(Filters))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _character_class(characters: str) -> re.Pattern:
    example = "write what stands in the brackets of a regular expression, as ' -~' for ASCII"
    if re.search(r"(?<!\\)(?:\\\\)*\]", characters):
        raise ValueError(f"characters={characters!r} closes its brackets: write a bracket as \\]; {example}")
    try:
        return re.compile(f"[{characters}]*")
    except re.error as error:
        raise ValueError(f"characters={characters!r} cannot be read ({error}): {example}") from None


def _read_list(name: str, source: str) -> frozenset[tuple[str, ...]]:
    """The phrases of a file, each as its words."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"{name}={source!r} is no file; give one with a word or phrase a line")
    phrases = set()
    for where, line in lines(path):
        if not _words(line):
            raise ValueError(f"{name}: {where}: {line.strip()!r} has no word; take the line out")
        phrases.add(tuple(_words(line)))
    if not phrases:
        raise ValueError(f"{name}={source!r} is empty; give a file with a word or phrase a line, or leave {name} out")
    return frozenset(phrases)


def _has_any(text: str, phrases: frozenset[tuple[str, ...]]) -> bool:
    # Runs of words are looked up, so that a long list costs no more than a short one.
    words = _words(text)
    return any(
        tuple(words[i : i + length]) in phrases for length in {len(p) for p in phrases} for i in range(len(words))
    )
