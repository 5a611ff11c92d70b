"""Uni-TMPO: the divergence from the rewards' Boltzmann distribution itself, with no ratio and no clip.

    python -m mixgrpo_jax.train --config=configs/uni_tmpo.py:signs --workdir=runs/uni_tmpo

Published (FLUX.1-dev): trees of 3 x 3 x 3, rewards normalised by group, groups of one reward skipped. Approximation: no
code is public, and beta, rate and guidance are not known; beta is 1, the kernel is TMPO's with densities for log-probs,
and the trajectories are independent, in MixGRPO's window. An update takes whole groups.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Uni-TMPO on the task `on`."""
    config = configs.load("mixgrpo_cps", __file__, on)
    config.sampler.eta = 0.7
    config.sampler.log_prob = "density"
    config.objective = configs.choose("objective", "uni_tmpo")
    return config
