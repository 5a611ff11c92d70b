"""Prompts from a text file, a JSON-lines file or a TFDS data set, in their order, duplicates included."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

TFDS = "tfds:"


class Prompt(NamedTuple):
    """A prompt, and what its rewards need to know: values that JSON can hold, by name."""

    text: str
    metadata: dict[str, Any]


def read(source: str, field: str = "prompt") -> list[Prompt]:
    """The prompts of a source; a prompt's id is its position.

    Args:
        source: a .txt file with a prompt a line; a .jsonl file with an object a line; or "tfds:NAME/split", where NAME
            is a registered data set or a folder that TFDS wrote. A split may be a slice, "train[:1000]".
        field: the objects' field that holds the prompt; the other fields are the prompt's metadata. Of a TFDS data set,
            only scalars (text, numbers, labels) are.

    Raises:
        ValueError: no such source, no prompts in it, or a prompt that is missing, empty or not text, by its line.
    """
    prompts = [_prompt(where, record, field) for where, record in _records(source, field)]
    if not prompts:
        raise ValueError(f"prompts={source!r} holds no prompt")
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts, their metadata and their order, in hexadecimal."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(json.dumps(prompt, sort_keys=True).encode() + b"\n")
    return sha.hexdigest()


def _records(source: str, field: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where it stands, {field: prompt, ...}) of every prompt."""
    if source.startswith(TFDS):
        return _from_tfds(source, field)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"prompts={source!r} is no file; give a .txt or .jsonl file, or tfds:NAME/split")
    if path.suffix == ".txt":
        return ((where, {field: line.strip()}) for where, line in _lines(path))
    if path.suffix == ".jsonl":
        return ((where, _object(where, line)) for where, line in _lines(path))
    raise ValueError(f"prompts={source!r} ends in {path.suffix!r}; give a .txt or .jsonl file, or tfds:NAME/split")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    # Not str.splitlines, which also breaks a prompt at U+2028 and the like.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            yield f"{path}, line {number}", line


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {line.strip()!r} is not JSON ({error}); write an object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {line.strip()!r} is no object; write one, with the prompt in a field")
    return record


def _from_tfds(source: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
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
        yield f"{source}, element {i}", {key: _plain(value) for key, value in example.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def _prompt(where: str, record: dict[str, Any], field: str) -> Prompt:
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}, but {', '.join(record)}: name the prompt's")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {field}={text!r} is not text")
    if not text.strip():
        raise ValueError(f"{where}: {field} is empty; give every line a prompt")
    return Prompt(text, {key: value for key, value in record.items() if key != field})
