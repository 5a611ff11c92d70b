"""MixGRPO with POCA's advantages (arXiv 2604.24171), an approximation: those of a group's best and worst fronts alone.

    python -m mixgrpo_jax.train --config=configs/poca.py:signs --workdir=runs/poca

`by_front` in mixgrpo_jax/rl/pareto.py says what is known and what was chosen. Its prompts in three stages, from easy to
hard, are not here: `adagrpo` keeps those of the middle. Rate, clip, group and guidance are MixGRPO's.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """POCA's advantages on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    config.advantage.combine = "pareto"
    return config
