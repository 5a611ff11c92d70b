"""What tasks share whose pictures are rendered from their prompts: a TFDS builder, batches, a tokenizer."""

import abc
import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
import tokenizers
from absl import logging
from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "test")
CLEAN = 0.5
PICTURES = {"image": 1.0, "clean": CLEAN}  # what an element has, and the share of its noise that is left in each


@dataclass(eq=False, kw_only=True)
class Sizes(tfds.core.BuilderConfig):
    """How many pictures each split holds, and the seed that draws them."""

    train: int = 20_000
    test: int = 512
    seed: int = 0


class Rendered(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS builder of rendered pictures; writes array_record, and needs no TensorFlow.

    A task's own builder says how large they are, which texts come with a picture, and makes the examples.
    """

    url_infos = None  # nothing to download; to look for checksums, TFDS imports a package that it does not require
    IMAGE_SIZE: tuple[int, int]  # rows, columns
    TEXTS: tuple[str, ...]  # features beside the images

    @abc.abstractmethod
    def examples(self, split: str, count: int, seed: int) -> Iterable[dict]:
        """`count` examples of a split, each {PICTURES: uint8 [H, W, 3], and TEXTS}; a pure function."""

    def _log_download_bytes(self) -> None:  # nothing is downloaded
        pass

    _log_download_done = _log_download_bytes

    def _info(self) -> tfds.core.DatasetInfo:
        # A zlib-coded tensor, because the Image feature decodes PNG by TensorFlow.
        image = tfds.features.Tensor(shape=(*self.IMAGE_SIZE, 3), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB)
        texts = {name: tfds.features.Text() for name in self.TEXTS}
        features = tfds.features.FeaturesDict(dict.fromkeys(PICTURES, image) | texts)
        return tfds.core.DatasetInfo(builder=self, description=sys.modules[self.__module__].__doc__, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {split: self._generate_examples(split, getattr(self.builder_config, split)) for split in SPLITS}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        return enumerate(self.examples(split, count, self.builder_config.seed))


def generator(seed: int, split: str, *key: int) -> np.random.Generator:
    """The random numbers of a split, or of one of its elements by `key`. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: use 'train' or 'test'")
    return np.random.default_rng([seed, split == "test", *key])


def load(
    builder: type[Rendered], split: str, data_dir: str | os.PathLike | None = None, config: str | Sizes = "full"
) -> grain.MapDataset:
    """The examples of `split`, by random access, built on first use.

    Args:
        builder: the task's.
        split: "train" or "test".
        data_dir: where the data set lives; by default $MIXGRPO_JAX_DATA, or else ~/.cache/mixgrpo_jax.
        config: "full", or sizes of one's own.

    Raises:
        ValueError: the data set is not there yet, and the folder cannot be written.
    """
    data_dir = Path(data_dir or os.environ.get("MIXGRPO_JAX_DATA", "~/.cache/mixgrpo_jax"))
    return grain.MapDataset.source(_build(builder, data_dir, config).as_data_source(split))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's warnings of folders that hold no data set yet."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@_quiet()
def _build(builder_type: type[Rendered], data_dir: Path, config: str | Sizes) -> Rendered:
    builder_in = functools.partial(builder_type, config=config, file_format="array_record")
    try:
        data_dir = data_dir.expanduser()
        builder = builder_in(data_dir=data_dir)
        if builder.is_prepared():
            return builder
        data_dir.mkdir(parents=True, exist_ok=True)
        begun = tempfile.TemporaryDirectory(dir=data_dir)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise ValueError(
            f"the data set cannot be written to {data_dir} ({error}): set data.folder, or MIXGRPO_JAX_DATA in the "
            "environment, to a folder that can be written"
        ) from None
    # Several processes may get here at once: each builds its own, and the first to finish puts it in place.
    with begun as scratch:
        tfds.disable_progress_bar()  # a command tells by itself what it does
        fresh = builder_in(data_dir=scratch)
        fresh.download_and_prepare()
        target = Path(builder.data_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            Path(fresh.data_dir).rename(target)
        except OSError:
            if not builder.is_prepared():
                raise
    return builder_in(data_dir=data_dir)


def batches(dataset: grain.MapDataset, seed: int, batch_size: int) -> grain.MapDataset:
    """Endless batches, shuffled anew in every epoch; batch k is `batches(...)[k]`, a pure function of (seed, k).

    A batch has `image` and `clean` (uint8 [B, H, W, 3]), `prompt` (B strings) and `metadata` (B dicts).
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(f"batch_size={batch_size} does not fit a data set of {len(dataset)}: use 1 to {len(dataset)}")
    return dataset.seed(seed).shuffle().repeat().batch(batch_size, batch_fn=collate)


def collate(elements: list[dict]) -> dict:
    """Elements of the data set as a batch: pictures stacked, the rest as lists."""
    columns = {key: [element[key] for element in elements] for key in elements[0]}
    return columns | {name: np.stack(columns[name]) for name in PICTURES}


def photograph(picture: np.ndarray, most: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A picture with noise of a standard deviation up to `most`, in levels of 255: PICTURES, each uint8 [H, W, 3]."""
    noise = rng.uniform(0, most) * rng.standard_normal(picture.shape)
    return {
        name: np.clip(np.rint(picture + share * noise), 0, 255).astype(np.uint8) for name, share in PICTURES.items()
    }


def word_tokenizer(words: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Tokenizer with one token for each of `words` and each digit among them, then </s>; pad 0, eos 1, unknown 2."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    split = tokenizers.pre_tokenizers
    model.pre_tokenizer = split.Sequence([split.Whitespace(), split.Digits(individual_digits=True)])
    model.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        chat_template="{{ messages[0].content }}",  # for encoders that read chats
    )
