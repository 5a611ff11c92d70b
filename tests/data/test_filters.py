import pytest

from mixgrpo_jax.data.filters import Filters
from mixgrpo_jax.data.prompts import Prompt

TEXTS = ["a red fox", "A Red-Haired fox!", "un café rouge", "狐狸", "a fox_trot", "fox"]


def kept(texts=TEXTS, **settings):
    return [prompt.text for prompt in Filters(**settings).apply([Prompt(text, {}) for text in texts])]


def word_list(tmp_path, *lines):
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        (dict(min_characters=9), [0, 1, 2, 4]),
        (dict(max_characters=9), [0, 3, 5]),
        (dict(min_characters=9, max_characters=9), [0]),
        (dict(min_words=3), [0, 1, 2]),
        (dict(max_words=1), [3, 5]),
        (dict(min_words=4, max_words=4), [1]),
        (dict(characters=" -~"), [0, 1, 4, 5]),  # ASCII
        (dict(characters=" -ÿ"), [0, 1, 2, 4, 5]),
        (dict(characters=r"^\u4e00-\u9fff"), [0, 1, 2, 4, 5]),
        (dict(characters=r"a-z_ \]\\"), [0, 4, 5]),
        (dict(min_words=3, characters=" -~"), [0, 1]),
    ],
)
def test_lengths_and_characters(settings, expected):
    assert kept(**settings) == [TEXTS[i] for i in expected]


def test_a_list_of_words_drops_or_keeps_whole_words_and_phrases_in_any_case(tmp_path):
    words = word_list(tmp_path, "FOX", "Café  Rouge")
    assert kept(drop_words=words) == ["狐狸", "a fox_trot"]
    assert kept(keep_words=words) == [TEXTS[i] for i in (0, 1, 2, 5)]
    phrases = word_list(tmp_path, "red fox", "red haired")
    assert kept(keep_words=phrases) == TEXTS[:2]
    assert kept(["red red fox", "red. fox", "redfox"], keep_words=phrases) == ["red red fox", "red. fox"]


def test_metadata_order_and_duplicates_stay():
    prompts = [Prompt("b", {"n": 1}), Prompt("a", {}), Prompt("long", {}), Prompt("b", {"n": 2})]
    assert Filters(max_characters=1).apply(prompts) == [prompts[i] for i in (0, 1, 3)]


def test_what_was_dropped_is_said_by_the_first_setting_that_does(capsys):
    kept(max_characters=12, min_words=2)
    assert capsys.readouterr().out == ("2 of 6 prompts are kept; dropped: 2 by max_characters=12, 2 by min_words=2\n")
    kept()
    assert capsys.readouterr().out == ""


def test_no_prompt_left_is_an_error():
    with pytest.raises(ValueError, match=r"no prompt is left of 6; dropped: 6 by min_words=9: loosen"):
        kept(min_words=9)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(min_words=-1), "min_words=-1 is negative; 0 is no limit"),
        (dict(max_characters=-5), "max_characters=-5 is negative"),
        (dict(min_words=7, max_words=3), "min_words=7 is above max_words=3"),
        (dict(characters="z-a"), r"characters='z-a' cannot be read .*' -~' for ASCII"),
        (dict(characters="a\\"), r"characters='a\\\\' cannot be read"),
        (dict(characters="a]b["), r"characters='a\]b\[' closes its brackets"),
        (dict(drop_words="nowhere.txt"), r"drop_words='nowhere\.txt' is no file; give one with a word"),
        (dict(keep_words="nowhere.txt"), r"keep_words='nowhere\.txt' is no file"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Filters(**settings)


def test_a_list_that_is_not_utf8_is_refused_by_its_line(tmp_path):
    (tmp_path / "words.txt").write_bytes("fox\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"words\.txt, line 2 is not UTF-8: it has the byte 0xe9; save"):
        Filters(keep_words=str(tmp_path / "words.txt"))


@pytest.mark.parametrize("lines, message", [((), "is empty"), (("fox", "--"), r"words\.txt, line 2: '--' has no word")])
def test_a_list_without_words_is_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=f"drop_words.*{message}"):
        Filters(drop_words=word_list(tmp_path, *lines))
