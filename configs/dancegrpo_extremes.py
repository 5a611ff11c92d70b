"""DanceGRPO with best-of-N (arXiv 2505.07818): a group's best third and its worst third are trained on.

    python -m mixgrpo_jax.train --config=configs/dancegrpo_extremes.py:signs --workdir=runs/dancegrpo_extremes

Published (HunyuanVideo): the best and the worst 8 of 24, rate 1e-5, clip 1e-4, 16 steps; groups of 12 on FLUX.1-dev, at
guidance 3.5, have 4 and 4. Advantages are normalised over the whole group before. An update has two thirds of it.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """DanceGRPO with the extremes of each group on the task `on`."""
    config = configs.load("dancegrpo", __file__, on)
    config.select = configs.choose("select", "extremes", count=config.batch.group // 3)
    return config
