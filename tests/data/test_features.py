import dataclasses
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixgrpo_jax.data import features
from mixgrpo_jax.data.features import Manifest, Split
from mixgrpo_jax.runtime import distributed

WIDTH, POOLED, LENGTH = 6, 3, 5
SHARED = np.arange(POOLED).astype(ml_dtypes.bfloat16)
MANIFEST = Manifest("s", "p", 10, 4, LENGTH, "keep", WIDTH, POOLED)


def elements(count=10, seed=0):
    """Elements whose features hold any 16 bits but those of a NaN."""
    rng = np.random.default_rng(seed)

    def random(*shape):
        return rng.integers(0, 0x7F80, shape, np.uint16).view(ml_dtypes.bfloat16)

    return [
        {
            "prompt": f"prompt {i % 7} – café",
            "metadata": {"i": i, "include": [{"class": "fox"}]},
            "length": 1 + i % LENGTH,
            "features": {"text": random(LENGTH, WIDTH), "pooled": random(POOLED), "negative_pooled": SHARED},
        }
        for i in range(count)
    ]


def write(folder, name="train", manifest=MANIFEST, seed=0):
    split, data = Split(folder, name, manifest), elements(manifest.count, seed)
    split.check()
    split.begin()
    for shard in split.missing():
        split.write(shard, [data[i] for i in manifest.shards[shard]])
    split.finish()
    return split


def assert_same(element, expected):
    assert {key: element[key] for key in ("prompt", "metadata", "length")} == {
        key: expected[key] for key in ("prompt", "metadata", "length")
    }
    for name, array in expected["features"].items():
        assert element["features"][name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(element["features"][name].view(np.uint16), array.view(np.uint16))


def test_elements_come_back_bit_for_bit_and_in_order(tmp_path):
    write(tmp_path)
    dataset = features.load("train", tmp_path)
    assert len(dataset) == 10
    for i, expected in enumerate(elements()):
        assert_same(dataset[i], expected)


def test_dropped_padding_is_read_as_zeros(tmp_path):
    write(tmp_path, manifest=dataclasses.replace(MANIFEST, padding="drop"))
    for element, expected in zip(features.load("train", tmp_path), elements()):
        expected["features"]["text"][expected["length"] :] = 0
        assert_same(element, expected)


def test_dropped_padding_takes_no_room(tmp_path):
    big = dataclasses.replace(MANIFEST, text_width=2**13)
    folders = {padding: tmp_path / padding for padding in features.PADDING}
    for padding, folder in folders.items():
        split, data = Split(folder, "train", dataclasses.replace(big, padding=padding)), elements()
        for element in data:
            element["features"]["text"] = np.ones((LENGTH, 2**13), ml_dtypes.bfloat16)
        split.begin()
        split.write(0, data[:4])  # of 1, 2, 3 and 4 tokens
    sizes = [sum(file.stat().st_size for file in folder.glob("features-*")) for folder in folders.values()]
    assert sizes[0] - sizes[1] == pytest.approx(2 * 2**13 * (4 * LENGTH - 10), rel=0.3)
    assert [dataclasses.replace(big, padding=padding).nbytes(2) for padding in features.PADDING] == [
        2 * (LENGTH * 2**13 + POOLED),
        2 * (2 * 2**13 + POOLED),
    ]


def test_tfds_opens_the_folder_without_tensorflow(tmp_path):
    imported = "tensorflow" in sys.modules  # by some other test
    split = write(tmp_path)
    builder = tfds.builder_from_directory(tmp_path)
    assert builder.info.splits["train"].shard_lengths == [4, 4, 2]
    assert builder.info.splits["train"].num_bytes == sum(split.path(shard).stat().st_size for shard in range(3))
    example = builder.as_data_source("train")[9]
    assert example["prompt"].decode() == elements()[9]["prompt"] and example["length"] == 5
    np.testing.assert_array_equal(example["text"].view(ml_dtypes.bfloat16), elements()[9]["features"]["text"])
    assert len(builder.as_data_source("train[2:6]")) == 4
    assert ("tensorflow" in sys.modules) == imported


def test_a_folder_holds_several_splits_and_shows_the_complete_ones(tmp_path):
    other = dataclasses.replace(MANIFEST, prompts="other", count=3, shard_size=2)
    begun = Split(tmp_path, "unfinished", MANIFEST)
    begun.begin()
    begun.write(0, elements(4))
    write(tmp_path)
    write(tmp_path, "test", other, seed=1)
    assert set(tfds.builder_from_directory(tmp_path).info.splits) == {"train", "test"}
    assert_same(features.load("test", tmp_path)[2], elements(3, seed=1)[2])
    assert_same(features.load("train", tmp_path)[2], elements()[2])


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    split = Split(tmp_path, "train", MANIFEST)
    split.begin()

    def interrupted():
        yield elements()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split.write(0, interrupted())
    assert {path.name for path in tmp_path.iterdir()} == {"manifest-train.json", features.SHARED}
    split.write(1, elements(4))
    assert split.missing() == [0, 2]


@pytest.mark.parametrize(
    "field, value",
    [("source", "t"), ("prompts", "q"), ("count", 11), ("shard_size", 5), ("max_length", 6), ("padding", "drop"),
     ("text_width", 7), ("pooled_width", 4), ("dtype", "float32"), ("negative_prompt", "grey")],
)  # fmt: skip
def test_what_a_split_was_begun_with_may_not_change(tmp_path, field, value):
    split = Split(tmp_path, "train", MANIFEST)
    split.begin()
    split.check()
    changed = dataclasses.replace(MANIFEST, **{field: value})
    with pytest.raises(ValueError, match=rf"manifest-train\.json has {field}=.*now {field}={value!r}"):
        Split(tmp_path, "train", changed).check()
    if field in features.BY_SPLIT:
        Split(tmp_path, "test", changed).check()
    else:
        with pytest.raises(ValueError, match=f"now {field}={value!r}"):
            Split(tmp_path, "test", changed).check()


@pytest.mark.parametrize("field, value", [("padding", "cut"), ("count", 0), ("shard_size", -1), ("max_length", 0)])
def test_a_manifest_that_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        dataclasses.replace(MANIFEST, **{field: value})


def test_a_split_has_a_plain_name(tmp_path):
    with pytest.raises(ValueError, match=r"split='train\[:5\]'"):
        Split(tmp_path, "train[:5]", MANIFEST)


def test_what_is_not_finished_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"holds no finished split of features.*mixgrpo_jax\.encode"):
        features.load("train", tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="no finished split 'test', but train"):
        features.load("test", tmp_path)


def test_batch_k_is_a_pure_function_of_seed_and_k(tmp_path):
    write(tmp_path)
    dataset = features.load("train", tmp_path)
    first, again, other = (features.batches(dataset, seed, 5) for seed in (0, 0, 1))
    batch, same = first[7], again[7]
    assert [m["i"] for m in batch["metadata"]] == [m["i"] for m in same["metadata"]]
    assert any([m["i"] for m in first[k]["metadata"]] != [m["i"] for m in other[k]["metadata"]] for k in range(4))
    assert batch["features"]["text"].shape == (5, LENGTH, WIDTH) and batch["features"]["pooled"].shape == (5, POOLED)
    assert batch["length"].dtype == np.int32
    data = elements()
    for row, metadata in enumerate(batch["metadata"]):
        element = {key: batch[key][row] for key in ("prompt", "metadata", "length")}
        element["features"] = {name: array[row] for name, array in batch["features"].items()}
        assert_same(element, data[metadata["i"]])


def test_every_epoch_is_a_new_permutation(tmp_path):
    write(tmp_path)
    batches = features.batches(features.load("train", tmp_path), 0, 5)
    epochs = [[m["i"] for k in range(2) for m in batches[2 * epoch + k]["metadata"]] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_has_every_prompt_once_also_where_batches_do_not_divide_it(tmp_path):
    write(tmp_path)
    batches = features.batches(features.load("train", tmp_path), 0, 4)
    read = [m["i"] for k in range(10) for m in batches[k]["metadata"]]
    epochs = [read[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_hosts_agree_on_the_batch_and_share_its_rows(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    epoch = []
    for k in range(2):
        drawn, scored = [], []
        for process in range(2):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            batch = features.batches(features.load("train", tmp_path), 0, 5)[k]  # each host has opened it anew
            drawn.append([m["i"] for m in batch["metadata"]])
            scored += [batch["metadata"][row]["i"] for row in distributed._own_rows(np.zeros(5))]
        assert drawn[0] == drawn[1] and sorted(scored) == sorted(drawn[0])
        epoch += scored
    assert sorted(epoch) == list(range(10))


def test_a_run_that_starts_again_reads_on_where_it_stopped(tmp_path):
    write(tmp_path)
    straight = features.batches(features.load("train", tmp_path), 3, 4)
    read = [straight[k]["metadata"] for k in range(8)]
    for stop in (1, 5):
        resumed = features.batches(features.load("train", tmp_path), 3, 4)
        assert [resumed[k]["metadata"] for k in range(stop, 8)] == read[stop:]


def test_batch_larger_than_the_data_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="batch_size=11"):
        features.batches(features.load("train", tmp_path), 0, 11)


def test_groups_are_the_kinds_that_a_list_of_prompts_names():
    assert features.groups({"tag": "counting", "include": [], "style": 3}) == {"tag": "counting", "style": "3"}
    assert features.groups({"number": "4270"}) == {}


def test_the_manifest_is_plain_json(tmp_path):
    write(tmp_path)
    assert json.loads((tmp_path / "manifest-train.json").read_text()) == dataclasses.asdict(MANIFEST)
