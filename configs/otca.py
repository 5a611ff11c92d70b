"""MixGRPO with OTCA's credit by step (arXiv 2604.19234): a step counts by how far it brought the sample to its end.

    python -m mixgrpo_jax.train --config=configs/otca.py:signs --workdir=runs/otca

The temporal part alone, as notes on the paper have it: with all of its parts the paper's own ImageReward falls from
1.262 to 1.200. Rate, clip, group and guidance are MixGRPO's.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """OTCA's temporal credit on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.advantage.spread = "temporal"
    return config
