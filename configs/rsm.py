"""Reward score matching (arXiv 2604.17415): a hinge on the log-ratio, as wide at every step as the mean may move.

    python -m mixgrpo_jax.train --config=configs/rsm.py:signs --workdir=runs/rsm

This is the zeroth-order loss with the authors' weights `fairclip2`, of the paper's figure 4(a). Published (SD3.5-M by
LoRA): rate 3e-4, clip 1e-4, no KL, 10 steps at guidance 4.5, advantages clipped to 5 with deviations of the group.
Approximation: there, samples branch at single steps, 6, 6, 8 and 10 of them at the first four and 6 at the last; here
all steps of independent trajectories are trained alike.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Reward score matching on the task `on`."""
    config = configs.load("flow_grpo", __file__, on)
    config.objective.surrogate, config.objective.ratio, config.objective.weights = "hinge", "fair", "fair2"
    config.advantage.std_scope = "group"
    config.terms.kl_base = 0.0
    return config
