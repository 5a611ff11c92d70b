"""The embedded task: a small FLUX learns to draw signs. MixGRPO's settings at a size that two CPU cores train.

    python -m mixgrpo_jax.pretrain --config=configs/signs.py --workdir=runs/signs

Hardware: 2 CPU cores, about ten minutes. Expected: a held-out strict score (text read exactly, both colours right)
between 0.30 and 0.60, where pretraining stops and RL begins. The result ships with the package.
"""

from mixgrpo_jax import config as configs


def get_config():
    """`base()` at the task's size."""
    config = configs.base()
    config.iterations = 72
    config.plan.num_steps = 10
    config.plan.length = 3
    config.plan.iterations_per_window = 12
    config.objective.clip_low = config.objective.clip_high = 1e-3
    config.rewards.ocr = 2.0
    config.optimizer.learning_rate = 5e-5
    config.optimizer.final_rate = 0.2
    config.optimizer.ema_decay = 0.97
    config.evaluation.num_steps = 10  # training's own: rewards shape the policy for its sampler
    config.pretrain.steps = 2200
    config.pretrain.evaluate_every = 100
    config.pretrain.stop_at = 0.45
    return config
