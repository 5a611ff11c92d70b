"""GCPO (arXiv 2510.21583, "Chunk-GRPO" before): every step is stochastic, and chunks of steps have one ratio each.

    python -m mixgrpo_jax.train --config=configs/gcpo.py:signs --workdir=runs/gcpo

Published (the authors' code, FLUX.1-dev fully, 720 x 720): chunks of 2, 3, 4 and 7 of 17 steps, rate 1e-5, clip 5e-5,
groups of 12 from one noise, guidance 3.5; half of the chunks are trained, at random. Here all of them are, chunks begin
at the same shares of the schedule, and the clip is half the task's. `flow.chunks` finds the chunks of one's own model.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """GCPO on the task `on`."""
    config = configs.load(on, __file__)
    config.sampler.kernel = "flow"
    config.sampler.eta = 0.7
    config.plan.strategy = "all"
    config.plan.chunks = tuple(round(config.plan.num_steps * start / 17) for start in (0, 2, 5, 9))
    clip = config.objective.clip_high / 2
    config.objective = configs.choose("objective", "gcpo", clip_low=clip, clip_high=clip)
    config.ratio_tolerance = clip / 2
    return config
