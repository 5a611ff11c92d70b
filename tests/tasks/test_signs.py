import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from mixgrpo_jax.tasks import rendered
from mixgrpo_jax.tasks.signs import data as signs
from mixgrpo_jax.tasks.signs.data import DARK, LIGHT, PALETTE, TEST_PAIRS, TRAIN_PAIRS, Sign, SignsConfig


@pytest.fixture(scope="module")
def config():
    return SignsConfig(name="small", train=96, test=16)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("signs")


@pytest.fixture(scope="module")
def train(data_dir, config):
    imported = "tensorflow" in sys.modules  # by some other test
    dataset = signs.load("train", data_dir, config)
    assert dataset[0] and ("tensorflow" in sys.modules) == imported
    return dataset


def test_splits_share_no_number_and_no_colour_pair():
    assert set(TRAIN_PAIRS).isdisjoint(TEST_PAIRS)
    assert len(TRAIN_PAIRS) == 32 and len(set(TEST_PAIRS)) == 8
    for length in range(1, 5):
        train, test = signs.numbers("train", length), signs.numbers("test", length)
        assert set(train).isdisjoint(test)
        assert len(train) + len(test) == (10 if length == 1 else 9 * 10 ** (length - 1))
        assert 0.09 < len(test) / len(train + test) < 0.15 or (length == 1 and not test)


def test_training_shows_every_colour_in_both_roles_and_pairs_dark_with_light():
    plates, digits = zip(*TRAIN_PAIRS)
    assert set(plates) == set(digits) == set(PALETTE)
    assert all((plate in DARK) == (digit in LIGHT) for plate, digit in TRAIN_PAIRS + TEST_PAIRS)


@pytest.mark.parametrize("split, pairs", [("train", TRAIN_PAIRS), ("test", TEST_PAIRS)])
def test_samples_keep_to_their_split(split, pairs):
    drawn = signs.sample_signs(split, 400)
    assert all((sign.plate, sign.digits) in pairs for sign in drawn)
    assert all(signs.is_test_number(sign.number) == (split == "test") for sign in drawn)
    assert all(sign.number == str(int(sign.number)) for sign in drawn)


def test_samples_are_a_pure_function_of_the_seed_with_longer_numbers_more_frequent():
    drawn = signs.sample_signs("train", 2000)
    assert drawn == signs.sample_signs("train", 2000)
    assert drawn != signs.sample_signs("train", 2000, seed=1)
    lengths = np.bincount([len(sign.number) for sign in drawn])[1:] / len(drawn)
    np.testing.assert_allclose(lengths, signs.LENGTH_WEIGHTS, atol=0.04)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='valid'"):
        signs.sample_signs("valid", 1)


@pytest.mark.parametrize("number", ["0", "27", "358", "8888"])
def test_picture_is_a_plate_with_centred_digits(number):
    image = signs.render(Sign(number, "blue", "white"))
    assert image.shape == (16, 48, 3) and image.dtype == np.uint8
    assert (image[[0, -1]] == PALETTE["blue"]).all() and (image[:, [0, -1]] == PALETTE["blue"]).all()
    assert (image == PALETTE["white"]).all(-1).sum() > 10 * len(number)
    inked = np.flatnonzero((image != PALETTE["blue"]).any((0, 2)))
    assert abs(inked.min() + inked.max() - 47) <= 2


def test_digits_do_not_move_with_their_neighbours():
    cell = slice(24, 36)
    a, b = (signs.render(Sign(number, "red", "yellow"))[:, cell] for number in ("1171", "8878"))
    np.testing.assert_array_equal(a, b)


def test_data_set_holds_what_was_drawn(train, data_dir, config):
    assert len(train) == 96 and len(signs.load("test", data_dir, config)) == 16
    stored = {element["prompt"] for element in train}
    assert stored == {sign.prompt for sign in signs.sample_signs("train", 96)}


def test_elements_carry_picture_prompt_and_what_the_rewards_need(train):
    element = train[7]
    metadata = element["metadata"]
    sign = Sign(metadata["number"], metadata["plate"], metadata["digits"])
    assert element["prompt"] == sign.prompt
    noise, less = (element[name].astype(float) - signs.render(sign) for name in ("image", "clean"))
    unclipped = (element["image"] > 0) & (element["image"] < 255)
    assert 0 < noise[unclipped].std() < 1.1 * signs.NOISE
    np.testing.assert_allclose(less[unclipped], rendered.CLEAN * noise[unclipped], atol=1)
    assert tuple(metadata["plate_rgb"]) == PALETTE[sign.plate]
    assert tuple(metadata["digits_rgb"]) == PALETTE[sign.digits]
    assert metadata["palette"].shape == (9, 3)


def test_photographs_are_addressed_by_their_generator():
    sign = Sign("42", "blue", "white")
    one, same, other = (signs.photograph(sign, np.random.default_rng(seed))["image"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.5
    errors = [
        np.abs(signs.photograph(sign, np.random.default_rng(s))["image"] - 1.0 * signs.render(sign)).std()
        for s in range(20)
    ]
    assert min(errors) < 10 < 30 < max(errors)  # some are clean, some are bad


def test_second_load_reads_what_the_first_one_wrote(train, data_dir, config, monkeypatch):
    monkeypatch.setattr(signs.Signs, "download_and_prepare", lambda self: pytest.fail("built twice"))
    assert signs.load("train", data_dir, config)[3]["prompt"] == train[3]["prompt"]


def test_a_home_that_cannot_be_written_is_named_with_the_remedy(config, monkeypatch):
    monkeypatch.delenv("MIXGRPO_JAX_DATA", raising=False)
    monkeypatch.setenv("HOME", "/proc/self")
    message = "cannot be written to /proc/self/.cache/mixgrpo_jax .*set data.folder, or MIXGRPO_JAX_DATA"
    with pytest.raises(ValueError, match=message):
        signs.load("train", None, config)
    with pytest.raises(ValueError, match="cannot be written to /proc/self/data"):
        signs.load("train", "/proc/self/data", config)


def test_another_process_may_finish_the_same_build_first(tmp_path, config, monkeypatch):
    build = signs.Signs.download_and_prepare

    def build_second(self):
        monkeypatch.setattr(signs.Signs, "download_and_prepare", build)
        signs.load("train", tmp_path, config)
        build(self)

    monkeypatch.setattr(signs.Signs, "download_and_prepare", build_second)
    assert len(signs.load("train", tmp_path, config)) == 96
    assert [path.name for path in tmp_path.iterdir()] == ["signs"]


def test_batch_k_is_a_pure_function_of_seed_and_k(train):
    first, again, other = (signs.batches(train, seed, 8) for seed in (0, 0, 1))
    assert first[31]["prompt"] == again[31]["prompt"] != other[31]["prompt"]
    np.testing.assert_array_equal(first[31]["image"], again[31]["image"])
    assert first[31]["image"].shape == (8, 16, 48, 3)
    assert [m["number"] in p for m, p in zip(first[31]["metadata"], first[31]["prompt"])] == [True] * 8


def test_every_epoch_is_a_new_permutation(train):
    batches = signs.batches(train, 0, 8)
    epochs = [[p for k in range(12) for p in batches[12 * epoch + k]["prompt"]] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(element["prompt"] for element in train)
    assert epochs[0] != epochs[1]


def test_batch_larger_than_the_data_is_refused(train):
    with pytest.raises(ValueError, match="batch_size=97"):
        signs.batches(train, 0, 97)


def test_tokenizer_round_trip(tmp_path):
    tokenizer = signs.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompts = [sign.prompt for sign in signs.sample_signs("test", 20)]
    padding = {"padding": "max_length", "max_length": signs.PROMPT_LENGTH}
    assert loaded(prompts, **padding)["input_ids"] == tokenizer(prompts, **padding)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert len(loaded) <= 64


def test_every_prompt_fits_ends_with_eos_and_has_no_unknown_word():
    tokenizer = signs.build_tokenizer()
    for sign in signs.sample_signs("train", 300):
        ids = tokenizer(sign.prompt)["input_ids"]
        assert len(ids) == 8 + len(sign.number) <= signs.PROMPT_LENGTH
        assert ids[-1] == 1 and 2 not in ids
    assert tokenizer.tokenize("a blue sign that says 4270 in white")[5:9] == ["4", "2", "7", "0"]
    assert tokenizer("a teal sign")["input_ids"][1] == 2
