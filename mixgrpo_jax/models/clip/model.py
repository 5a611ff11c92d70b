"""CLIP: a text and an image encoder that map into one space, where the angle says how well they match."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.models.clip import text as text_tower
from mixgrpo_jax.models.clip import vision as vision_tower
from mixgrpo_jax.models.clip.text import CLIPTextConfig
from mixgrpo_jax.models.clip.vision import CLIPVisionConfig
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.lazy import place
from mixgrpo_jax.models.io.weights import Rule

Params = dict[str, Any]

LOGIT_SCALE = "logit_scale"
PARTS = ("text", "vision", LOGIT_SCALE)
# Older files of transformers hold the positions 0, 1, 2, ... as tensors.
IGNORED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both encoders; they project to the same width."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig

    def __post_init__(self):
        if self.text.projection_dim != self.vision.projection_dim:
            raise ValueError(
                f"text.projection_dim={self.text.projection_dim} and vision.projection_dim="
                f"{self.vision.projection_dim} must be the same"
            )


def _config(text: tuple[int, int], vision: tuple[int, int], **sizes: Any) -> CLIPConfig:
    """From the width and depth of each tower: heads are 64 wide in the text, and 16 in number in the image."""
    (width, depth), (vision_width, vision_depth) = text, vision
    shared = {name: sizes[name] for name in ("hidden_act", "projection_dim")}
    return CLIPConfig(
        CLIPTextConfig(width, 4 * width, depth, width // 64, **shared),
        CLIPVisionConfig(vision_width, 4 * vision_width, vision_depth, 16, **sizes),
    )


def clip_h14() -> CLIPConfig:
    """ViT-H/14 at 224 pixels, as LAION trained it: the model of HPS-v2.1 and PickScore; 986 M parameters."""
    return _config((1024, 24), (1280, 32), image_size=224, patch_size=14, projection_dim=1024, hidden_act="gelu")


def clip_h14_378_quickgelu() -> CLIPConfig:
    """ViT-H/14 at 378 pixels with the quick GELU, as in DFN-5B: 987 M parameters."""
    return _config((1024, 24), (1280, 32), image_size=378, patch_size=14, projection_dim=1024, hidden_act="quick_gelu")


def clip_l14() -> CLIPConfig:
    """openai/clip-vit-large-patch14: 428 M parameters."""
    return _config((768, 12), (1024, 24), image_size=224, patch_size=14, projection_dim=768, hidden_act="quick_gelu")


def clip_tiny(**vision: Any) -> CLIPConfig:
    """Two small towers for tests; overrides are of the image tower."""
    sizes: dict[str, Any] = dict(
        hidden_size=40,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=24,
    )
    image = CLIPVisionConfig(**(sizes | vision))
    return CLIPConfig(text_tower.clip_tiny(projection_dim=image.projection_dim, hidden_act=image.hidden_act), image)


def init(config: CLIPConfig, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch: both towers', and the logarithm of the scale of the logits, 1/0.07."""
    keys = jax.random.split(key)
    return {
        "text": text_tower.init(config.text, keys[0]),
        "vision": vision_tower.init(config.vision, keys[1]),
        LOGIT_SCALE: jnp.log(jnp.float32(1 / 0.07)),
    }


def shapes(config: CLIPConfig, dtype: Any) -> Params:
    """What `load` gives, of whatever weights, as shapes; the towers in `dtype`."""
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    towers = {part: params[part] for part in ("text", "vision")}
    return params | jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), towers)


def embed_text(config: CLIPConfig, params: Params, tokens: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Unit vectors of token ids [B, L]: fp32 [B, projection_dim]. Matmuls are in `dtype`."""
    return _unit(text_tower.apply(config.text, params["text"], tokens, dtype).pooled)


def embed_images(config: CLIPConfig, params: Params, pixels: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Unit vectors of normalised pixels [B, S, S, 3]: fp32 [B, projection_dim]. Matmuls are in `dtype`."""
    return _unit(vision_tower.apply(config.vision, params["vision"], pixels, dtype))


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def table() -> list[Rule]:
    """Rules from the tensors of transformers' CLIPModel to parameters, and back."""
    return whole_table(text_tower.table(), vision_tower.table())


def whole_table(text: Sequence[Rule], vision: Sequence[Rule]) -> list[Rule]:
    """Rules of a model from those of its towers."""
    towers = (("text", text), ("vision", vision))
    rules = [dataclasses.replace(rule, ours=f"{name}/{rule.ours}") for name, rules in towers for rule in rules]
    return [*rules, Rule(LOGIT_SCALE, LOGIT_SCALE)]


def load(
    config: CLIPConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    rules: Sequence[Rule] | None = None,
    parts: Sequence[str] = PARTS,
    dtype: Any = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Params:
    """Parameters from released tensors.

    Args:
      config: the model's sizes.
      tensors: released tensors by name, all of a model's.
      rules: the layout of the tensors, by default `table()`.
      parts: those of the parameters to read, of "text", "vision" and "logit_scale".
      dtype: of the towers, or else the tensors' own. The logits' scale is fp32 in any case: an error in it is one of
        every score.
      sharding: for parameters that go straight onto devices; on the host by default.

    Raises:
      ValueError: a tensor is missing, not expected, or of another shape than expected; the message names it.
    """
    skeleton = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    read = functools.partial(weights.lazy_load, rules or table(), skeleton, tensors, ignore=IGNORED)
    params = read(dtype=dtype) | {LOGIT_SCALE: read(dtype=np.float32)[LOGIT_SCALE]}
    return place({part: params[part] for part in parts}, sharding)
