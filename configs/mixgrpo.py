"""MixGRPO (arXiv 2507.21802): only a short, sliding window of the trajectory is stochastic and trained.

    python -m mixgrpo_jax.train --config=configs/mixgrpo.py:signs --workdir=runs/mixgrpo

The argument names the model and task (a file of this folder); recipes change the method only.

Hardware: 2 CPU cores. Expected result: a held-out strict score from 0.64 to 0.897 in 16 iterations (0.887 to 0.906,
three seeds; benchmarks/RESULTS.md).
"""

from mixgrpo_jax import config as configs


def get_config(on="signs", *args):
    """MixGRPO on the task `on`, whose own arguments follow."""
    config = configs.load(on, __file__, *args)
    config.plan.strategy = "progressive"
    config.plan.stride = 1
    config.sampler.kernel = "flow"
    config.sampler.eta = 0.7
    return config
