"""The embedded task: a small FLUX learns to draw signs. MixGRPO's settings at a size that two CPU cores train.

    python -m mixgrpo_jax.pretrain --config=configs/signs.py --workdir=runs/signs

The result ships with the package.

Hardware: 2 CPU cores, about fifteen minutes. Expected result: a held-out strict score (text read exactly, both colours
right) of 0.66 on 256 prompts.
"""

from mixgrpo_jax import config as configs


def get_config():
    """`base()` at the task's size."""
    config = configs.base()
    config.iterations = 36
    config.plan.num_steps = 10
    config.plan.length = 3
    config.plan.iterations_per_window = 12
    config.objective.clip_low = config.objective.clip_high = 1e-3
    config.optimizer.learning_rate = 5e-5
    config.optimizer.final_rate = 0.1
    config.averages.ema.decay = 0.97
    config.evaluation.num_steps = 10  # training's own: rewards shape the policy for its sampler
    config.pretrain.steps = 2400
    return config
