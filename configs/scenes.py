"""Scenes: a small FLUX learns to draw shapes for prompts of GenEval's six kinds, at the sizes of `signs`.

    python -m mixgrpo_jax.pretrain --config=configs/scenes.py --workdir=runs/scenes

The result ships with the package: train with `--config=configs/quickstart.py:scenes`, two to five seconds an iteration,
for a strict score of 0.91 (512 prompts, one seed).

Hardware: a CPU core, about half an hour. Expected result: a held-out strict score (GenEval's rule, on what a detector
by segmentation finds) of 0.51 on 256 prompts.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The settings of `signs` on another task."""
    config = configs.load("signs", __file__)
    config.model.folder = "shipped:scenes"
    config.model.image_size = (24, 24)
    config.data.name = "scenes"
    config.pretrain.steps, config.pretrain.clean_steps = 4200, 3200
    config.pretrain.bias_scale = 4.0  # which colour is whose, and what lies where, is told by the order of words
    config.rewards = dict(geneval=1.0)
    config.watched = ("geneval_strict",)
    return config
