"""What is good. REWARDS says where each reward's builder is; what a reward needs is loaded when it is named.

rewards = build(["mine"], {"mine": {"kind": "function", "path": "mine.py:reward"}})
scores = score_all(rewards, images, prompts, metadata)  # {"mine": Score}
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixgrpo_jax.rewards.scoring import build, score_all

__all__ = ["REWARDS", "build", "score_all"]

REWARDS: dict[str, str] = {
    "ocr": "mixgrpo_jax.rewards.ocr:ocr",
    "ocr_dense": "mixgrpo_jax.rewards.ocr:ocr_dense",
    "colour": "mixgrpo_jax.tasks.signs.verify:colour",
    "strict": "mixgrpo_jax.tasks.signs.verify:strict",
    "geneval": "mixgrpo_jax.tasks.scenes.detector:geneval",
    "geneval_strict": "mixgrpo_jax.tasks.scenes.detector:geneval_strict",
    "hps": "mixgrpo_jax.rewards.clip:hps",
    "pickscore": "mixgrpo_jax.rewards.clip:pickscore",
    "clipscore": "mixgrpo_jax.rewards.clip:clipscore",
    "aesthetic": "mixgrpo_jax.rewards.aesthetic:aesthetic",
    "image_reward": "mixgrpo_jax.rewards.image_reward:image_reward",
    "saliency": "mixgrpo_jax.rewards.perceptual:saliency",
    "novelty": "mixgrpo_jax.rewards.perceptual:novelty",
    "digits": "mixgrpo_jax.tasks.signs.where:digits",
    "shapes": "mixgrpo_jax.tasks.scenes.detector:shapes",
    "brisque": "mixgrpo_jax.rewards.brisque:brisque_reward",
    "jpeg_compressibility": "mixgrpo_jax.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "mixgrpo_jax.rewards.jpeg:jpeg_incompressibility",
    "function": "mixgrpo_jax.rewards.function:function_reward",
    "remote": "mixgrpo_jax.rewards.remote:remote",
    "chat": "mixgrpo_jax.rewards.chat:chat",
}


def __getattr__(name: str):
    if name in __all__:  # imported when it is first used: the table alone brings nothing along
        return getattr(importlib.import_module("mixgrpo_jax.rewards.scoring"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
