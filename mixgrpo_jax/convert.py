"""Convert a transformer, or what a run has trained of it.

    python -m mixgrpo_jax.convert --source=black-forest-labs/FLUX.1-dev --target=flux1-dev-orbax --to=orbax
    python -m mixgrpo_jax.convert --source=flux1-dev.safetensors --target=flux1-dev --to=diffusers
    python -m mixgrpo_jax.convert --source=runs/flux --target=trained --to=diffusers --merge
    python -m mixgrpo_jax.convert --source=runs/flux --target=adapters --to=lora
    python -m mixgrpo_jax.convert --source=kohya.safetensors --base=FLUX.1-dev --target=adapters --to=lora

The source is a pipeline's folder (of which transformer/ is read), a transformer's folder as diffusers saves it or as
`--to=orbax` writes it, an original single file as FLUX.1's, one of these by its name on the hub, a run's workdir, or,
with the model that they are for as --base, adapters in a LoRA file. The target is a new folder, which
appears when it is complete: for `diffusers`, one that its from_pretrained opens; for `orbax`, config.json and a
checkpoint of our parameters, from which each host of a slice reads only its own; for `lora`, adapters as
load_lora_weights opens them. Parameters are read and written one by one. Source and target may be in a bucket
(gs://bucket/trained): of a run there only what is needed is read, models are copied to this machine first, and targets
from it.
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
from mixgrpo_jax.models import families, lora, lora_files
from mixgrpo_jax.models.io import hub, orbax_io, weights
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
    """What was trained (arrays or `Lazy`), and on what: all parameters, or where lora.rank > 0 adapters."""

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
    base: str = "",
    shard_size: int = SHARD_SIZE,
) -> None:
    """Converts `source` into the new folder `target`.

    Args:
      source, target, to: see the module.
      dtype: of the written parameters, "bfloat16" or "float32"; by default the source's, and a merged kernel's is that
        of its base. Adapters are fp32.
      which: of a run, the name of an average of its parameters that it keeps, or "raw" as last updated; by default
        the average that it evaluates, if it does.
      merge: whether to add adapters to their base.
      base: the model that the adapters of a LoRA file are for.
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
    with contextlib.nullcontext(source) if _is_run(source) else fetched(source) as opened:
        if to == "lora":
            num_bytes = _write_adapters(_adapted(opened, which, dtype, base), target)
        else:
            num_bytes = _write_transformer(_open(opened, which, dtype or None, merge, base), target, to, shard_size)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = num_bytes / seconds
    print(f"{target}: {_size(num_bytes)} in {seconds:.1f} s ({_size(rate)}/s), peak memory {_size(peak)}")


def _is_run(source: str | os.PathLike) -> bool:
    return (place(source) / "checkpoints").is_dir()


def _open(source: str | os.PathLike, which: str, dtype: Any, merge: bool, base: str) -> Source:
    if run := _trained_in(source, which, base):
        return _whole(run, dtype, merge)
    if merge:
        raise ValueError(
            f"--merge: {source} is no run's workdir, and has no adapters to merge; a LoRA file needs --base"
        )
    for name in (lora_files.FILE_NAME, lora_files.PEFT_FILE):
        if pathlib.Path(source, name).is_file():
            raise ValueError(f"{source} holds adapters (LoRA), no model: give the model that they are for as --base")
    transformer = families.find_transformer(source, "--source")
    return families.of(transformer).transformer.open_source(transformer, dtype)


def _trained_in(source: str | os.PathLike, which: str, base: str) -> Run | None:
    """What a run has trained, or the adapters of a LoRA file; None of a model."""
    if _is_run(source):
        if base:
            raise ValueError(f"--base={base!r}: {source} is a run's workdir, whose config.json names its base")
        return open_run(source, which)
    return open_adapters(source, base) if base else None


def open_adapters(file: str | os.PathLike, base: str) -> Run:
    """The adapters of a LoRA file, with the base that they are for. Raises ValueError where they do not fit it."""
    transformer = families.find_transformer(base, "--base")
    opened = families.of(transformer).transformer.open_source(transformer)
    found = hub.local(file, "--source", *hub.WEIGHTS, lora_files.PEFT_CONFIG)
    rules = opened.transformer.rules(opened.config)
    adapters = lora_files.load(found, rules, opened.transformer.skeleton(opened.config))
    rank = jax.tree.leaves(adapters)[0].shape[-1]
    return Run(opened, LoraConfig(rank=rank, alpha=rank), adapters)


def open_run(workdir: str | os.PathLike, which: str = "") -> Run:
    """The newest checkpoint of a run, with the base that its config.json names.

    Raises ValueError where they differ, or where the checkpoint lacks what is asked for.
    """
    workdir = place(workdir)
    if not (file := workdir / "config.json").is_file():
        raise ValueError(f"there is no {file}, which names the run's base: copy it from where the run was trained")
    settings = weights.read_json(file)
    try:
        options = settings["model"]
        path = families.find_transformer(options.get("transformer") or options["folder"], "model.folder")
        family = families.of(path)
        base, config = family.transformer.open_source(path), LoraConfig(**options.get("lora", {})).on(family.targets)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no run's config ({error!r}): put the run's own in its place") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}. Mend it: set model.folder in it to where the base is") from None

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


def _whole(run: Run, dtype: Any, merge: bool) -> Source:
    """What was trained as a whole model."""
    if run.lora.rank and not merge:
        raise ValueError("these are adapters (LoRA): write them with --to=lora, or add --merge for a model")
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


def _adapted(source: str | os.PathLike, which: str, dtype: str, base: str) -> Run:
    if not (run := _trained_in(source, which, base)):
        raise ValueError(
            f"--to=lora: {source} is no run's workdir; use --to=diffusers or --to=orbax for a model, and give a LoRA "
            "file's model as --base"
        )
    if dtype:
        raise ValueError(f"--dtype={dtype}: adapters are written in fp32; leave it out")
    if not run.lora.rank:
        raise ValueError(f"--to=lora: {source} has trained all parameters (model.lora.rank=0); use --to=diffusers")
    return run


def _write_adapters(run: Run, target: Path) -> int:
    num_bytes = _num_bytes(run.trained)
    with _whole_folder(target, num_bytes) as folder:
        table = run.base.transformer.table(run.base.config)
        lora_files.save(folder, table, weights.place(run.trained), run.lora.scale)
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
    convert(
        _SOURCE.value,
        _TARGET.value,
        _TO.value,
        dtype=_DTYPE.value,
        which=_WEIGHTS.value,
        merge=_MERGE.value,
        base=_BASE.value,
    )


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string(
        "source", None, "Model (a folder, an original file, a name on the hub), workdir, or LoRA file.", required=True
    )
    _TARGET = flags.DEFINE_string("target", None, "New folder.", required=True)
    _TO = flags.DEFINE_enum("to", None, TARGETS, "What to write.", required=True)
    _DTYPE = flags.DEFINE_enum("dtype", "", DTYPES, "Of the written parameters; by default the source's.")
    _WEIGHTS = flags.DEFINE_string("weights", "", "A run's average by name, or raw; by default, what it evaluates.")
    _MERGE = flags.DEFINE_bool("merge", False, "Add adapters to their base.")
    _BASE = flags.DEFINE_string("base", "", "The model that the adapters of a LoRA file are for.")
    app.run(main)
