"""Flow-GRPO-Fast: a window of two stochastic, trained steps at a random place in the first half.

    python -m mixgrpo_jax.train --config=configs/flow_grpo_fast.py:signs --workdir=runs/flow_grpo_fast

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Flow-GRPO-Fast on the task `on`."""
    config = configs.load("flow_grpo", __file__, on)
    config.plan.strategy = "random"
    config.plan.length = 2
    config.plan.bound = config.plan.num_steps // 2
    config.plan.train_fraction = 1.0
    config.batch.shared_noise = True
    config.terms.kl_base = 0.0
    return config
