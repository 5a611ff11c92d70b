"""MixGRPO on Stable Diffusion 3.5 Medium: 24 images a prompt at 512 x 512, a window of 4 of 10 steps, guided at 4.5.

    python -m mixgrpo_jax.train --config=configs/sd35_medium_mixgrpo.py --workdir=runs/sd35_mixgrpo

The paper's settings: a window that stays 150 iterations and moves by one step, and a KL to the start of weight 0.001,
which is a tenth of that in the closed form with the step's time in it. Hardware and data: see sd35_medium.py. Not run
at this size here; the programs are the ones that the small runs use.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The recipe on the model."""
    config = configs.load("mixgrpo", __file__, "sd35_medium")
    config.plan.length, config.plan.iterations_per_window = 4, 150
    config.terms.kl_base = 1e-4
    return config
