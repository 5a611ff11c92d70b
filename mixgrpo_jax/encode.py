"""Compute prompts' features once, to train and evaluate without the text encoders.

    python -m mixgrpo_jax.encode --source=black-forest-labs/FLUX.1-dev --prompts=prompts.txt --target=data/hpd
    python -m mixgrpo_jax.train --config=configs/flux_dev_mixgrpo.py --config.data.folder=data/hpd --workdir=runs/flux

Prompts are a .txt file (a prompt a line), a .jsonl file (an object a line, whose other fields reach the rewards), a
folder of splits as GenEval and flow_grpo have them (train.txt, test_metadata.jsonl, ...), or tfds:NAME/split. They may
be filtered: `--min_words=6 --characters=' -~' --drop_words=words.txt`.

The source is a folder as diffusers lays it out, or a model's name on the hub, with the text encoders and tokenizers of
a model family: for FLUX.1, text_encoder_2/ (T5), tokenizer_2/, text_encoder/ (CLIP) and tokenizer/. The features are
those of its own pipeline in bfloat16. A prompt of FLUX.1-dev takes 512 x 4096 x 2 bytes = 4.2 MB, most of it for
padding, because FLUX attends to that too: 50,000 prompts are 210 GB. What saves:

- `--max_length=128` takes a quarter. A transformer takes text of any length, and the shorter it is the less it costs;
  but this one then sees less padding than it was trained with, so sample with the same length later.
- `--padding=drop` stores only a prompt's own tokens, some 30 for a sentence, as they are beside the padding. Reading
  puts zeros in the padding's place, so that the transformer sees no T5 features there: cheaper still, and further
  from what it was trained with.

Guidance that leads away from a prompt, as that of Stable Diffusion 3, leads away from `--negative_prompt`, "" by
default. Its features are stored once.

A prompt that does not fit is cut, as in the pipeline, and counted. A command that was stopped goes on where it was.
Of n processes that share a file system, process k writes the shards k, k + n, ...
"""

import hashlib
import itertools
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from mixgrpo_jax.data import features as store
from mixgrpo_jax.data import filters as prompt_filters
from mixgrpo_jax.data import prompts as prompt_sources
from mixgrpo_jax.data.filters import Filters
from mixgrpo_jax.data.prompts import Prompt
from mixgrpo_jax.models import families
from mixgrpo_jax.models.families import Family, Parts, Text
from mixgrpo_jax.runtime import app, distributed
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.files import in_bucket, place

DTYPE = jnp.dtype(jnp.bfloat16)
FORMAT_OVERHEAD = 1.01  # of the files over the features in them


def encode(
    source: str | os.PathLike,
    prompts: str,
    target: str | os.PathLike,
    *,
    split: str = "train",
    field: str = "prompt",
    filters: Filters = Filters(),  # noqa: B008  (it is frozen)
    max_length: int | None = None,
    padding: str = "keep",
    negative_prompt: str = "",
    batch: int = 32,
    shard_size: int = 256,
) -> store.Split:
    """Write a split of prompt features, for `data.features.load` to read.

    Args:
        source: folder with the text encoders, or a model's name on the hub; "" is the checkpoint that ships with the
            package.
        prompts: a .txt or .jsonl file, a folder of splits, or "tfds:NAME/split"; see `data.prompts.read`.
        target: folder of the data set. It may hold other splits from the same encoders.
        split: name of the split; of a folder of prompts, also the split that is read.
        field: the field of the prompts' objects that holds the prompt.
        filters: which prompts are kept.
        max_length: tokens of a prompt, padding included; by default the tokenizer's own, 512 for FLUX.1-dev.
        padding: "keep" or "drop" the features of padding.
        negative_prompt: what guidance leads away from, in a family that takes one.
        batch: prompts encoded at a time, over all local devices.
        shard_size: prompts in a file.

    Raises:
        ValueError: a source, prompts or numbers that cannot be, too little room on the disk, or a target that was begun
            with others; always before anything is written.
    """
    folder = families.find(source, field="source")
    check_batch(batch)
    rows = filters.apply(prompt_sources.read(prompts, field, split))
    wanted = [f"{part}/*" for part in itertools.chain(*_encoders(folder)[1].items())]
    folder = families.find(source, *wanted, field="source")
    parts, params = load_encoders(folder)
    length = token_limit(parts, max_length)
    text = parts.family.text(parts, length, DTYPE, negative_prompt)
    lengths = count_tokens(parts, text, [row.text for row in rows])

    shapes = jax.eval_shape(text.features, params, tokenize(text, [rows[0].text]))
    manifest = store.Manifest(
        source=fingerprint(folder),
        prompts=prompt_sources.digest(rows),
        count=len(rows),
        shard_size=shard_size,
        max_length=length,
        padding=padding,
        text_width=shapes["text"].shape[-1],
        pooled_width=shapes["pooled"].shape[-1] if "pooled" in shapes else 0,
        dtype=DTYPE.name,
        before=shapes["text"].shape[1] - length,
        negative_prompt=negative_prompt,
    )
    output = store.Split(place(target).expanduser(), split, manifest)
    output.check()
    check_room(output, lengths)
    output.begin()
    write(output, rows, lengths, make_launch(text, params, batch), batch)
    return output


def check_batch(batch: int) -> None:
    """Refuse a batch that the local devices cannot share evenly."""
    devices = jax.local_device_count()
    if batch < 1 or batch % devices:
        raise ValueError(f"batch={batch} cannot be shared by {devices} devices: choose a multiple of {devices}")


def load_encoders(folder: pathlib.Path) -> tuple[Parts, dict[str, Any]]:
    """The text encoders of a folder with their tokenizers, and their parameters in bfloat16, as host arrays."""
    family, encoders = _encoders(folder)
    configs, params = {}, {}
    for name in encoders:
        configs[name], params[name] = family.parts[name].model.load_folder(folder / name, dtype=DTYPE)
    return Parts(family, configs, families.read_tokenizers(family, folder, encoders)), params


def _encoders(folder: pathlib.Path) -> tuple[Family, dict[str, str]]:
    """The family of a folder, and the text encoders that it holds with their tokenizers' folders."""
    try:
        family = families.of_encoders(folder)
    except ValueError as error:
        raise ValueError(f"source={error}") from None
    found = {
        name: tokenizer
        for name, tokenizer in family.encoders.items()
        if (folder / name).is_dir() or not family.parts[name].optional
    }
    for part in itertools.chain(*found.items()):
        if not (folder / part).is_dir():
            raise ValueError(f"source={str(folder)!r} has no {part}/; give a folder as diffusers saves a pipeline")
    return family, found


def fingerprint(folder: pathlib.Path) -> str:
    """SHA-256 of the encoders' and tokenizers' files, in hexadecimal: their names and contents."""
    sha = hashlib.sha256()
    for part in sorted(itertools.chain(*_encoders(folder)[1].items())):
        for path in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sha.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return sha.hexdigest()


def token_limit(parts: Parts, asked: int | None) -> int:
    """Tokens of a prompt, by the family's first encoder: as asked for, or as its tokenizer says."""
    first = next(name for name in parts.family.encoders.values() if name in parts.tokenizers)
    limit = parts.tokenizers[first].model_max_length if asked is None else asked
    if not 1 <= limit <= 2**16:  # a tokenizer without a limit says 1e30
        raise ValueError(f"max_length={limit} tokens cannot be: give a number up to {2**16}, as --max_length=512")
    return int(limit)


def tokenize(text: Text, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids [P, L], int32, by encoder; cut or filled up to what each takes."""
    return text.tokenize(texts, cut=True)


def count_tokens(parts: Parts, text: Text, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each prompt without padding, [N], at most what is kept, by the family's first encoder.

    Prints how many prompts each encoder cuts.
    """
    counts = {}
    for name, limit in text.limits.items():
        tokenizer = parts.tokenizers[parts.family.encoders[name]]
        counts[name] = np.array([len(ids) for ids in tokenizer(text.written(texts), verbose=False)["input_ids"]])
        print(f"{name}: {(counts[name] > limit).sum():,} of {len(texts):,} prompts are cut at {limit} tokens")
    first = next(iter(counts))
    return np.minimum(counts[first], text.limits[first])


def check_room(output: store.Split, lengths: np.ndarray) -> None:
    """Print what the split takes, and refuse it if what is yet to be written does not fit on the disk."""
    manifest = output.manifest
    sizes = np.array([manifest.nbytes(int(length)) for length in lengths])
    rest = int(FORMAT_OVERHEAD * sum(sizes[manifest.shards[shard]].sum() for shard in output.missing()))
    free, room = math.inf, ""
    if not in_bucket(output.folder):
        there = next(folder for folder in (output.folder, *output.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        room = f", {_size(free)} free"
    tokens = manifest.max_length if manifest.padding == "keep" else lengths.mean()
    print(
        f"{manifest.count:,} prompts x ({tokens:.4g} x {manifest.text_width} + {manifest.pooled_width}) x 2 bytes = "
        f"{manifest.count:,} x {_size(sizes.mean())} = {_size(sizes.sum())} in {len(manifest.shards):,} files; "
        f"{_size(rest)} to be written{room}"
    )
    if rest > free:
        raise ValueError(
            f"target={str(output.folder)!r} has {_size(free)} free, and {_size(rest)} are to be written: "
            "choose another disk, padding=drop, or a smaller max_length"
        )


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def make_launch(text: Text, params: dict[str, Any], batch: int) -> Callable[[Sequence[str]], Any]:
    """`launch(texts) -> features` of up to `batch` prompts, filled up to `batch`; compiled once, and asynchronous."""
    mesh = meshes.make_mesh(dict(data=-1, fsdp=1, tensor=1), jax.local_devices())
    by_prompt = meshes.batch_sharding(mesh, batch)
    params = jax.device_put(params, meshes.replicated(mesh))
    program = jax.jit(text.features, out_shardings=by_prompt)

    def launch(texts):
        filled = [texts[i % len(texts)] for i in range(batch)]
        return program(params, jax.device_put(tokenize(text, filled), by_prompt))

    return launch


def write(
    output: store.Split, rows: Sequence[Prompt], lengths: np.ndarray, launch: Callable[[Sequence[str]], Any], batch: int
) -> None:
    """Encode and write this process's missing shards, and describe the split when all shards are there."""
    mine = [shard for shard in output.missing() if shard % jax.process_count() == jax.process_index()]
    shards = [output.manifest.shards[shard] for shard in mine]

    # Batches end where shards do, so that a prompt's batch, and with it every bit, is the same in any run.
    chunks = [shard[start : start + batch] for shard in shards for start in range(0, len(shard), batch)]
    launched = ((chunk, launch([rows[i].text for i in chunk])) for chunk in chunks)
    elements = (
        {"prompt": rows[i].text, "metadata": rows[i].metadata, "length": int(lengths[i]), "features": features}
        for chunk, batched in _one_ahead(launched)
        for i, features in zip(chunk, _unstack(jax.device_get(batched)))
    )
    for number, shard in zip(tqdm(mine, "encode", unit="shard"), shards):
        output.write(number, itertools.islice(elements, len(shard)))
    if output.missing():
        print(f"{len(output.missing())} of {len(output.manifest.shards)} shards are left to other processes")
    else:
        output.finish()


def _one_ahead(items: Iterable) -> Iterator:
    """Item k, once item k + 1 is made: the devices work on one while the other is written."""
    return (item for item, _ in itertools.pairwise(itertools.chain(items, [None])))


def _unstack(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    return (dict(zip(arrays, row)) for row in zip(*arrays.values()))


@distributed.joined()
def main(_):  # noqa: D103
    encode(
        _SOURCE.value,
        _PROMPTS.value,
        _TARGET.value,
        split=_SPLIT.value,
        field=_FIELD.value,
        filters=Filters(**{name: flags.FLAGS[name].value for name in prompt_filters.NAMES}),
        max_length=_MAX_LENGTH.value,
        padding=_PADDING.value,
        negative_prompt=_NEGATIVE_PROMPT.value,
        batch=_BATCH.value,
        shard_size=_SHARD_SIZE.value,
    )


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", "", "Folder with the text encoders, or a model on the hub; '' ships.")
    _PROMPTS = flags.DEFINE_string("prompts", None, f"{prompt_sources.SOURCES}.", required=True)
    _TARGET = flags.DEFINE_string("target", None, "Folder of the data set.", required=True)
    _SPLIT = flags.DEFINE_string("split", "train", "Name of the split.")
    _FIELD = flags.DEFINE_string("field", "prompt", "The field that holds the prompt.")
    for unit in ("characters", "words"):
        flags.DEFINE_integer(f"min_{unit}", 0, f"Shorter prompts are dropped, in {unit}.")
        flags.DEFINE_integer(f"max_{unit}", 0, f"Longer prompts are dropped, in {unit}; 0 is no limit.")
    flags.DEFINE_string("characters", "", "Those that a prompt may have, as in a regular expression's brackets: ' -~'.")
    flags.DEFINE_string("drop_words", "", "File with a word or phrase a line; prompts with one of them are dropped.")
    flags.DEFINE_string("keep_words", "", "Such a file; prompts with none of them are dropped.")
    _MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens of a prompt; by default the tokenizer's own.")
    _PADDING = flags.DEFINE_enum("padding", "keep", store.PADDING, "What becomes of the features of padding.")
    _NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What guidance leads away from, in some families.")
    _BATCH = flags.DEFINE_integer("batch", 32, "Prompts encoded at a time, over all local devices.")
    _SHARD_SIZE = flags.DEFINE_integer("shard_size", 256, "Prompts in a file.")
    app.run(main)
