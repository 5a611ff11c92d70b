"""Centred reward distillation (CRD, arXiv 2603.14128): what the policy gained on a sample is drawn to its reward.

    python -m mixgrpo_jax.train --config=configs/crd.py:signs --workdir=runs/crd

Published for SD3.5-M with OCR: LoRA of rank 32 and alpha 64 at a rate of 3e-4, beta 1, groups of 24 of 48 prompts, two
updates an iteration, 10 steps of the ODE without guidance, trained at all of them but the last, advantages by the
batch's deviation, and 0.1 times the squared distance to before training at guidance 4.5, more of it for good samples;
here that is the same for all, and at the run's own guidance. "old" begins at a decay of 0.25 there and at 0 here.
"sampling" follows the parameters at once until iteration 75. Three noise levels a sample are trained.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """CRD on the task `on`."""
    config = configs.load(on, __file__)
    steps = config.plan.num_steps
    config.plan = configs.choose("plan", "ode", config.plan, train_fraction=3.5 / steps, train_choice="random")
    config.sampler.solver = "dpm_midpoint"
    config.objective = configs.choose("objective", "crd", beta=1.0)
    config.averages.old = configs.average("old", decay=0.999, rate=0.005, by="iteration")
    config.averages.sampling = configs.average("sampling", decay=0.999, rate=0.0075, start=75, by="iteration")
    config.batch.shared_noise = False
    config.advantage.std_scope = "batch"
    config.advantage.ddof = 0
    config.advantage.epsilon = 1e-4
    config.terms.mse_base = 0.1
    return config
