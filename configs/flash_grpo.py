"""Flash-GRPO (arXiv 2605.15980): one stochastic step a prompt, at another noise level for each, with equal gradients.

    python -m mixgrpo_jax.train --config=configs/flash_grpo.py:signs --workdir=runs/flash_grpo

A prompt's step is drawn from the first half and shared by its group, so that no advantage is about time; its weight
is 1 / kappa, with mean 1 over a batch. Published (the authors' code, Wan2.1 1.3B by LoRA): rate 1e-4, clip 1e-3, no KL,
the whole batch's deviation, groups of 4, the first 10 of 20 steps at guidance 4.5, and the kernel "linear" with eta
0.983, for which the weights are the published ones. Images keep the kernel "flow" and the task's clip here. `plan.band`
makes a rollout cheaper: see `plans.per_prompt`.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Flash-GRPO on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    steps = config.plan.num_steps
    config.plan = configs.choose("plan", "per_prompt", config.plan, length=1, bound=steps // 2)
    config.objective.weights = "flash"
    config.advantage.std_scope = "batch"
    config.advantage.ddof = 0
    config.advantage.epsilon = 1e-4
    return config
