"""PCPO (arXiv 2509.25774): the credit of a step is its share of the time, and not kappa, which varies threefold.

    python -m mixgrpo_jax.train --config=configs/pcpo.py:signs --workdir=runs/pcpo

Log-ratios are scaled by zeta dt / kappa, and zeta leaves their sum over the trained steps as it is: 4.30 at Flow-GRPO's
10 steps, where the published code has 4.32. Published on DanceGRPO (FLUX.1-dev) and on Flow-GRPO (SD3.5-M by LoRA, rate
3e-4, clip 1e-4, 10 steps at guidance 4.5, whose settings are otherwise kept); here on DanceGRPO.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """PCPO on the task `on`."""
    config = configs.load("dancegrpo", __file__, on)
    config.objective.ratio = "pcpo"
    return config
