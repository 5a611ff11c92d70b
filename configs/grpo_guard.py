"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO whose ratio has the same spread at every step, so that its clip works.

    python -m mixgrpo_jax.train --config=configs/grpo_guard.py:signs --workdir=runs/grpo_guard

Published (Flow-GRPO's repository, SD3.5-M by LoRA): rate 1e-4, clip 2e-6 where Flow-GRPO has 1e-4, no KL, deviations of
the group, groups of 24, 10 steps at guidance 4.5. Here the clip is as much smaller than the task's. The released code
adds the bias of the whole batch to each ratio; here it is each sample's own.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """GRPO-Guard on the task `on`."""
    config = configs.load("flow_grpo", __file__, on)
    config.objective.ratio = config.objective.weights = "guard"
    config.objective.clip_low = config.objective.clip_high = config.objective.clip_high / 50
    config.ratio_tolerance = config.objective.clip_high / 2
    config.advantage.std_scope = "group"
    config.terms.kl_base = 0.0
    return config
