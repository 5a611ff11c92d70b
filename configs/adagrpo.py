"""MixGRPO on prompts of medium difficulty, after AdaGRPO (arXiv 2606.06828), an approximation.

    python -m mixgrpo_jax.train --config=configs/adagrpo.py:signs --workdir=runs/adagrpo

Of an iteration's prompts, the quarter with the highest and that with the lowest mean reward teach nothing: the paper
finds that the easiest alone degrade a policy, and that the hardest alone do as well as a random choice. What is known
and what was chosen: see `Band` in mixgrpo_jax/rl/select.py. Rate, clip, group and guidance are MixGRPO's.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """The medium band on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.select = configs.choose("select", "band", hardest=0.25, easiest=0.75)
    return config
