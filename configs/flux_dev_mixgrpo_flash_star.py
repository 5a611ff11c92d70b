"""MixGRPO-Flash* on FLUX.1-dev: the paper's main run, 300 iterations of 32 prompts x 12 at 720 x 720.

    python -m mixgrpo_jax.train --config=configs/flux_dev_mixgrpo_flash_star.py --workdir=runs/flux_flash_star

Data: see flux_dev.py. Not run at this size here; the programs are the ones that the small runs use.

Hardware: see flux_dev_mixgrpo.py. Expected result: not measured yet; the paper has, on 400 prompts with hybrid
sampling, HPS-v2.1 from 0.313 to 0.357, PickScore from 0.227 to 0.232, ImageReward from 1.088 to 1.624.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The recipe on the model."""
    return configs.load("mixgrpo_flash_star", __file__, "flux_dev")
