"""Prompts from a file, a folder of splits or a TFDS data set, in their order, duplicates included."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TFDS = "tfds:"
SOURCES = "a .txt or .jsonl file, a folder of splits, or tfds:NAME/split"
# What a folder calls a split: as flow_grpo's data sets do, plainly, and as GenEval's repository does.
SPLIT_FILES = ("{}_metadata.jsonl", "{}.jsonl", "{}.txt")
GENEVAL, GENEVAL_SPLIT = "prompts/evaluation_metadata.jsonl", "test"
_NOT_TEXT = re.compile(
    "[\0\ud800-\udfff]"
)  # halves of a pair alone, as of an emoji that was cut, and zeros, as of UTF-16


class Prompt(NamedTuple):
    """A prompt, and what its rewards need to know: values that JSON can hold, by name."""

    text: str
    metadata: dict[str, Any]


def read(source: str, field: str = "prompt", split: str = "train") -> list[Prompt]:
    """The prompts of a source; a prompt's id is its position.

    Args:
        source: a .txt file with a prompt a line; a .jsonl file with an object a line; a folder that holds such files
            by split; or "tfds:NAME/split", where NAME is a registered data set or a folder that TFDS wrote, and split
            may be a slice, "train[:1000]".
        field: the objects' field that holds the prompt; the other fields are the prompt's metadata. Of a TFDS data set,
            only scalars (text, numbers, labels) are.
        split: of a folder, the split that is read. It is one of the files SPLIT_metadata.jsonl, SPLIT.jsonl and
            SPLIT.txt; the split "test" may also be prompts/evaluation_metadata.jsonl, GenEval's own.

    Raises:
        ValueError: no such source, no prompts in it, or a prompt that is missing, empty or not text in UTF-8, by its
            line.
    """
    prompts = [_prompt(where, record, field) for where, record in _records(source, field, split)]
    if not prompts:
        raise ValueError(f"prompts={source!r} holds no prompt")
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts, their metadata and their order, in hexadecimal."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(json.dumps(prompt, sort_keys=True).encode() + b"\n")
    return sha.hexdigest()


def _records(source: str, field: str, split: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where it stands, {field: prompt, ...}) of every prompt."""
    if source.startswith(TFDS):
        return _from_tfds(source, field)
    path = Path(source).expanduser()
    if path.is_dir():
        path = _split_file(path, split)
    if not path.is_file():
        raise ValueError(f"prompts={source!r} is not there; give {SOURCES}")
    if path.suffix == ".txt":
        return ((where, {field: line.strip()}) for where, line in lines(path))
    if path.suffix == ".jsonl":
        return ((where, _object(where, line)) for where, line in lines(path))
    raise ValueError(f"prompts={source!r} ends in {path.suffix!r}; give {SOURCES}")


def _split_file(folder: Path, split: str) -> Path:
    names = [name.format(split) for name in SPLIT_FILES] + [GENEVAL] * (split == GENEVAL_SPLIT)
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise ValueError(f"prompts={str(folder)!r} has no split {split!r}: none of {', '.join(names)} is in the folder")
    if len(found) > 1:
        raise ValueError(f"prompts={str(folder)!r} has {' and '.join(found)} for the split {split!r}: name one of them")
    return folder / found[0]


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where it stands, line) of a file of text. Raises ValueError, with the line, for one that is not UTF-8."""
    # Not str.splitlines, which also breaks a prompt at U+2028 and the like.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if bad := _NOT_TEXT.search(line):
                byte = ord(bad[0]) & 0xFF  # surrogateescape has put it there
                raise ValueError(f"{where} is not UTF-8: it has the byte 0x{byte:02x}; save the file as UTF-8")
            yield where, line


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: {line.strip()!r:.500} is not JSON ({error}); write an object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {line.strip()!r} is no object; write one, with the prompt in a field")
    return record


def _from_tfds(source: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import tensorflow_datasets as tfds  # takes seconds, which other sources need not wait

    name, _, split = source.removeprefix(TFDS).rpartition("/")
    if not name or not split:
        raise ValueError(f"prompts={source!r} names no split; write tfds:NAME/split")
    folder = Path(name).expanduser()
    if folder.is_dir():
        builder = tfds.builder_from_directory(folder)
    else:
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()
    features = {key: feature for key, feature in builder.info.features.items() if feature.shape == ()}
    if field not in features:
        raise ValueError(f"prompts={source!r} has no text feature {field!r}; it has {', '.join(features)}")
    # Of a record, only the scalars are read: pictures are not wanted, and to decode them TFDS needs TensorFlow.
    scalars = tfds.features.FeaturesDict(features)
    records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    for i, record in enumerate(records):
        example = scalars.deserialize_example_np(record)
        where = f"{source}, element {i}"
        yield where, {key: _plain(where, key, value) for key, value in example.items()}


def _plain(where: str, key: str, value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {key} is not UTF-8 ({error}); write the data set anew") from None
    return value.item() if isinstance(value, np.generic) else value


def _prompt(where: str, record: dict[str, Any], field: str) -> Prompt:
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}, but {', '.join(record)}: name the prompt's")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {field}={text!r} is not text")
    if bad := _NOT_TEXT.search(text):
        raise ValueError(f"{where}: {field}={text!r} has {bad[0]!r}, which is no character; take it out")
    if not text.strip():
        raise ValueError(f"{where}: {field} is empty; give every line a prompt")
    return Prompt(text, {key: value for key, value in record.items() if key != field})
