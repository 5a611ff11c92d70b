"""A world without clouds: stand-ins on PATH that record their calls and answer as they are told."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STAND_IN = r"""#!/usr/bin/env bash
printf -v call '%q ' "${0##*/}" "$@"
echo "${call% }" >> "$WORLD/calls"
[[ "$*" != *--filename=-* ]] || cat > "$WORLD/stdin"
number=0
while IFS='|' read -r pattern status output; do # each answer is given once
  number=$((number + 1))
  if [[ $call == *"$pattern"* && ! -e $WORLD/given.$number ]]; then
    touch "$WORLD/given.$number"
    [[ -z $output ]] || echo "$output"
    exit "$status"
  fi
done < "$WORLD/answers"
"""
REMOTE = r"""#!/usr/bin/env bash
command=${*: -1}
cd "$HOME" && exec bash -c "${command#--command=}"
"""


class World:
    """Runs scripts among stand-ins for the commands that reach beyond this machine."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "kubectl", "ssh", "srun", "scontrol", "sleep", "git"):
            self.stand_in(name, STAND_IN)
        self.answers()

    def stand_in(self, name, text):
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def remote(self, name):
        """Let `name` run the command that it is given, in a home of its own."""
        home = self.folder / "home"
        (home / "mixgrpo_jax").mkdir(parents=True, exist_ok=True)
        self.stand_in(name, REMOTE)
        return home

    def answers(self, *answers):
        """(part of a call, exit status, output) each; a call that none is for succeeds and says nothing."""
        for used in self.folder.glob("given.*"):
            used.unlink()
        (self.folder / "calls").write_text("")
        (self.folder / "answers").write_text("".join(f"{part}|{status}|{out}\n" for part, status, out in answers))

    def environment(self, **more):
        path = f"{self.bin}:{os.environ['PATH']}"
        return os.environ | {"PATH": path, "WORLD": str(self.folder), "HOME": str(self.folder / "home")} | more

    def run(self, script, *arguments, **environment):
        command = ["bash", f"launch/{script}", *arguments]
        return self._run(command, environment)

    def shell(self, text):
        return self._run(["bash", "-c", text], {})

    def _run(self, command, environment):
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(**environment), capture_output=True, text=True, timeout=120
        )

    def calls(self, part=""):
        """What was called, as the shell would take it."""
        return [call for call in (self.folder / "calls").read_text().splitlines() if part in call]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)
