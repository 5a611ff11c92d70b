"""TMPO (arXiv 2605.10983): trajectories of a group are matched to their rewards' Boltzmann distribution.

    python -m mixgrpo_jax.train --config=configs/tmpo.py:signs --workdir=runs/tmpo

Published (the authors' code, FLUX.1-dev by LoRA of rank 64, 512 x 512): rate 5e-5, gradients clipped to 0.3, beta from
0.8 to 2, ratios clipped to 0.2, 6 steps at guidance 3.5, kernel "cps" with eta 0.7, whose log-probs are -(x' - mean)^2,
and trees of 3 x 3 x 3. Here the trajectories are independent, in MixGRPO's window, and beta is 2. An update takes whole
groups.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """TMPO on the task `on`."""
    config = configs.load("mixgrpo_cps", __file__, on)
    config.sampler.eta = 0.7
    config.objective = configs.choose("objective", "tmpo")
    return config
