"""V-GRPO (arXiv 2604.23380): GRPO's ratio of a bound of the likelihood, at noise levels and noise that a group shares.

    python -m mixgrpo_jax.train --config=configs/vgrpo.py:signs --workdir=runs/vgrpo

Published for SD3.5-M, first stage: LoRA of rank 32 and alpha 64 at a rate of 3e-4, groups of 24 of 48 prompts, 40
steps of the ODE without guidance at 720 x 720, 4 pairs (t, eps), one update an iteration without a clip, and advantages
bent by 3 tanh(A / 3). With more updates the ratio is clipped to 6e-3 or 1e-2, and the squared distance of the clean
estimate to that of before the update is added; here that is the velocity's, `terms.mse_old`, with
config.averages.old = average("old", decay=0.0, by="iteration").

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """V-GRPO on the task `on`."""
    config = configs.load(on, __file__)
    steps = config.plan.num_steps
    config.plan = configs.choose("plan", "ode", config.plan, train_fraction=4.5 / steps, train_choice="stratified")
    config.sampler.solver = "dpm_midpoint"
    config.objective = configs.choose("objective", "vgrpo", clip_low=1e-2, clip_high=1e-2)
    config.batch.shared_noise = False
    config.advantage.shape = "tanh"
    config.advantage.clip = 3.0
    return config
