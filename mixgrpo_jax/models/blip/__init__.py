"""BLIP's towers as ImageReward uses them, and ImageReward's weights."""

from mixgrpo_jax.models.blip.model import BLIPConfig, apply, blip_tiny, image_reward_v1, init
from mixgrpo_jax.models.blip.text import TextConfig
from mixgrpo_jax.models.blip.vision import Params, VisionConfig
from mixgrpo_jax.models.blip.weights import load, shapes

__all__ = [
    "BLIPConfig",
    "Params",
    "TextConfig",
    "VisionConfig",
    "apply",
    "blip_tiny",
    "image_reward_v1",
    "init",
    "load",
    "shapes",
]
