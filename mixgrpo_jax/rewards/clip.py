"""How well a picture matches its prompt, by the angle between CLIP's two embeddings: HPS-v2.1, PickScore, CLIPScore.

Weights load from the layout of open_clip or of transformers, whichever a file has, as safetensors or by torch.save.
With None for weights and tokenizer, a reward has shapes for parameters, and can only be lowered (`OnDevice.lower`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp

from mixgrpo_jax.models import clip
from mixgrpo_jax.models.clip import CLIPConfig, open_clip
from mixgrpo_jax.models.io.torch_io import read_weights
from mixgrpo_jax.rewards.clip_text import Tokenize, load_tokenizer, mended
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.on_device import Options, build
from mixgrpo_jax.rewards.preprocess import preprocess

File = str | os.PathLike  # or a folder of one

# Of PickScore, as (score - shift) / divisor.
NORMALISATIONS = {None: (0.0, 1.0), "flow_grpo": (0.0, 26.0), "mixgrpo": (18.0, 8.0)}


@dataclass(frozen=True)
class Similarity:
    """(a cos(image, text) - shift) / divisor, with a = exp(logit_scale) or 1.

    A pure function `(params, images, tokens) -> scores`, fp32 [B], of images [B, H, W, 3] and ids [B, L]. It is
    differentiable in float images, from 0 to 255, which are neither rounded nor clipped on their way.
    """

    config: CLIPConfig
    resize: Literal["crop", "squash"] = "crop"
    method: Literal["cubic", "linear"] = "cubic"
    rounded: bool = True
    scaled: bool = False
    shift: float = 0.0
    divisor: float = 1.0
    dtype: Any = jnp.bfloat16

    def __call__(self, params: clip.Params, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """Scores [B]."""
        size = self.config.vision.image_size
        pixels = preprocess(images, size, resize=self.resize, method=self.method, rounded=self.rounded)
        image = clip.embed_images(self.config, params, pixels, self.dtype)
        text = clip.embed_text(self.config, params, tokens, self.dtype)
        scale = jnp.exp(params[clip.LOGIT_SCALE]) if self.scaled else 1.0
        return (scale * jnp.sum(image * text, axis=-1) - self.shift) / self.divisor


def hps(
    weights: File | None, tokenizer: File | None, *, config: CLIPConfig | None = None, **options: Unpack[Options]
) -> Reward:
    """HPS-v2.1: cos(image, text), some 0.2 to 0.35.

    Args:
        weights: HPS_v2.1_compressed.pt, or the same tensors as safetensors; a file, or a folder of one.
        tokenizer: folder of CLIP's tokenizer.
        config: another model than ViT-H/14.
        options: see `Options`.

    Raises:
        ValueError: weights or a tokenizer that do not fit, or a probe that fails.
    """
    score = Similarity(config or clip.clip_h14(), rounded=False, dtype=options.get("dtype", jnp.bfloat16))
    return _build("hps", score, weights, _open_clip_tokenizer(tokenizer, score), options)


def pickscore(
    weights: File | None,
    tokenizer: File | None,
    *,
    normalise: Literal["flow_grpo", "mixgrpo"] | None = None,
    config: CLIPConfig | None = None,
    **options: Unpack[Options],
) -> Reward:
    """PickScore: s = exp(logit_scale) cos(image, text), some 15 to 26, or a function of it.

    Args:
        weights: those of yuvalkirstain/PickScore_v1, a file or a folder.
        tokenizer: folder of CLIP's tokenizer.
        normalise: None is s itself, "flow_grpo" s / 26, and "mixgrpo" (s - 18) / 8.
        config: another model than ViT-H/14.
        options: see `Options`.

    Raises:
        ValueError: an unknown normalisation, weights or a tokenizer that do not fit, or a probe that fails.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise={normalise!r} is unknown: choose one of {tuple(NORMALISATIONS)}")
    shift, divisor = NORMALISATIONS[normalise]
    dtype = options.get("dtype", jnp.bfloat16)
    score = Similarity(config or clip.clip_h14(), scaled=True, shift=shift, divisor=divisor, dtype=dtype)
    return _build("pickscore", score, weights, load_tokenizer(tokenizer, score.config.text), options)


def clipscore(
    weights: File | None,
    tokenizer: File | None,
    *,
    model: Literal["dfn", "openai"] = "dfn",
    config: CLIPConfig | None = None,
    **options: Unpack[Options],
) -> Reward:
    """CLIPScore by one of two models, each with its own preprocessing.

    "dfn" is DFN-5B's ViT-H/14 at 378 pixels, of the squashed picture: cos(image, text). "openai" is OpenAI's ViT-L/14,
    of the centre, resized linearly: exp(logit_scale) cos(image, text) / 100, where the scale is 100 to a few digits.

    Args:
        weights: open_clip_pytorch_model.bin of apple/DFN5B-CLIP-ViT-H-14-384, or openai/clip-vit-large-patch14; a file
            or a folder.
        tokenizer: folder of CLIP's tokenizer.
        model: "dfn" or "openai".
        config: other sizes than the model's.
        options: see `Options`.

    Raises:
        ValueError: an unknown model, weights or a tokenizer that do not fit, or a probe that fails.
    """
    dtype = options.get("dtype", jnp.bfloat16)
    if model == "dfn":
        score = Similarity(config or clip.clip_h14_378_quickgelu(), resize="squash", dtype=dtype)
        return _build("clipscore", score, weights, _open_clip_tokenizer(tokenizer, score), options)
    if model != "openai":
        raise ValueError(f"model={model!r} is unknown: choose 'dfn' or 'openai'")
    sizes = config or clip.clip_l14()
    score = Similarity(sizes, method="linear", rounded=False, scaled=True, divisor=100.0, dtype=dtype)
    return _build("clipscore", score, weights, load_tokenizer(tokenizer, score.config.text), options)


def load_params(
    weights: File | None, config: CLIPConfig, options: Options, parts: Sequence[str] = clip.PARTS
) -> clip.Params:
    """Parameters of a CLIP on the host, from either layout of weights, in the dtype of the options."""
    dtype = jnp.dtype(options.get("dtype", jnp.bfloat16))
    if weights is None:
        shapes = clip.shapes(config, dtype)
        return {part: shapes[part] for part in parts}
    tensors = read_weights(weights)
    return clip.load(config, tensors, rules=open_clip.rules_for(tensors), parts=parts, dtype=dtype)


def _open_clip_tokenizer(folder: File | None, score: Similarity) -> Tokenize:
    return load_tokenizer(folder, score.config.text, mended)


def _build(name: str, score: Similarity, weights: File | None, tokenize: Tokenize, options: Options) -> Reward:
    params = load_params(weights, score.config, options)
    return build(name, score, params, lambda prompts, metadata: tokenize(prompts), options)
