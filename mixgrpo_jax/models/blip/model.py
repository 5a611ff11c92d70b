"""BLIP's two towers: a vision transformer, and a BERT that reads a text while it looks at the picture."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mixgrpo_jax.models.blip import text, vision
from mixgrpo_jax.models.blip.text import TextConfig
from mixgrpo_jax.models.blip.vision import Params, VisionConfig


@dataclass(frozen=True)
class BLIPConfig:
    """Sizes of both towers."""

    vision: VisionConfig
    text: TextConfig

    def __post_init__(self):
        if self.text.encoder_hidden_size != self.vision.hidden_size:
            raise ValueError(
                f"text.encoder_hidden_size={self.text.encoder_hidden_size} must be "
                f"vision.hidden_size={self.vision.hidden_size}: the text attends to the image's tokens"
            )


def image_reward_v1() -> BLIPConfig:
    """The towers of ImageReward v1.0: ViT-L/16 at 224 pixels and BERT-base, 445 M parameters."""
    return BLIPConfig(VisionConfig(), TextConfig())


def blip_tiny() -> BLIPConfig:
    """Two blocks a tower, for tests."""
    vision = VisionConfig(32, 8, 32, 64, 2, 4)
    return BLIPConfig(vision, TextConfig(64, 24, 32, 48, 2, 3, max_position_embeddings=40))


def init(config: BLIPConfig, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch: {"vision": ..., "text": ...}."""
    keys = jax.random.split(key)
    return {"vision": vision.init(config.vision, keys[0]), "text": text.init(config.text, keys[1])}


def apply(
    config: BLIPConfig,
    params: Params,
    images: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Feature of each pair of an image and a text: that of the text's first token, which has seen both.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      images: normalised, [B, image_size, image_size, 3].
      tokens: ids [B, L], int32.
      mask: [B, L], true or 1 for text, false or 0 for padding.
      dtype: dtype of the matmuls; norm statistics are fp32 in any case.

    Returns:
      [B, D] in `dtype`.

    Raises:
      ValueError: images of another size, or more tokens than positions.
    """
    memory = vision.apply(config.vision, params["vision"], images, dtype)
    return text.apply(config.text, params["text"], tokens, mask, memory)[:, 0]
