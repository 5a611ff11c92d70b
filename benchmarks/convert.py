"""Conversion of a FLUX.1 [dev]-shaped model both ways: seconds and peak memory, beside a plain copy.

    python -m benchmarks.convert --workdir=/data/convert
    python -m benchmarks.convert --workdir=/tmp/convert --layers=1,2

The model is random, in bf16: 23.8 GB with all layers. There must be room for it twice. Each conversion is a process of
its own, and its seconds include Python's start and the disk's last write.
"""

import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from tqdm import tqdm

from mixgrpo_jax.models import flux
from mixgrpo_jax.models.io.weights import Lazy

_WORKDIR = flags.DEFINE_string("workdir", None, "New folder for the files, removed at the end.", required=True)
_LAYERS = flags.DEFINE_list("layers", ["19", "38"], "Double blocks, single blocks.")


def make_source(folder: pathlib.Path, layers: Sequence[int]) -> None:
    """Write a random model in diffusers' layout, a tensor at a time."""
    jax.config.update("jax_platforms", "cpu")
    config = dataclasses.replace(flux.flux1_dev(), num_layers=layers[0], num_single_layers=layers[1])
    noise = np.random.default_rng(0).normal(scale=0.02, size=1 << 24).astype(ml_dtypes.bfloat16)

    def random(leaf):
        def read(index):
            blocks = [len(range(leaf.shape[0])[index[0]]), *leaf.shape[1:]] if index else leaf.shape
            return np.resize(noise, blocks)

        return Lazy(leaf.shape, noise.dtype, read)

    params = jax.tree.map(random, flux.TRANSFORMER.skeleton(config))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    free = shutil.disk_usage(folder.parent).free
    if free < 2.1 * num_bytes:
        raise ValueError(f"--workdir: {folder.parent} has {free / 1e9:.1f} GB left, needs {2.1 * num_bytes / 1e9:.1f}")
    with tqdm(total=num_bytes, desc="make", unit="B", unit_scale=True) as progress:
        flux.TRANSFORMER.save_folder(folder, config, params, progress=progress.update)
    os.sync()


def measure(*command: str | os.PathLike) -> tuple[float, float, int]:
    """Runs a command: seconds until what it wrote is on the disk, those it computed, and its peak memory in bytes."""
    start = time.monotonic()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise RuntimeError(f"{command} failed")
    os.sync()
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def convert(source: pathlib.Path, target: pathlib.Path, to: str) -> tuple[float, float, int]:
    """Measures one conversion."""
    arguments = (f"--source={source}", f"--target={target}", f"--to={to}")
    return measure(sys.executable, "-m", "mixgrpo_jax.convert", *arguments)


def digests(folder: pathlib.Path) -> dict[str, str]:
    """A hash of each file's bytes."""
    result = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as opened:
            result[file.name] = hashlib.file_digest(opened, "blake2b").hexdigest()
    return result


def main(_):  # noqa: D103
    layers = [int(count) for count in _LAYERS.value]
    workdir = pathlib.Path(_WORKDIR.value)
    workdir.mkdir(parents=True)
    source, ours, back = workdir / "source", workdir / "orbax", workdir / "back"
    try:
        # In a process of its own: a child's peak memory starts from its parent's.
        make = multiprocessing.get_context("spawn").Process(target=make_source, args=(source, layers))
        make.start()
        make.join()
        if make.exitcode:
            raise SystemExit(make.exitcode)
        gigabytes = sum(file.stat().st_size for file in source.iterdir()) / 1e9
        expected, rows = digests(source), {}
        rows["plain copy"] = measure("cp", "-r", source, back)
        shutil.rmtree(back)
        rows["diffusers to orbax"] = convert(source, ours, "orbax")
        shutil.rmtree(source)
        rows["orbax to diffusers"] = convert(ours, back, "diffusers")
        same = digests(back) == expected
    finally:
        shutil.rmtree(workdir)
    print(f"\n{gigabytes:.2f} GB, files after the round trip {'are' if same else 'ARE NOT'} bit-identical\n")
    print("| | seconds | seconds per GB | CPU seconds per GB | peak memory, GB |\n|---|---|---|---|---|")
    for name, (seconds, computed, peak) in rows.items():
        print(f"| {name} | {seconds:.1f} | {seconds / gigabytes:.2f} | {computed / gigabytes:.2f} | {peak / 1e9:.2f} |")


if __name__ == "__main__":
    app.run(main)
