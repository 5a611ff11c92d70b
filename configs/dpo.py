"""Online DPO (Diffusion-DPO, arXiv 2311.12908, on the policy's own samples): the best of a group against its worst.

    python -m mixgrpo_jax.train --config=configs/dpo.py:signs --workdir=runs/dpo

Published for FLUX.1-dev (Flow-Factory's configuration): LoRA of rank 64 and alpha 128 at a rate of 1e-6, beta 2000,
groups of 4 of 32 prompts, 28 steps of the ODE at guidance 3.5, and times from a logit-normal distribution; here a pair
is trained at three noise levels of its schedule. The pair shares its noise.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Online DPO on the task `on`."""
    config = configs.load(on, __file__)
    steps = config.plan.num_steps
    config.plan = configs.choose("plan", "ode", config.plan, train_fraction=3.5 / steps, train_choice="stratified")
    config.sampler.solver = "dpm_midpoint"
    config.objective = configs.choose("objective", "dpo", beta=2000.0)
    config.select = configs.choose("select", "extremes", count=1)
    config.batch.shared_noise = False
    return config
