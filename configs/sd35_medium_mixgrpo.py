"""MixGRPO on Stable Diffusion 3.5 Medium: 24 images a prompt at 512 x 512, a window of 4 of 10 steps, guided at 4.5.

    python -m mixgrpo_jax.train --config=configs/sd35_medium_mixgrpo.py --workdir=runs/sd35_mixgrpo

The paper's settings: a window that stays 150 iterations and moves by one step, and a KL to the start of weight 0.001,
which is a tenth of that in the closed form with the step's time in it. Data: see sd35_medium.py. Not run at this size
here; the programs are the ones that the small runs use.

Hardware: more than v5e:2x2, which its rollout does not fit by `estimate`. Expected result: not measured yet; the paper
has HPS-v2.1 from 0.307 to 0.342, PickScore from 0.227 to 0.236, ImageReward from 1.163 to 1.485.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The recipe on the model."""
    config = configs.load("mixgrpo", __file__, "sd35_medium")
    config.plan.length, config.plan.iterations_per_window = 4, 150
    config.terms.kl_base = 1e-4
    return config
