"""Flow-GRPO (arXiv 2505.05470): every step is stochastic, all but the last are trained, with a KL to the start.

    python -m mixgrpo_jax.train --config=configs/flow_grpo.py:signs --workdir=runs/flow_grpo

Each sample has its own noise. Advantages are by the prompt's mean and the whole batch's standard deviation. The KL's
weight is for the closed form with the step's time in it, a tenth of what the form without it takes at ten steps.

Hardware: 2 CPU cores. Expected result: a held-out strict score from 0.64 to 0.887 in 16 iterations (0.867 to 0.906,
three seeds; benchmarks/RESULTS.md).
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Flow-GRPO on the task `on`."""
    config = configs.load(on, __file__)
    config.sampler.kernel = "flow"
    config.sampler.eta = 0.7
    config.plan.strategy = "all"
    config.plan.bound = config.plan.num_steps
    config.plan.train_fraction = 0.99
    config.batch.shared_noise = False
    config.advantage.std_scope = "batch"
    config.advantage.ddof = 0
    config.advantage.epsilon = 1e-4
    config.terms.kl_base = 0.004
    return config
