"""DanceGRPO (arXiv 2505.07818): every step is stochastic, with constant noise; a random 0.6 of them are trained.

    python -m mixgrpo_jax.train --config=configs/dancegrpo.py:signs --workdir=runs/dancegrpo

The picture is the clean estimate at the last step, which is the same as a last step without noise.

Hardware: 2 CPU cores. Expected result: a held-out strict score from 0.64 to 0.889 in 16 iterations (0.871 to 0.902,
three seeds; benchmarks/RESULTS.md).
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """DanceGRPO on the task `on`."""
    config = configs.load(on, __file__)
    config.sampler.kernel = "dance"
    config.sampler.eta = 0.3
    config.plan.strategy = "all"
    config.plan.train_fraction = 0.6
    config.plan.train_choice = "random"
    return config
