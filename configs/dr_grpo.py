"""MixGRPO with Dr. GRPO's advantages (arXiv 2503.20783): r - mean of the group, with no division by a deviation.

    python -m mixgrpo_jax.train --config=configs/dr_grpo.py:signs --workdir=runs/dr_grpo

Groups whose rewards hardly differ teach little, where the group's deviation would blow them up. Advantages have the
rewards' own units, so that weights of rewards and the rate mean something else than in MixGRPO; rate, clip, group and
guidance are MixGRPO's here.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Dr. GRPO on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.advantage.combine = "rewards"
    config.advantage.std_scope = "none"
    return config
