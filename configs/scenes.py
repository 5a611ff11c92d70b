"""Scenes: a small FLUX learns to draw shapes for prompts of GenEval's six kinds, at the sizes of `signs`.

    python -m mixgrpo_jax.pretrain --config=configs/scenes.py --workdir=runs/scenes

Hardware: 2 CPU cores. Recipes start from what it writes: train with `--config=configs/quickstart.py:scenes`.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The settings of `signs` on another task."""
    config = configs.load("signs", __file__)
    config.model.folder = "runs/scenes/checkpoint"
    config.model.image_size = (24, 24)
    config.data.name = "scenes"
    config.pretrain.steps = 3600
    config.pretrain.bias_scale = 4.0  # which colour is whose, and what lies where, is told by the order of words
    config.rewards = dict(geneval=1.0)
    config.watched = ("geneval_strict",)
    return config
