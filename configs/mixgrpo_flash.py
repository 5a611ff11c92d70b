"""MixGRPO-Flash: after the window, second-order DPM-Solver++ on 0.4 of the steps.

    python -m mixgrpo_jax.train --config=configs/mixgrpo_flash.py:signs --workdir=runs/mixgrpo_flash

Hardware: 2 CPU cores. Expected result: a held-out strict score from 0.64 to 0.902 in 16 iterations (0.895 to 0.914,
three seeds; benchmarks/RESULTS.md).
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """MixGRPO-Flash on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.plan.suffix_ratio = 0.4
    config.plan.solver_order = 2
    config.plan.iterations_per_window = int(0.8 * config.plan.iterations_per_window)  # the paper's 20 for 25
    config.sampler.solver = "dpm_midpoint"
    return config
