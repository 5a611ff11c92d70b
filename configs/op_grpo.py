"""OP-GRPO (arXiv 2604.04142), an approximation: Flow-GRPO that trains on good groups of earlier iterations once more.

    python -m mixgrpo_jax.train --config=configs/op_grpo.py:signs --workdir=runs/op_grpo

A quarter of an iteration's groups, those worth least, give their places to kept ones that are worth more; what is
public and what was chosen, `rl.objectives.op_grpo` and `rl.select.Replay` say. Published: the settings of Flow-GRPO
(rate 3e-4 by LoRA, clip 1e-4, groups of 24, 10 steps at guidance 4.5), and a third of its iterations are enough.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """OP-GRPO on the task `on`."""
    config = configs.load("flow_grpo", __file__, on)
    clip = config.objective.clip_high
    config.objective = configs.choose("objective", "op_grpo", clip_low=clip, clip_high=clip)
    prompts = config.batch.prompts
    config.select = configs.choose("select", "replay", capacity=prompts, groups=max(prompts // 4, 1))
    return config
