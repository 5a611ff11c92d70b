"""MixGRPO-Flash*: the window stays at the first steps, and 0.2 of the others are left. The cheapest rollout.

python -m mixgrpo_jax.train --config=configs/mixgrpo_flash_star.py:signs --workdir=runs/mixgrpo_flash_star
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """MixGRPO-Flash* on the task `on`."""
    config = configs.load("mixgrpo_flash", __file__, on)
    config.plan.strategy = "frozen"
    config.plan.suffix_ratio = 0.2
    return config
