"""TempFlow-GRPO (arXiv 2508.04324): one stochastic step a prompt, and the more noise it has the more its loss weighs.

    python -m mixgrpo_jax.train --config=configs/tempflow.py:signs --workdir=runs/tempflow

A group is the same up to a step, branches there, and goes on without noise, so that the reward is that step's. Weights
are std of the step, with mean 1: the published code's 2.25 std, of Flow-GRPO's 10 steps. Published (SD3.5-M by LoRA,
and FLUX.1-dev): the other settings are Flow-GRPO's, rate 3e-4, clip 1e-4, groups of 24, 10 steps at guidance 4.5.
Approximation: there, every prompt is branched at every step, with 6 samples each; here at one, drawn anew by prompt.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """TempFlow-GRPO on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.plan = configs.choose("plan", "per_prompt", config.plan, length=1)
    config.objective.weights = "tempflow"
    return config
