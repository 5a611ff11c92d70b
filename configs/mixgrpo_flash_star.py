"""MixGRPO-Flash*: the window stays at the first steps, and 0.2 of the others are left. The cheapest rollout.

    python -m mixgrpo_jax.train --config=configs/mixgrpo_flash_star.py:signs --workdir=runs/mixgrpo_flash_star

Hardware: 2 CPU cores. Expected result: a held-out strict score from 0.64 to 0.901 in 16 iterations (0.883 to 0.910,
three seeds; benchmarks/RESULTS.md).
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """MixGRPO-Flash* on the task `on`."""
    config = configs.load("mixgrpo_flash", __file__, on)
    config.plan.strategy = "frozen"
    config.plan.suffix_ratio = 0.2
    return config
