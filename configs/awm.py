"""Advantage weighted matching (AWM, arXiv 2509.25050): the loss of pretraining stands for the log-prob of a sample.

    python -m mixgrpo_jax.train --config=configs/awm.py:signs --workdir=runs/awm

Published: LoRA at a rate of 3e-4. For FLUX.1-dev (Flow-Factory's configuration): rank 64, alpha 128, groups of 16, 10
steps at guidance 3.5, trained at 4 of the first 0.7 of them, and 0.1 times the squared distance to an average of decay
0.3 (`terms.mse_old`). For SD3.5-M (the authors'): rank 32, groups of 24, 14 steps without guidance, trained at 6, with
1e-3 to 3e-3 times the distance to before training (`terms.mse_base`). Both clip advantages to 1 and ratios to 1, which
clips nothing.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """AWM on the task `on`."""
    config = configs.load(on, __file__)
    steps = config.plan.num_steps
    config.plan = configs.choose(
        "plan", "ode", config.plan, train_fraction=4.5 / steps, train_choice="stratified", train_range=0.7
    )
    config.sampler.solver = "dpm_midpoint"
    config.objective = configs.choose("objective", "awm", clip_low=1.0, clip_high=1.0)
    config.batch.shared_noise = False
    config.advantage.std_scope = "batch"
    config.advantage.ddof = 0
    config.advantage.epsilon = 1e-4
    config.advantage.clip = 1.0
    config.averages.old = configs.average("old", decay=0.3, rate=0.001, by="iteration")
    config.terms.mse_old = 0.1
    return config
