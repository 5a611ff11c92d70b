import functools
import json
import sys

import pytest
import tensorflow_datasets as tfds

from mixgrpo_jax.data import prompts
from mixgrpo_jax.data.prompts import Prompt
from mixgrpo_jax.tasks.signs import data as signs


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def signs_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    signs.load("train", folder, signs.SignsConfig(name="small", train=8, test=4))
    return folder / "signs" / "small" / str(signs.Signs.VERSION)


def test_a_text_file_keeps_order_duplicates_and_every_character_but_the_ends(tmp_path):
    lines = ["a red fox", "un café, s'il vous plaît", "a red fox", 'a\u2028line "quoted"\tand tabbed', "{1: 2}"]
    path = write(tmp_path / "prompts.txt", "\ufeff" + "\r\n".join(lines) + " \n")
    assert prompts.read(path) == [Prompt(line, {}) for line in lines]


def test_a_last_line_without_a_newline_counts(tmp_path):
    assert len(prompts.read(write(tmp_path / "prompts.txt", "one\ntwo"))) == 2


def test_json_lines_carry_the_other_fields_to_the_rewards(tmp_path):
    records = [
        {"tag": "counting", "include": [{"class": "fox", "count": 2}], "prompt": "two foxes"},
        {"prompt": " as it stands ", "caption": "another"},
    ]
    path = write(tmp_path / "prompts.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    first, second = prompts.read(path)
    assert first == Prompt("two foxes", {"tag": "counting", "include": [{"class": "fox", "count": 2}]})
    assert second == Prompt(" as it stands ", {"caption": "another"})


@pytest.mark.parametrize("field", ["caption", "text"])
def test_the_prompt_may_be_in_another_field(tmp_path, field):
    path = write(tmp_path / "prompts.jsonl", json.dumps({field: "a fox", "prompt": 3}))
    assert prompts.read(path, field) == [Prompt("a fox", {"prompt": 3})]


def test_a_tfds_folder_gives_its_text_and_its_scalars_without_tensorflow(signs_folder):
    imported = "tensorflow" in sys.modules  # by some other test
    read = prompts.read(f"tfds:{signs_folder}/train")
    expected = signs.load("train", signs_folder.parents[2], signs.SignsConfig(name="small", train=8, test=4))
    assert [prompt.text for prompt in read] == [element["prompt"] for element in expected]
    for prompt, element in zip(read, expected):
        assert prompt.metadata == {key: element["metadata"][key] for key in ("number", "plate", "digits")}
    assert ("tensorflow" in sys.modules) == imported


def test_a_registered_tfds_data_set_is_built_and_may_be_sliced(tmp_path, monkeypatch):
    small = signs.SignsConfig(name="full", train=6, test=2)
    monkeypatch.setattr(signs.Signs, "BUILDER_CONFIGS", (small,))
    monkeypatch.setattr(tfds, "builder", functools.partial(tfds.builder, data_dir=tmp_path))
    whole, part = (prompts.read(f"tfds:signs/{split}", "number") for split in ("train", "train[2:4]"))
    assert len(whole) == 6 and part == whole[2:4]
    assert all(prompt.text in prompt.metadata["prompt"] for prompt in whole)


GENEVAL_LINE = {"tag": "two_object", "include": [{"class": "fox", "count": 1}], "exclude": [], "prompt": "a fox"}


@pytest.mark.parametrize(
    "file, split",
    [
        ("prompts/evaluation_metadata.jsonl", "test"),  # GenEval's repository
        ("test_metadata.jsonl", "test"),  # flow_grpo's GenEval
        ("train_metadata.jsonl", "train"),
        ("train.jsonl", "train"),
    ],
)
def test_a_folder_of_json_lines_is_read_by_split(tmp_path, file, split):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    write(tmp_path / file, json.dumps(GENEVAL_LINE) + "\n")
    metadata = {key: GENEVAL_LINE[key] for key in ("tag", "include", "exclude")}
    assert prompts.read(str(tmp_path), split=split) == [Prompt("a fox", metadata)]
    other = {"train": "test", "test": "train"}[split]
    with pytest.raises(
        ValueError, match=rf"has no split '{other}': none of {other}_metadata\.jsonl.* is in the folder"
    ):
        prompts.read(str(tmp_path), split=other)


def test_a_folder_of_text_files_is_read_by_split(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.txt", f"a {split} of one\na {split} of two\n")
        assert [p.text for p in prompts.read(str(tmp_path), split=split)] == [
            f"a {split} of {n}" for n in ("one", "two")
        ]


def test_a_folder_with_two_files_for_a_split_is_ambiguous(tmp_path):
    write(tmp_path / "train.txt", "a fox\n")
    write(tmp_path / "train_metadata.jsonl", json.dumps(GENEVAL_LINE))
    with pytest.raises(ValueError, match=r"has train_metadata\.jsonl and train\.txt for the split 'train': name one"):
        prompts.read(str(tmp_path))
    assert len(prompts.read(str(tmp_path / "train.txt"))) == 1


def test_the_digest_tells_text_metadata_and_order_apart():
    two = [Prompt("a", {"n": 1}), Prompt("b", {})]
    others = [two[::-1], two[:1], [Prompt("a", {"n": 2}), two[1]], [Prompt("a", {}), two[1]]]
    assert prompts.digest(two) == prompts.digest([Prompt("a", {"n": 1}), Prompt("b", {})])
    assert len({prompts.digest(some) for some in [two, *others]}) == 5


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "one\n\nthree\n", r"a\.txt, line 2: prompt is empty"),
        ("a.txt", "one\n \t\n", r"line 2: prompt is empty"),
        ("a.txt", "", "holds no prompt"),
        ("a.csv", "one\n", r"ends in '\.csv'.*\.jsonl"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', "line 2: prompt is empty"),
        ("a.jsonl", '{"prompt": "a"}\n\n', "line 2: '' is not JSON"),
        ("a.jsonl", '{"prompt": "a"', "line 1: .* is not JSON"),
        ("a.jsonl", '["a"]', "line 1: .* is no object"),
        ("a.jsonl", '{"caption": "a", "id": 3}', "no field 'prompt', but caption, id"),
        ("a.jsonl", '{"prompt": 3}', "prompt=3 is not text"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        prompts.read(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "a red fox\na cat\n".encode("utf-16"), "line 1 is not UTF-8: it has the byte 0xff; save the file as"),
        ("a.txt", "a red fox\na cat\n".encode("utf-16-le"), "line 1 is not UTF-8: it has the byte 0x00"),
        ("a.txt", "a cat\nun café\n".encode("latin-1"), r"a\.txt, line 2 is not UTF-8: it has the byte 0xe9"),
        ("a.jsonl", '{"prompt": "un café"}'.encode("latin-1"), r"a\.jsonl, line 1 is not UTF-8"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": "fox \\ud83d"}',
            r"line 2: prompt=.* has '\\ud83d', which is no char",
        ),
        ("a.jsonl", b"[" * 100_000, r"line 1: .* is not JSON \(maximum recursion"),
    ],
)
def test_what_is_not_utf8_is_refused_by_its_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prompts.read(str(tmp_path / name))


def test_a_whole_emoji_in_json_is_text(tmp_path):
    assert prompts.read(write(tmp_path / "a.jsonl", r'{"prompt": "fox \ud83e\udd8a"}')) == [
        Prompt("fox \U0001f98a", {})
    ]


def test_a_data_set_that_is_not_utf8_says_where():
    with pytest.raises(ValueError, match="tfds:x/train, element 3: prompt is not UTF-8"):
        prompts._plain("tfds:x/train, element 3", "prompt", b"caf\xe9")


def test_sources_that_are_not_there_are_named(signs_folder):
    with pytest.raises(ValueError, match=r"prompts='nowhere\.txt' is not there; give a \.txt"):
        prompts.read("nowhere.txt")
    with pytest.raises(ValueError, match="names no split"):
        prompts.read("tfds:signs")
    with pytest.raises(ValueError, match=r"no text feature 'caption'.*prompt"):
        prompts.read(f"tfds:{signs_folder}/train", "caption")
