"""Prompt features that the text encoders computed once, as a TFDS data set of prompts to train on.

A folder holds dataset_info.json, features.json, ArrayRecord shards under the names that TFDS gives them, and by split
a manifest of what it is encoded from. `tfds.builder_from_directory(folder).as_data_source(split)` opens it too.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grain
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from mixgrpo_jax.models.io.weights import read_json, read_safetensors, write_safetensors
from mixgrpo_jax.runtime.files import Path, fetched, place, replaced, size

NAME, FORMAT = "features", "array_record"
PADDING = ("keep", "drop")
OWN = ("text", "pooled")  # a prompt's own features
SHARED = "shared.safetensors"
BY_SPLIT = ("prompts", "count", "shard_size")  # what the splits of a folder need not share
LABELS = ("tag", "category", "style")  # what lists of evaluation prompts call a prompt's kind


@dataclass(frozen=True)
class Manifest:
    """What a split is encoded from, and the shape in which it is stored."""

    source: str  # SHA-256 of the encoders' files
    prompts: str  # SHA-256 of the prompts with their metadata
    count: int  # prompts
    shard_size: int  # prompts a shard
    max_length: int  # tokens of a prompt, padding included
    padding: str  # "keep": the features of all tokens are stored; "drop": those of a prompt's own tokens
    text_width: int
    pooled_width: int  # 0 where there are no pooled features
    dtype: str = "bfloat16"
    before: int = 0  # rows of text before the tokens that are counted: another encoder's
    negative_prompt: str = ""  # whose features all prompts share, where the family takes one

    def __post_init__(self):
        if self.padding not in PADDING:
            raise ValueError(f"padding={self.padding!r} is unknown: use one of {PADDING}")
        for field in ("count", "shard_size", "max_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")

    @property
    def shards(self) -> list[range]:
        """The prompts of every shard, by position; the last shard may be shorter."""
        size = self.shard_size
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    @property
    def record(self) -> tfds.features.FeaturesDict:
        """TFDS features of a record. TFDS has no bfloat16: the same 16 bits are stored as uint16."""
        raw = functools.partial(tfds.features.Tensor, dtype=np.uint16, encoding=tfds.features.Encoding.BYTES)
        rows = self.before + self.max_length if self.padding == "keep" else None
        pooled = {"pooled": raw(shape=(self.pooled_width,), doc="bits of bfloat16")} if self.pooled_width else {}
        return tfds.features.FeaturesDict(
            {
                "prompt": tfds.features.Text(),
                "metadata": tfds.features.Text(doc="a JSON object"),
                "length": tfds.features.Scalar(np.int32, doc="tokens of the prompt without padding"),
                "text": raw(shape=(rows, self.text_width), doc="bits of bfloat16"),
                **pooled,
            }
        )

    def nbytes(self, length: int) -> int:
        """Bytes of the features of a prompt of `length` tokens."""
        rows = self.before + (self.max_length if self.padding == "keep" else length)
        return 2 * (self.text_width * rows + self.pooled_width)


@dataclass(frozen=True)
class Split:
    """A split of a folder that is written shard by shard, in any number of runs and processes."""

    folder: Path
    name: str
    manifest: Manifest

    def __post_init__(self):
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"split={self.name!r} is no name of a split: use letters, digits and underscores")

    @property
    def manifest_path(self) -> Path:
        """File of the manifest."""
        return self.folder / f"manifest-{self.name}.json"

    @property
    def shared(self) -> Path:
        """File of the features that all prompts of the folder share: those of the negative prompt, if there is one."""
        return self.folder / SHARED

    @property
    def template(self) -> tfds.core.ShardedFileTemplate:
        """TFDS's rule for the names of the shards' files."""
        return tfds.core.ShardedFileTemplate(self.folder, dataset_name=NAME, split=self.name, filetype_suffix=FORMAT)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        count = len(self.manifest.shards)
        return place(self.template.sharded_filepath(shard_index=shard, num_shards=count))

    def missing(self) -> list[int]:
        """Shards that are yet to be written."""
        there = {path.name for path in self.folder.glob(f"{NAME}-{self.name}.*")}  # one look at a bucket
        return [shard for shard in range(len(self.manifest.shards)) if self.path(shard).name not in there]

    def info(self) -> tfds.core.SplitInfo:
        """What TFDS needs to know of a complete split."""
        lengths = [len(shard) for shard in self.manifest.shards]
        num_bytes = sum(size(self.path(shard)) for shard in range(len(lengths)))
        return tfds.core.SplitInfo(self.name, lengths, num_bytes, self.template)

    def check(self) -> None:
        """Raise ValueError, naming the field, if the folder holds what this split cannot be added to.

        A split of this name must have this manifest; other splits must have the same encoders and shape.
        """
        for other in splits(self.folder):
            for field in dataclasses.fields(Manifest):
                then, now = (getattr(split.manifest, field.name) for split in (other, self))
                if then != now and (other.name == self.name or field.name not in BY_SPLIT):
                    raise ValueError(
                        f"{other.manifest_path} has {field.name}={then!r}, now {field.name}={now!r}: go on with what "
                        "it was begun with, or choose another target"
                    )

    def begin(self) -> None:
        """Make the folder, and put the manifest down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replaced(self.manifest_path) as draft:
            draft.write_text(json.dumps(dataclasses.asdict(self.manifest), indent=2))

    def write(self, shard: int, elements: Iterable[dict[str, Any]]) -> None:
        """Write a shard's elements, as `load` gives them, to a file that appears whole or not at all.

        What they share is written with the first shard.
        """
        record = self.manifest.record
        # Elements are read one by one in any order, and bfloat16 features hardly compress.
        with (
            replaced(self.path(shard)) as draft,
            contextlib.closing(ArrayRecordWriter(str(draft), "group_size:1,uncompressed")) as writer,
        ):
            for index, element in enumerate(elements):
                shared = {name: a for name, a in element["features"].items() if name not in OWN}
                if shared and shard == index == 0 and not self.shared.exists():
                    with replaced(self.shared) as file:
                        write_safetensors(file, shared)
                writer.write(record.serialize_example(_encode(element, self.manifest)))

    def finish(self) -> None:
        """Describe the folder's complete splits to TFDS."""
        identity = tfds.core.DatasetIdentity(NAME, tfds.core.Version("1.0.0"), str(self.folder), module_name="")
        info = tfds.core.DatasetInfo(
            builder=identity, description=__doc__, features=self.manifest.record, disable_shuffling=True
        )
        info.set_file_format(FORMAT)
        complete = [split.info() for split in splits(self.folder) if not split.missing()]
        info.set_splits(tfds.core.SplitDict(complete))
        with tempfile.TemporaryDirectory() as scratch:
            info.write_to_directory(scratch)
            for name in ("features.json", "dataset_info.json"):
                with replaced(self.folder / name) as draft:
                    shutil.copyfile(os.path.join(scratch, name), draft)


def splits(folder: Path) -> list[Split]:
    """The splits of a folder, complete or not."""
    manifests = {path: read_json(path) for path in sorted(folder.glob("manifest-*.json"))}
    return [
        Split(folder, path.stem.removeprefix("manifest-"), Manifest(**fields)) for path, fields in manifests.items()
    ]


def _encode(element: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """An element as TFDS stores it; features without a prompt's padding, if it is dropped."""
    rows = manifest.before + (manifest.max_length if manifest.padding == "keep" else element["length"])
    own = {name: element["features"][name].view(np.uint16) for name in OWN if name in element["features"]}
    plain = {"prompt": element["prompt"], "metadata": json.dumps(element["metadata"]), "length": element["length"]}
    return plain | own | {"text": own["text"][:rows]}


def load(split: str, folder: str | os.PathLike) -> grain.MapDataset:
    """The prompts of `split` with their features, in the prompts' order, by random access.

    An element has `prompt`, `metadata` (a dict), `length` (tokens of the prompt), and `features`: `text` (bfloat16
    [max_length, D]), `pooled` (bfloat16 [C]) where the model has it, and what all prompts share. Where padding was
    dropped, zeros stand in its place.
    """
    folder = place(folder).expanduser()
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"data.folder={str(folder)!r} holds no finished split of features: "
            f"run python -m mixgrpo_jax.encode --target={folder}"
        )
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise ValueError(f"{folder} has no finished split {split!r}, but {', '.join(builder.info.splits)}: encode it")
    first = splits(folder)[0]
    rows = first.manifest.before + first.manifest.max_length
    shared = {}
    if first.shared.exists():
        with fetched(first.shared) as file:
            shared = {name: np.asarray(a) for name, a in read_safetensors(file).items()}
    return grain.MapDataset.source(builder.as_data_source(split)).map(functools.partial(_decode, rows, shared))


def check_negative(folder: str | os.PathLike, prompt: str) -> None:
    """Raise ValueError, naming both, if the features in a folder lead away from another prompt than this one."""
    for split in splits(place(folder).expanduser()):
        if (then := split.manifest.negative_prompt) != prompt:
            raise ValueError(
                f"data.folder={str(folder)!r} is encoded with negative_prompt={then!r}, and "
                f"model.negative_prompt={prompt!r}: set the latter to the former, or encode with "
                f"--negative_prompt={prompt!r} to another target"
            )


def _decode(rows: int, shared: dict[str, np.ndarray], example: dict[str, Any]) -> dict[str, Any]:
    own = {name: example[name].view(ml_dtypes.bfloat16) for name in OWN if name in example}
    missing = rows - len(own["text"])
    own["text"] = np.pad(own["text"], ((0, missing), (0, 0))) if missing else own["text"]
    return {
        "prompt": example["prompt"].decode(),
        "metadata": json.loads(example["metadata"]),
        "length": example["length"],
        "features": own | shared,
    }


def batches(dataset: grain.MapDataset, seed: int, batch_size: int) -> grain.MapDataset:
    """Endless batches, shuffled anew in every epoch; batch k is `batches(...)[k]`, a pure function of (seed, k).

    A batch has `prompt` (P strings), `metadata` (P dicts), `length` (int32 [P]) and `features`: `text` (bfloat16
    [P, max_length, D]), and `pooled` (bfloat16 [P, C]) where the model has it.
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(f"batch_size={batch_size} does not fit a data set of {len(dataset)}: use 1 to {len(dataset)}")
    return dataset.seed(seed).shuffle().repeat().batch(batch_size, batch_fn=collate)


def collate(elements: list[dict]) -> dict:
    """Elements as one batch; see `batches`."""
    columns = {key: [element[key] for element in elements] for key in elements[0]}
    features = {name: np.stack([row[name] for row in columns["features"]]) for name in columns["features"][0]}
    return columns | {"features": features, "length": np.array(columns["length"], np.int32)}


def groups(metadata: dict) -> dict[str, str]:
    """What an element is counted under when scores are reported: its kind, where its prompt list names one."""
    return {label: str(metadata[label]) for label in LABELS if label in metadata}
