"""ImageReward v1.0: how well people would like the picture for its prompt, by BLIP's towers on the device."""

import os
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from mixgrpo_jax.models import blip
from mixgrpo_jax.models.blip import BLIPConfig
from mixgrpo_jax.models.io import hub, torch_io
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.on_device import Options, build
from mixgrpo_jax.rewards.preprocess import preprocess

V1 = blip.image_reward_v1()
LENGTH = 35  # tokens of a prompt, with those for its start and end

# Mean and standard deviation of the head's output over the release's own pictures.
MEAN, STD = 0.16717362830052426, 1.0333394966054072


def score(
    params: blip.Params,
    images: jax.typing.ArrayLike,
    tokens: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    config: BLIPConfig = V1,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """(w . f(image, text) + b - MEAN) / STD, fp32 [B], with f the pair's feature and w, b the head; about N(0, 1).

    Differentiable with respect to float images.

    Args:
      params: as `blip.load` gives them.
      images: [B, H, W, 3], uint8 or float from 0 to 255. The shorter side is resized to the towers' image size, and the
        centre is cut out of the longer one.
      tokens: ids [B, L], int32.
      mask: [B, L], 1 for text and 0 for padding.
      config: the sizes of `params`.
      dtype: dtype of the towers' matmuls.
    """
    pixels = preprocess(images, config.vision.image_size)
    features = blip.apply(config, params, pixels, jnp.asarray(tokens), jnp.asarray(mask), dtype).astype(jnp.float32)
    # A sum, because products of matrices are rounded to bf16 on a TPU.
    preference = jnp.sum(features * params["head"]["kernel"][:, 0], -1) + params["head"]["bias"]
    return (preference - MEAN) / STD


def image_reward(
    weights: str | os.PathLike | None,
    tokenizer: str | os.PathLike | None,
    *,
    config: BLIPConfig = V1,
    **options: Unpack[Options],
) -> Reward:
    """ImageReward v1.0, some -2 to 2, in fp32 unless the options say otherwise.

    A prompt is cut at 35 tokens, as in training.

    Args:
      weights: ImageReward.pt as released, or its tensors by the same names in a .safetensors file. With None for
        weights and tokenizer, parameters are shapes, see `OnDevice.lower`.
      tokenizer: folder of the tokenizer of bert-base-uncased.
      config: sizes of the towers.
      options: see `rewards.on_device.Options`.

    Raises:
      ValueError: files that are absent, or that do not fit the config, or a probe that fails; the message names them.
    """
    dtype = jnp.dtype(options.get("dtype", jnp.float32))
    words = load_tokenizer(tokenizer, config) if tokenizer else None
    params = blip.load(config, torch_io.read_weights(weights), dtype) if weights else blip.shapes(config, dtype)

    def run(params: blip.Params, images: jax.Array, text: tuple[np.ndarray, np.ndarray]) -> jax.Array:
        return score(params, images, *text, config=config, dtype=dtype)

    return build("image_reward", run, params, lambda prompts, metadata: tokenize(words, prompts), options)


def load_tokenizer(folder: str | os.PathLike, config: BLIPConfig) -> transformers.BertTokenizer:
    """BERT's tokenizer in a folder, or on the hub: tokenizer.json or vocab.txt.

    Raises ValueError where the folder has neither, or more words than the model has embeddings.
    """
    folder = hub.local(folder, "tokenizer", *hub.TOKENIZER)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise ValueError(f"there is no vocab.txt or tokenizer.json in {folder}: give bert-base-uncased's tokenizer")
    words = transformers.BertTokenizer.from_pretrained(folder)
    if len(words) > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(words)} words, and the model embeds {config.text.vocab_size}: "
            "give bert-base-uncased's"
        )
    return words


def tokenize(words: transformers.BertTokenizer | None, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of prompts, int32 [B, 35]: [CLS], the text, [SEP], cut or padded to that length; or all 0."""
    if words is None:
        return (np.zeros((len(prompts), LENGTH), np.int32),) * 2
    rows = words(prompts, padding="max_length", truncation=True, max_length=LENGTH)
    return np.asarray(rows["input_ids"], np.int32), np.asarray(rows["attention_mask"], np.int32)
