"""Flow-GRPO on Stable Diffusion 3.5 Medium: 48 prompts x 24 at 512 x 512, 10 steps, guided at 4.5.

    python -m mixgrpo_jax.train --config=configs/sd35_medium_flow_grpo.py --workdir=runs/sd35_flow_grpo

Data: see sd35_medium.py. The programs are the ones that the small runs use.

Hardware: not run at this size here; `estimate --architecture=sd35-medium` says what fits. Expected result: not measured
yet.
"""

from mixgrpo_jax import config as configs


def get_config():
    """The recipe on the model."""
    config = configs.load("flow_grpo", __file__, "sd35_medium")
    config.objective.clip_low = config.objective.clip_high = 1e-4
    return config
