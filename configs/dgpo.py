"""Direct group preference optimisation (DGPO, arXiv 2510.08425): a group's good samples against its bad ones.

    python -m mixgrpo_jax.train --config=configs/dgpo.py:signs --workdir=runs/dgpo

Published for SD3.5-M with PickScore (the authors' configuration): LoRA of rank 64 and alpha 128 at a rate of 3e-4, beta
10, clip 0.05, groups of 24 of 24 prompts, one update an iteration, 10 steps of the ODE at guidance 4.5, trained at 4 of
the first 0.6 of them, advantages by the batch's deviation, and 1e-3 times the squared distance to before training.
"old" is an average of decay 0.3, which the clip looks at.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """DGPO on the task `on`."""
    config = configs.load(on, __file__)
    steps = config.plan.num_steps
    config.plan = configs.choose(
        "plan", "ode", config.plan, train_fraction=4.5 / steps, train_choice="random", train_range=0.6
    )
    config.sampler.solver = "dpm_midpoint"
    config.objective = configs.choose("objective", "dgpo", beta=10.0, clip=0.05)
    config.averages.old = configs.average("old", decay=0.3, rate=0.001)
    config.batch.shared_noise = False
    config.advantage.std_scope = "batch"
    config.advantage.ddof = 0
    config.advantage.epsilon = 1e-4
    config.terms.mse_base = 0.001
    return config
