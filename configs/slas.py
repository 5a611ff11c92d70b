"""MixGRPO with SLAS's advantages (arXiv 2605.10937): sign(d) |d|^(1 + g), d = r - mean, over the batch's deviation.

    python -m mixgrpo_jax.train --config=configs/slas.py:signs --workdir=runs/slas

The formula is from a summary of the paper, which has no value of g: 0.5 was chosen. No prompt's own deviation scales
its advantages. The paper's runs are DanceGRPO's of SD1.4 and FLUX.1-dev; rate, clip, group and guidance are MixGRPO's
here.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """SLAS on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.advantage.combine = "rewards"
    config.advantage.std_scope = "none"
    config.advantage.shape = "power"
    config.advantage.power = 1.5
    return config
