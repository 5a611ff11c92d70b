"""How long a person waits for a sign of life: the quickstart's output, by the second.

    python -m benchmarks.silence --iterations=3 --prompts=64

Runs it with nothing compiled and no data prepared before, as a log and on a terminal; prints every line with the second
it came in, the second of the first, and the longest silence.
"""

import itertools
import os
import pty
import re
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_ITERATIONS = flags.DEFINE_integer("iterations", 3, "Of the run.")
_PROMPTS = flags.DEFINE_integer("prompts", 64, "Held-out prompts.")


def record(command: list[str], terminal: bool) -> list[tuple[float, str]]:
    """(second, text) of each piece of a command's output, the last of them its end."""
    begun, found = time.monotonic(), []
    ours, its = pty.openpty() if terminal else os.pipe()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=its, stderr=its) as process:
        os.close(its)
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # a terminal that nobody writes to any more
                piece = b""
            found.append((time.monotonic() - begun, piece.decode(errors="replace")))
            if not piece:
                break
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return found


def main(_) -> None:
    """Record both, and print what was said when."""
    for terminal in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "mixgrpo_jax.train", "--config=configs/quickstart.py"]
            command += [f"--workdir={folder}/run", f"--config.iterations={_ITERATIONS.value}"]
            command += [f"--config.evaluation.prompts={_PROMPTS.value}", f"--config.data.folder={folder}/data"]
            found = record(command, terminal)
        for second, text in found:
            for line in filter(None, re.split(r"[\r\n]+", text.replace("\x1b[K", ""))):
                print(f"{second:7.1f}  {line}")
        seconds = [0.0, *(second for second, _ in found)]
        silences = [(after - before, before) for before, after in itertools.pairwise(seconds)]
        print(
            f"{'terminal' if terminal else 'log'}: first output after {seconds[1]:.2f} s, longest silence "
            f"{max(silences)[0]:.1f} s, from second {max(silences)[1]:.1f} on, {seconds[-1]:.1f} s in all\n"
        )


if __name__ == "__main__":
    app.run(main)
