"""The commands by name: `python -m mixgrpo_jax train --config=...`, or `mixgrpo train --config=...`."""

import ast
import difflib
import pathlib
import re
import runpy
import sys

from mixgrpo_jax import __version__

HERE = pathlib.Path(__file__).parent


def commands() -> dict[str, str]:
    """What each command does, in a line: the files that end in a run of their main, by their docstrings."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        text = path.read_text()
        if re.search(r"^    app\.run\(main\b.*\)$", text, re.MULTILINE):
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def recipes() -> pathlib.Path:
    """The folder of the recipes: a checkout's, or what was installed with the package."""
    checkout = HERE.with_name("configs")
    return checkout if checkout.is_dir() else pathlib.Path(sys.prefix, "share", "mixgrpo_jax", "configs")


def main() -> None:
    """Run a command, or list them."""
    known, name = commands(), sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--version", "version"):
        print(f"mixgrpo_jax {__version__}")
    elif name in ("-h", "--help", "help"):
        print("python -m mixgrpo_jax COMMAND [--help | --config=RECIPE ...]\n")
        for command, line in known.items():
            print(f"  {command:<15}{line}")
        print(f"\nRecipes are in {recipes()}")
    elif name not in known:
        near = difflib.get_close_matches(name, known, 1)
        remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
        sys.exit(f"ERROR: there is no command {name!r}; {remedy}")
    else:
        del sys.argv[1]
        runpy.run_module(f"mixgrpo_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
