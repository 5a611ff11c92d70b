"""MixGRPO with GDPO's advantages (arXiv 2601.05242): each reward by its group, their weighted sum by the batch.

    python -m mixgrpo_jax.train --config=configs/gdpo.py:signs --workdir=runs/gdpo

The second normalisation keeps the advantages' size whatever the number of rewards. Rate, clip, group and guidance are
MixGRPO's.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """GDPO on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.advantage.shape = "whiten"
    return config
