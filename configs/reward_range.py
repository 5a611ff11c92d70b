"""MixGRPO on groups whose rewards differ, as Qwen-Image-2.0-RL (arXiv 2606.27608) filters them.

    python -m mixgrpo_jax.train --config=configs/reward_range.py:signs --workdir=runs/reward_range

A group teaches if its best reward is so far above its worst; advantages of the others are noise that their small
deviation blows up. The threshold is not public: 0.05 was chosen, in the units of the weighted sum of rewards. Rate,
clip, group and guidance are MixGRPO's.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """The filter by range on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.select = configs.choose("select", "band", hardest=0.0, easiest=1.0, least_range=0.05)
    return config
