"""Convert a transformer, or what a run has trained of it.

    python -m mixgrpo_jax.convert --source=FLUX.1-dev --target=flux1-dev-orbax --to=orbax
    python -m mixgrpo_jax.convert --source=flux1-dev.safetensors --target=flux1-dev --to=diffusers
    python -m mixgrpo_jax.convert --source=runs/flux --target=trained --to=diffusers --merge
    python -m mixgrpo_jax.convert --source=runs/flux --target=adapters --to=lora

The source is a pipeline's folder (of which transformer/ is read), a transformer's folder as diffusers saves it or as
`--to=orbax` writes it, an original single file as FLUX.1's, or a run's workdir. The target is a new folder, which
appears when it is complete: for `diffusers`, one that its from_pretrained opens; for `orbax`, config.json and a
checkpoint of our parameters, from which each host of a slice reads only its own; for `lora`, the adapters that a run
has trained, as load_lora_weights opens them. Parameters are read and written one by one. Both may be in a bucket
(gs://bucket/trained), but for a run's base: models are copied to this machine first, targets from it.
"""

import contextlib
import functools
import os
import pathlib
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from flax import traverse_util
from tqdm import tqdm

from mixgrpo_jax.engine.loading import average_path, converted, version_of
from mixgrpo_jax.models import families, lora
from mixgrpo_jax.models.io import orbax_io, weights
from mixgrpo_jax.models.io.safetensors_io import SHARD_SIZE
from mixgrpo_jax.models.io.transformer import Source
from mixgrpo_jax.models.io.weights import Lazy, Params
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.runtime import app
from mixgrpo_jax.runtime.checkpoint import Checkpoints, host_sum
from mixgrpo_jax.runtime.files import Path, fetched, in_bucket, place, upload

TARGETS = ("orbax", "diffusers", "lora")
DTYPES = ("", "bfloat16", "float32")
RAW = "raw"  # the parameters themselves, among their averages


class Run(NamedTuple):
    """What a run has trained, and on what: `trained` are all parameters, or adapters where lora.rank > 0 (`Lazy`)."""

    base: Source
    lora: LoraConfig
    trained: Params


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    *,
    dtype: str = "",
    which: str = "",
    merge: bool = False,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Converts `source` into the new folder `target`.

    Args:
      source, target, to: see the module.
      dtype: of the written parameters, "bfloat16" or "float32"; by default the source's, and a merged kernel's is that
        of its base. Adapters are fp32.
      which: of a run, the name of an average of its parameters that it keeps, or "raw" as last updated; by default
        the average that it evaluates, if it does.
      merge: whether to add a run's adapters to its base.
      shard_size: bytes above which a diffusers folder's tensors are cut into several files.

    Raises:
      ValueError: an argument is unknown or does not fit the source, the source is of another model or damaged, the
        target is not empty, or its disk is too small. Nothing has been written then.
    """
    start = time.monotonic()
    for flag, value, choices in (("to", to, TARGETS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise ValueError(f"--{flag}={value!r} is unknown: choose one of {choices}")
    target = place(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--target={str(target)!r} is there already: give a new folder, or remove it")
    with contextlib.nullcontext(place(source)) if _is_run(source) else fetched(source) as opened:
        if to == "lora":
            num_bytes = _write_adapters(_adapted_run(opened, which, dtype), target)
        else:
            num_bytes = _write_transformer(_open(opened, which, dtype or None, merge), target, to, shard_size)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = num_bytes / seconds
    print(f"{target}: {_size(num_bytes)} in {seconds:.1f} s ({_size(rate)}/s), peak memory {_size(peak)}")


def _is_run(source: str | os.PathLike) -> bool:
    return (place(source) / "checkpoints").is_dir()


def _open(path: Path, which: str, dtype: Any, merge: bool) -> Source:
    if _is_run(path):
        return _trained(open_run(path, which), dtype, merge)
    if merge:
        raise ValueError(f"--merge: {path} is no run's workdir, and has no adapters to merge")
    if (path / lora.FILE_NAME).is_file():
        raise ValueError(f"{path} holds adapters (LoRA), no model: merge them into one with diffusers' fuse_lora first")
    transformer = path / "transformer" if (path / "transformer").is_dir() else path
    return families.of(transformer).transformer.open_source(transformer, dtype)


def open_run(workdir: str | os.PathLike, which: str = "") -> Run:
    """The newest checkpoint of a run, with the base that its config.json names.

    Raises ValueError where they differ, or where the checkpoint lacks what is asked for.
    """
    workdir = place(workdir)
    if not (file := workdir / "config.json").is_file():
        raise ValueError(f"there is no {file}, which names the run's base: copy it from where the run was trained")
    settings = weights.read_json(file)
    options = settings["model"]
    folder = families.find(options["folder"])
    path = pathlib.Path(options.get("transformer") or folder / "transformer")
    if not path.exists():
        raise ValueError(f"{file} names the base {path}, which is not there: set model.folder in it to where it is")
    family = families.of(path)
    base, config = family.transformer.open_source(path), LoraConfig(**options.get("lora", {})).on(family.targets)

    checkpoints = Checkpoints(workdir)
    latest = checkpoints.latest
    if latest is None:
        raise ValueError(f"{workdir}/checkpoints holds no finished checkpoint: let the run save one")
    version, state = version_of(checkpoints.restore_host(), checkpoints), checkpoints.folder / "state"
    part = average_path(_average(settings, state, version, which), version)
    trained = orbax_io.lazy_restore(state, part)
    expected = family.transformer.skeleton(base.config)
    if config.rank:
        expected = jax.eval_shape(lambda key: lora.init(config, expected, key), jax.random.key(0))
    weights.check_shapes(expected, trained, f"{workdir}, iteration {latest},")
    leaves = traverse_util.flatten_dict(trained, sep="/")
    leaves = {path: _checked(leaf, "/".join(["state", *part, path]), checkpoints) for path, leaf in leaves.items()}
    trained = traverse_util.unflatten_dict(leaves, sep="/")
    return Run(base, config, converted(trained, version, base.transformer.table(base.config)))


def _checked(leaf: Lazy, name: str, checkpoints: Checkpoints) -> Lazy:
    """The parameter, which is refused as it is read where it is not finite, or not what was saved."""

    @functools.cache
    def verify() -> None:
        values = leaf[()]
        checkpoints.verify({name: host_sum(values)})
        if not np.isfinite(values).all():
            raise ValueError(
                f"{checkpoints.folder} holds parameters that are not finite: remove it, to convert the one before"
            )

    def read(index: Any) -> np.ndarray:
        verify()
        return leaf[index]

    return Lazy(leaf.shape, leaf.dtype, read)


def _average(settings: dict[str, Any], state: Path, version: int, which: str) -> str:
    """The name of the average that is asked for, "" for the parameters themselves."""
    if version > 1:
        kept, evaluated = sorted(orbax_io.stored(state).get("averages", ())), settings["evaluation"]["average"]
    else:
        kept = ["ema"] if settings["optimizer"]["ema_decay"] else []
        evaluated = "ema" if kept else ""
    name = {"": evaluated, RAW: ""}.get(which, which)
    if name and name not in kept:
        raise ValueError(f"--weights={name!r}: the run keeps no such average; choose from {', '.join([*kept, RAW])}")
    return name


def _trained(run: Run, dtype: Any, merge: bool) -> Source:
    """A run's result as a whole model."""
    if run.lora.rank and not merge:
        raise ValueError("the run has trained adapters (LoRA): write them with --to=lora, or add --merge for a model")
    if merge and not run.lora.rank:
        raise ValueError("--merge: the run has trained all parameters, and has no adapters to merge")
    params = _merged(run, dtype) if run.lora.rank else jax.tree.map(lambda leaf: _cast(leaf, dtype), run.trained)
    return run.base._replace(params=params, checkpoint=None)


def _merged(run: Run, dtype: Any) -> Params:
    params = traverse_util.flatten_dict(jax.tree.map(lambda leaf: _cast(leaf, dtype), run.base.params), sep="/")
    kernels = traverse_util.flatten_dict(run.base.params, sep="/")
    adapters = traverse_util.flatten_dict(weights.place(run.trained), sep="/")

    def lazy_kernel(kernel, a, b):
        def read(index):
            base = {"layer": {"kernel": kernel[index].astype(np.float32)}}
            layer = lora.merge(base, {"layer": {"a": a[index], "b": b[index]}}, run.lora.scale)
            return np.asarray(layer["layer"]["kernel"])

        return _cast(Lazy(kernel.shape, np.float32, read), dtype or kernel.dtype)

    for path in [path for path in adapters if path.endswith("/a")]:
        layer = path.removesuffix("/a")
        params[f"{layer}/kernel"] = lazy_kernel(kernels[f"{layer}/kernel"], adapters[path], adapters[f"{layer}/b"])
    return traverse_util.unflatten_dict(params, sep="/")


def _cast(leaf: Lazy, dtype: Any) -> Lazy:
    dtype = np.dtype(dtype or leaf.dtype)
    return Lazy(leaf.shape, dtype, lambda index: leaf[index].astype(dtype, copy=False))


def _adapted_run(path: Path, which: str, dtype: str) -> Run:
    if not _is_run(path):
        raise ValueError(f"--to=lora: {path} is no run's workdir; use --to=diffusers or --to=orbax for a model")
    if dtype:
        raise ValueError(f"--dtype={dtype}: adapters are written in fp32; leave it out")
    run = open_run(path, which)
    if not run.lora.rank:
        raise ValueError(f"--to=lora: {path} has trained all parameters (model.lora.rank=0); use --to=diffusers")
    return run


def _write_adapters(run: Run, target: Path) -> int:
    num_bytes = _num_bytes(run.trained)
    with _whole_folder(target, num_bytes) as folder:
        table = run.base.transformer.table(run.base.config)
        lora.save(folder, table, weights.place(run.trained), run.lora.scale)
    return num_bytes


def _write_transformer(source: Source, target: Path, to: str, shard_size: int) -> int:
    num_bytes = _num_bytes(source.params)
    with (
        _whole_folder(target, num_bytes) as folder,
        tqdm(total=num_bytes, desc=to, unit="B", unit_scale=True) as progress,
    ):
        args = (folder, source.config, source.params)
        options: dict[str, Any] = dict(fields=source.fields, progress=progress.update)
        if to == "orbax":
            source.transformer.save_checkpoint(*args, **options)
        else:
            source.transformer.save_folder(*args, shard_size=shard_size, **options)
    return num_bytes


def _num_bytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@contextlib.contextmanager
def _whole_folder(target: Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """A folder beside the target that takes its place when all is written, and goes when something fails.

    What is for a bucket is written on this machine first.
    """
    here = pathlib.Path(tempfile.gettempdir(), target.name) if in_bucket(target) else pathlib.Path(target).absolute()
    disk = next(parent for parent in here.parents if parent.exists())
    if (free := shutil.disk_usage(disk).free) < num_bytes:
        raise ValueError(
            f"{disk} has {_size(free)} left, and {target} takes {_size(num_bytes)}: make room, or go elsewhere"
        )
    if in_bucket(target):
        with tempfile.TemporaryDirectory() as written:
            yield pathlib.Path(written)
            upload(pathlib.Path(written), target, last="config.json")
        return
    partial = here.with_name(f"{here.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(here)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def main(_):  # noqa: D103
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed that an accelerator would speed up
    convert(_SOURCE.value, _TARGET.value, _TO.value, dtype=_DTYPE.value, which=_WEIGHTS.value, merge=_MERGE.value)


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", None, "Model folder, original single file, or workdir.", required=True)
    _TARGET = flags.DEFINE_string("target", None, "New folder.", required=True)
    _TO = flags.DEFINE_enum("to", None, TARGETS, "What to write.", required=True)
    _DTYPE = flags.DEFINE_enum("dtype", "", DTYPES, "Of the written parameters; by default the source's.")
    _WEIGHTS = flags.DEFINE_string("weights", "", "A run's average by name, or raw; by default, what it evaluates.")
    _MERGE = flags.DEFINE_bool("merge", False, "Add a run's adapters to its base.")
    app.run(main)
