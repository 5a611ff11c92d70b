"""MixGRPO on prompts of medium difficulty, after AdaGRPO (arXiv 2606.06828), an approximation.

    python -m mixgrpo_jax.train --config=configs/adagrpo.py:signs --workdir=runs/adagrpo

The quarter of an iteration's prompts with the highest mean reward, and the quarter with the lowest, are not trained on.
The paper finds that the easiest alone degrade a policy, and that the hardest alone do as well as a random choice.
`Band` in mixgrpo_jax/rl/select.py says what is known and what was chosen. Rate, clip, group and guidance are MixGRPO's.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """The medium band on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.select = configs.choose("select", "band", hardest=0.25, easiest=0.75)
    return config
