"""LeapAlign (arXiv 2604.15311): the reward's gradient through two leaps between places of the whole trajectory.

    python -m mixgrpo_jax.train --config=configs/leap_align.py:signs --workdir=runs/leap_align

The formula is that of a third party's program (FlowBP): alpha 0.3, tau 0.1. There the loss is max(c - R, 0), with a c
that depends on the reward: `objective.margin`. Rewards must have a gradient, see draft.py. Published: on FLUX.1-dev
HPSv2.1 rises from 0.3016 to 0.4063.

Hardware: 2 CPU cores on `signs`. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """LeapAlign on the task `on`."""
    config = configs.load("draft", __file__, on)
    config.plan.last, config.plan.places = 0, 2
    config.objective = configs.choose("objective", "leap_align")
    return config
