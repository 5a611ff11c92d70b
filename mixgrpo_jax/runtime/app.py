"""How a command begins and ends: what is wrong with its flags, its config or its files is one line, and no traceback.

if __name__ == "__main__":
    _CONFIG = config_flag(listed)
    app.run(main)
"""

import contextlib
import difflib
import logging
import opcode
import os
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_dict, config_flags

from mixgrpo_jax.runtime import progress

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there means nothing here,
logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # nor which back ends there are not
flags.disclaim_key_flags()  # those that are defined here are the command's

PACKAGE = pathlib.Path(__file__).parents[1]
NUMBERS = {r"invalid literal for int\(\) with base 10:": "it must be a whole number"}
NUMBERS |= {"could not convert string to float:": "it must be a number"}
RAISE = opcode.opmap["RAISE_VARARGS"]
_listed: list[Callable[[Any], str]] = []  # what says a config's fields


def run(main: Callable[[Any], Any], arguments: list[str] | None = None) -> None:
    """Run a command as absl does, with sys.argv or other arguments.

    Bad input ends as one line on stderr, with status 1; `--debug` shows a traceback.
    """
    if "debug" not in flags.FLAGS:
        flags.DEFINE_bool("debug", False, "Show the traceback of an error that has a message of its own.")

    def quietly(arguments: Any) -> Any:
        try:
            return main(arguments)
        except Exception as error:
            _end(error)

    progress.ready()
    app.run(quietly, argv=arguments, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    try:
        if progress.HELP & set(arguments):
            _help(arguments)
        return flags.FLAGS(arguments)
    except Exception as error:
        _end(error, debug=any(argument.lstrip("-") == "debug" for argument in arguments))


def _end(error: Exception, debug: bool = False) -> NoReturn:
    """Exit with the error's one line where it is bad input; otherwise raise it."""
    line = describe(error)
    if line is None or debug or debugs():
        raise error
    print(f"ERROR: {line}", file=sys.stderr)
    sys.exit(1)


def _help(arguments: list[str]) -> NoReturn:
    """Print what the command does, its flags, and the fields of its config or of the one in --config; exit with 0."""
    app.usage(shorthelp=True, writeto_stdout=True)
    if "config" in flags.FLAGS and _listed:
        given = [re.sub("^--?config=", "", each) for each in arguments if re.match("--?config=", each)]
        print("\n" + _listed[0](flags.FLAGS["config"].parser.parse(given[-1]) if given else None))
    sys.exit(0)


@contextlib.contextmanager
def without(pattern: str) -> Iterator[None]:
    """Leave out what is written to standard error, by C++ too, in lines that a regex is found in; the others follow."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        own = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(line for line in lines if not re.search(pattern, line)))


def debugs() -> bool:
    """Whether the command was told to show tracebacks."""
    return flags.FLAGS.is_parsed() and "debug" in flags.FLAGS and flags.FLAGS.debug


def describe(error: BaseException) -> str | None:
    """One line of what is wrong with the input; None of a fault of the program, which has a traceback to show.

    What the operating system refuses is the input's fault, and so is what this package raises itself: those errors name
    the field, its value and the remedy. An error that Python or a library raises is the program's.
    """
    said = isinstance(error, ValueError | RuntimeError | ImportError) and not isinstance(error, NotImplementedError)
    if isinstance(error, flags.Error | OSError) or (said and _is_raised_here(error)):
        lines = [*_told(error).split("\n"), *getattr(error, "__notes__", ())]
        text = " ".join(line.strip() for line in lines if line.strip())
        return text or type(error).__name__
    return None


def _told(error: BaseException) -> str:
    """The error's message; of a flag's value, what it should be."""
    text = re.sub(r"flag --(\w+)=None: Flag --\1 must have a value other than None\.", _missing, str(error))
    for raised, remedy in NUMBERS.items():
        text = re.sub(rf"{raised} '.*'$", remedy, text)
    return text


def _missing(found: re.Match) -> str:
    meaning = flags.FLAGS[found[1]].help.strip()
    return f"--{found[1]} is missing: {meaning[:1].lower()}{meaning[1:]}"


def _is_raised_here(error: BaseException) -> bool:
    """Whether the error comes from a `raise` of this package."""
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    return pathlib.Path(code.co_filename).is_relative_to(PACKAGE) and code.co_code[last.tb_lasti] == RAISE


def config_flag(listed: Callable[[Any], str] | None = None) -> Any:
    """Define `--config=FILE`, a recipe with a flag for each of its fields.

    `--help` shows what `listed` says of a config, or of None, which is the default one.
    """
    _listed[:] = [listed] if listed else []
    holder = config_flags.DEFINE_config_file(
        "config", None, "A recipe, as configs/quickstart.py; its fields are flags.", lock_config=True
    )
    flag = flags.FLAGS["config"]
    flag.parser = _RecipeParser(flag.parser)
    flags.mark_flag_as_required("config")
    return holder


class _RecipeParser(flags.ArgumentParser):
    """Names what is wrong with a recipe, or with the flags of its fields. ValueErrors are absl's way to hear of it."""

    def __init__(self, inner: flags.ArgumentParser):
        """What runs the recipe is `inner`."""
        self.inner = inner

    def parse(self, path: str) -> Any:
        """The config of `FILE` or `FILE:ARGUMENT`."""
        file = pathlib.Path(path.partition(":")[0])
        if not file.is_file():
            found = sorted(str(each) for each in file.parent.glob("*.py"))
            near = difflib.get_close_matches(str(file), found, 1)
            remedy = (
                f"did you mean {near[0]}?" if near else "give a file that has get_config(), as configs/quickstart.py"
            )
            raise ValueError(f"there is no such file; {remedy}")
        try:
            config = self.inner.parse(path)
        except Exception as error:
            raise ValueError(_of_recipe(file, error)) from error
        if not isinstance(config, config_dict.ConfigDict):
            raise ValueError(f"get_config() returns {type(config).__name__}: return a config, as configs.base() is one")
        for argument in flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False):
            if argument.startswith(("-config.", "--config.")):
                _check_field(config, argument)
        return config


def _of_recipe(file: pathlib.Path, error: Exception) -> str:
    """What went wrong as a recipe was run, and where in it."""
    while isinstance(error.__context__, Exception) and str(error).startswith("Error whilst parsing config file"):
        error = error.__context__  # which the parser has replaced by its traceback
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f"line {lines[-1]}: " if lines else ""
    kind = "" if _is_raised_here(error) else f"{type(error).__name__}: "
    return f"{where}{kind}{error}"


def _check_field(config: config_dict.ConfigDict, flag: str) -> None:
    """Refuse the flag of a field that the recipe does not have."""
    section, names = config, flag.partition("=")[0].split(".")[1:]
    for depth, name in enumerate(names):
        path = ".".join(names[: depth + 1])
        if not isinstance(section, config_dict.ConfigDict):
            raise ValueError(f"{flag}: {'.'.join(names[:depth])} is a value, and has no fields")
        try:
            section = section[name.partition("[")[0]]
        except KeyError as error:
            if " is now " in str(error):  # a field that has moved
                raise ValueError(f"{flag}: {error.args[0]}") from None
            near = difflib.get_close_matches(path, _paths(config), 1)
            remedy = f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(section)}"
            if depth and not getattr(section, "path", ""):  # of one's own names, as rewards and averages are
                remedy += f" Flags change what is there: a recipe adds it, config.{path} = ..."
            raise ValueError(f"{flag}: there is no field {path}{remedy}") from None


def _paths(config: config_dict.ConfigDict, prefix: str = "") -> list[str]:
    """All its fields, sections too."""
    found = []
    for name, value in config.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, config_dict.ConfigDict):
            found += _paths(value, f"{prefix}{name}.")
    return found
