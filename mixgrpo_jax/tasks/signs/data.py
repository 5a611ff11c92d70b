"""Signs: small pictures of coloured plates with a number on them, and prompts that say which.

"a blue sign that says 4270 in white" is a blue plate of 16 x 48 pixels with white digits. Every property that the
prompt asks for can be checked exactly, so a model trained here can be scored by reading the text back and by looking
at the colours. The test split holds numbers and colour pairs that training never shows.
"""

import os
import zlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds
from transformers import PreTrainedTokenizerFast

from mixgrpo_jax.tasks import rendered
from mixgrpo_jax.tasks.rendered import batches as batches
from mixgrpo_jax.tasks.rendered import collate as collate
from mixgrpo_jax.tasks.signs.rendering import DARK, HEIGHT, LIGHT, PALETTE, WIDTH, Sign, render

NOISE = 130.0  # a photograph's noise is of any standard deviation up to this one, in levels of 255
PROMPT_LENGTH = 12  # the longest prompt: "a blue sign that says 4 2 7 0 in white </s>"

_PALETTE_RGB = np.array(list(PALETTE.values()), np.uint8)

# (plate, digits). Their mirror images stay in training, and with them every colour in either role.
TEST_PAIRS = (
    ("red", "white"),
    ("green", "yellow"),
    ("blue", "cyan"),
    ("purple", "pink"),
    ("white", "green"),
    ("yellow", "blue"),
    ("cyan", "purple"),
    ("pink", "black"),
)
TRAIN_PAIRS = tuple(
    pair for dark in DARK for light in LIGHT for pair in ((dark, light), (light, dark)) if pair not in TEST_PAIRS
)
LENGTH_WEIGHTS = (0.05, 0.15, 0.4, 0.4)  # of one to four digits, where a split has numbers of that length


def photograph(sign: Sign, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A sign as a data set would have it, by whatever light there was, with more or less noise.

    The recognition network misreads many such pictures, so a model that draws what the data show is no better, and one
    that learns from rewards can be.
    """
    return rendered.photograph(render(sign), NOISE, rng)


def is_test_number(number: str) -> bool:
    """Whether a number belongs to the test split: one in eight does, by a hash of its digits.

    The ten numbers of one digit all stay in training: they are too few to hold any out.
    """
    return len(number) > 1 and zlib.crc32(number.encode()) % 8 == 0


def numbers(split: str, length: int) -> list[str]:
    """The numbers of `length` digits that `split` may use, in order; no leading zero, except in "0" itself."""
    first = 0 if length == 1 else 10 ** (length - 1)
    return [n for n in map(str, range(first, 10**length)) if is_test_number(n) == (split == "test")]


def sample_signs(split: str, count: int, seed: int = 0) -> list[Sign]:
    """`count` signs drawn from the numbers and colour pairs of `split` ("train" or "test"); a pure function."""
    rng = rendered.generator(seed, split)
    pairs = TEST_PAIRS if split == "test" else TRAIN_PAIRS
    by_length = [numbers(split, length) for length in range(1, len(LENGTH_WEIGHTS) + 1)]
    weights = np.array(LENGTH_WEIGHTS) * [len(options) > 0 for options in by_length]
    lengths = rng.choice(len(by_length), size=count, p=weights / weights.sum())
    return [Sign(_pick(rng, by_length[i]), *_pick(rng, pairs)) for i in lengths]


def _pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


class SignsConfig(rendered.Sizes):
    """How many signs each split holds, and the seed that draws them."""


class Signs(rendered.Rendered):
    """TFDS builder of the rendered signs."""

    VERSION = tfds.core.Version("1.3.0")
    BUILDER_CONFIGS = (SignsConfig(name="full", description="20,000 training and 512 test signs."),)
    IMAGE_SIZE = (HEIGHT, WIDTH)
    TEXTS = ("prompt", "number", "plate", "digits")

    def examples(self, split: str, count: int, seed: int) -> Iterator[dict]:
        """Photographs of signs, and the same with less noise, with their prompts."""
        for key, sign in enumerate(sample_signs(split, count, seed)):
            pictures = photograph(sign, rendered.generator(seed, split, key))
            yield pictures | {"prompt": sign.prompt, **vars(sign)}


def load(split: str, data_dir: str | os.PathLike | None = None, config: str | SignsConfig = "full") -> grain.MapDataset:
    """The signs of `split`, by random access, built on first use.

    An element has `image` and `clean` (uint8 [16, 48, 3]), `prompt`, and `metadata`: what the rewards need to know,
    namely `number`, `plate`, `digits` (names of colours), `plate_rgb`, `digits_rgb` (uint8 [3]), and `palette` (uint8
    [9, 3]).

    The arguments are those of `rendered.load`.
    """
    return rendered.load(Signs, split, data_dir, config).map(_element)


def _element(example: dict) -> dict:
    prompt, number, plate, digits = (example[k].decode() for k in ("prompt", "number", "plate", "digits"))
    metadata = {"number": number, "plate": plate, "digits": digits}
    metadata |= {"plate_rgb": np.array(PALETTE[plate], np.uint8), "digits_rgb": np.array(PALETTE[digits], np.uint8)}
    images = {name: example[name] for name in rendered.PICTURES}
    return images | {"prompt": prompt, "metadata": metadata | {"palette": _PALETTE_RGB}}


def groups(metadata: dict) -> dict[str, str]:
    """What an element is counted under when scores are reported."""
    return {"length": str(len(metadata["number"])), "plate": metadata["plate"], "digits": metadata["digits"]}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the prompts: one token for each word and each digit, then </s>; pad 0, eos 1, unknown 2."""
    words = ["a", "sign", "that", "says", "in", *PALETTE, *"0123456789"]
    return rendered.word_tokenizer(words, PROMPT_LENGTH)
