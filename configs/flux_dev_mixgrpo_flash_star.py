"""MixGRPO-Flash* on FLUX.1-dev: the paper's main run, 300 iterations of 32 prompts x 12 at 720 x 720.

    python -m mixgrpo_jax.train --config=configs/flux_dev_mixgrpo_flash_star.py --workdir=runs/flux_flash_star

Hardware and data: see flux_dev.py. Not run at this size here; the programs are the ones that the small runs use.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The recipe on the model."""
    return configs.load("mixgrpo_flash_star", __file__, "flux_dev")
