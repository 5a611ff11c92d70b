"""ReFL (arXiv 2304.05977): the reward of what one late step says of the clean sample, and its gradient in that step.

    python -m mixgrpo_jax.train --config=configs/refl.py:signs --workdir=runs/refl

A trajectory goes to one of the last quarter of the schedule's steps, drawn anew for every prompt, and jumps from there
to the clean sample, whose picture is rewarded (published: the last 10 of 40 steps). `objective.margin=2` is the
published max(2 - R, 0) of ImageReward; the loss of pretraining that stands beside it there is left out, so the whole is
an approximation. Rewards must have a gradient, see draft.py.

Hardware: 2 CPU cores on `signs`. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """ReFL on the task `on`."""
    config = configs.load("draft", __file__, on)
    config.plan.last, config.plan.jump = max(2, config.plan.num_steps // 4), True
    return config
