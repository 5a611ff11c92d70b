"""The quickstart over learning rates and seeds.

    python launch/sweep.py --config=configs/signs_sweep.py --workdir=runs/sweep

Hardware: 2 CPU cores, six runs of the quickstart one after another. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The quickstart."""
    return configs.load("quickstart", __file__)


def sweep(add):
    """Three learning rates around the recipe's, two seeds each."""
    for learning_rate in (2e-5, 5e-5, 1e-4):
        for seed in (714, 715):
            add(**{"optimizer.learning_rate": learning_rate, "seed": seed})
