"""MixGRPO with coefficients-preserving sampling (FlowCPS) in its window: no noise is left over in the pictures.

    python -m mixgrpo_jax.train --config=configs/mixgrpo_cps.py:signs --workdir=runs/mixgrpo_cps

The log-prob is -(x' - mean)^2, as its authors have it: a density's up to the step's variance, so the clip range does
not mean what it means in `mixgrpo`.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """MixGRPO with the cps kernel on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.sampler.kernel = "cps"
    config.sampler.eta = 0.8
    config.sampler.log_prob = "squared_error"
    return config
