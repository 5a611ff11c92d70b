"""Diffusion-APO (arXiv 2605.07503), an approximation: DPO whose noise is what the samples were drawn from.

    python -m mixgrpo_jax.train --config=configs/apo.py:signs --workdir=runs/apo

`DPO` in mixgrpo_jax/rl/objectives/preference.py says what is known and what was chosen. Rate, beta, group and guidance
are not public: they are `dpo`'s.

Hardware: 2 CPU cores. Expected result: it did not learn on a small policy in a test; on `signs` it is not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Diffusion-APO on the task `on`."""
    config = configs.load("dpo", __file__, on)
    config.objective.noise = "rollout"
    return config
