"""MARBLE (arXiv 2605.06507): DiffusionNFT of several rewards, whose gradients are mixed by the least norm of their sum.

    python -m mixgrpo_jax.train --config=configs/marble.py:signs --workdir=runs/marble

Published for SD3.5-M with five rewards: shares are found anew every ten steps, with an average of decay 0.7; here at
every update, see mixgrpo_jax/rl/marble.py. Rate, group and guidance are `nft`'s.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """MARBLE on the task `on`."""
    config = configs.load("nft", __file__, on)
    config.optimizer.mix = "min_norm"
    return config
