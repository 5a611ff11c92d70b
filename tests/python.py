"""Programs in a Python of their own, for what must be settled before JAX starts: how many devices there are."""

import os
import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parents[1]


def run_program(program, *arguments, cwd=None, **environment):
    """What a program prints; it must not fail."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
