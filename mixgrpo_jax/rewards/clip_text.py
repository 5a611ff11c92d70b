"""Prompts as CLIP's token ids, by a released tokenizer."""

import html
import os
from collections.abc import Callable, Sequence

import ftfy
import numpy as np
import transformers

from mixgrpo_jax.models.clip.text import CLIPTextConfig
from mixgrpo_jax.models.io import hub

Tokenize = Callable[[Sequence[str]], np.ndarray]


def load_tokenizer(
    folder: str | os.PathLike | None, config: CLIPTextConfig, clean: Callable[[str], str] = lambda text: text
) -> Tokenize:
    """`tokenize(prompts) -> ids`, int32 [B, max_position_embeddings], with CLIP's byte-pair encoding.

    Ids are <|startoftext|>, the text's, <|endoftext|> and padding; a longer text is cut and keeps its end.

    Args:
        folder: as transformers saves a tokenizer, with tokenizer.json, or vocab.json and merges.txt; or a model's name
            on the hub. With None, all ids are 0.
        config: the text encoder that the ids are for.
        clean: what is done to each prompt before.

    Raises:
        ValueError: no such folder, or a tokenizer whose ids are not the encoder's.
    """
    length = config.max_position_embeddings
    if folder is None:
        return lambda prompts: np.zeros((len(prompts), length), np.int32)
    folder = hub.local(folder, "tokenizer", *hub.TOKENIZER)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(
            f"there is no CLIP tokenizer in {folder}: give a folder with tokenizer.json, or with vocab.json and "
            "merges.txt, such as that of openai/clip-vit-large-patch14; all models here share it"
        )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if (end := tokenizer.eos_token_id) != config.eos_token_id or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder} has {len(tokenizer)} tokens and ends text by {end}, and the encoder has vocab_size="
            f"{config.vocab_size} and eos_token_id={config.eos_token_id}: it is the tokenizer of another model"
        )

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        texts = [clean(prompt) for prompt in prompts]
        return np.array(
            tokenizer(texts, padding="max_length", max_length=length, truncation=True)["input_ids"], np.int32
        )

    return tokenize


def mended(text: str) -> str:
    """What open_clip does to text before: broken encodings and curly quotes mended, HTML's entities resolved."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
