"""Write the report of runs: one HTML file with charts, pictures, costs and settings, which opens from disk.

    python -m mixgrpo_jax.report --workdir=runs/quickstart
    python -m mixgrpo_jax.report --workdir=runs/a,runs/b --output=report.html
    python -m mixgrpo_jax.report --workdir=runs/sweep

Several runs are compared, also those in the folder of a sweep. The file is report.html in the one folder that is named,
or beside the first of several; `--output` says otherwise. A run may still go on, and runs may be in buckets.
"""

from collections.abc import Sequence

from absl import flags

from mixgrpo_jax.runtime import app, page
from mixgrpo_jax.runtime.files import Path, place


def folders(values: Sequence[str]) -> list[Path]:
    """Those that are named, also with commas between. A comma is part of the name of a folder that is there."""
    named = [[value] if place(value).exists() else value.split(",") for value in values]
    return [place(folder) for several in named for folder in several if folder]


def main(_) -> None:
    """Write it, and say where it is."""
    workdirs = folders(_WORKDIR.value)
    folder = workdirs[0] if len(workdirs) == 1 else workdirs[0].parent
    output = _OUTPUT.value or folder / "report.html"
    page.write(output, workdirs)
    print(output)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_multi_string(
        "workdir", None, "A run's folder or a sweep's; several with commas between", required=True
    )
    _OUTPUT = flags.DEFINE_string("output", "", "Where the file goes.")
    app.run(main)
