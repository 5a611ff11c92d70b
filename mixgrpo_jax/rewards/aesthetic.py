"""LAION's aesthetic predictor: how pleasing a picture is, whatever was asked for, from CLIP's image embedding."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.models import clip
from mixgrpo_jax.models.clip import CLIPConfig
from mixgrpo_jax.models.io.torch_io import read_weights
from mixgrpo_jax.rewards.clip import load_params
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.on_device import Options, build
from mixgrpo_jax.rewards.preprocess import preprocess

LAYERS = (0, 2, 4, 6, 7)  # between them the head has nothing but dropout


@dataclass(frozen=True)
class Aesthetic:
    """w . e + b of the unit image embedding e.

    A pure function `(params, images, tokens) -> scores`, fp32 [B], of images [B, H, W, 3]; tokens are not looked at. It
    is differentiable in float images, from 0 to 255, which are neither rounded nor clipped on their way.
    """

    config: CLIPConfig
    dtype: Any = jnp.bfloat16

    def __call__(self, params: clip.Params, images: jax.Array, tokens: Any = None) -> jax.Array:
        """Scores [B]."""
        pixels = preprocess(images, self.config.vision.image_size)
        embedding = clip.embed_images(self.config, params, pixels, self.dtype)
        # A sum in fp32: matrix units round to bf16 by default, and the scores lie close together.
        return jnp.sum(embedding * params["weight"], axis=-1) + params["bias"]


def aesthetic(
    weights: str | os.PathLike | None,
    head: str | os.PathLike | None,
    *,
    config: CLIPConfig | None = None,
    **options: Unpack[Options],
) -> Reward:
    """The LAION aesthetic score, some 1 to 10.

    Args:
        weights: those of openai/clip-vit-large-patch14, a file or a folder; only the image encoder is kept. With None
            for weights and head, parameters are shapes, see `OnDevice.lower`.
        head: sac+logos+ava1-l14-linearMSE.pth, or the same tensors as safetensors.
        config: another model than ViT-L/14.
        options: see `rewards.on_device.Options`.

    Raises:
        ValueError: weights or a head that do not fit, or a probe that fails.
    """
    score = Aesthetic(config or clip.clip_l14(), options.get("dtype", jnp.bfloat16))
    width = score.config.vision.projection_dim
    nothing = np.zeros(width, np.float32), np.zeros((), np.float32)
    weight, bias = nothing if head is None else collapse(read_weights(head, "head"), width)
    params = load_params(weights, score.config, options, parts=("vision",)) | {"weight": weight, "bias": bias}
    return build("aesthetic", score, params, lambda prompts, metadata: None, options)


def collapse(tensors: Mapping[str, np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The head's five linear layers as one affine map: fp32 w [width] and b [], computed in fp64.

        W5 (W4 (... (W1 e + b1) ...) + b4) + b5 = w . e + b

    Raises:
        ValueError: tensors of other names, or of shapes that do not follow one another from `width` to 1.
    """
    names = {f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")}
    if different := sorted(names ^ tensors.keys()):
        raise ValueError(
            f"the aesthetic head must have the tensors {sorted(names)}; missing or not expected: {different}"
        )
    weight, bias = np.eye(1), np.zeros(1)
    for i in reversed(LAYERS):
        w, b = (np.asarray(tensors[f"layers.{i}.{kind}"], np.float64) for kind in ("weight", "bias"))
        if w.ndim != 2 or w.shape[0] != weight.shape[1] or b.shape != w.shape[:1]:
            raise ValueError(
                f"layers.{i} of the aesthetic head has shapes {w.shape} and {b.shape}, and must have {weight.shape[1]} "
                "rows for the next layer"
            )
        weight, bias = weight @ w, weight @ b + bias
    if weight.shape[1] != width:
        raise ValueError(f"the aesthetic head takes {weight.shape[1]} numbers, and the image embedding has {width}")
    return weight[0].astype(np.float32), bias[0].astype(np.float32)
