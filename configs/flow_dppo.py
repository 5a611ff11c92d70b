"""Flow-DPPO (arXiv 2606.11025): no ratio is clipped; a step that is far already, by its exact KL, moves no further.

    python -m mixgrpo_jax.train --config=configs/flow_dppo.py:signs --workdir=runs/flow_dppo

Published (UniRL's and verl-omni's code): a step is left out from a KL of 1e-5 on, where Flow-GRPO clips ratios at 1e-4;
rate, group and guidance are Flow-GRPO's, 3e-4 by LoRA, 16 to 24, and the rollout's own. A KL grows as a ratio's
distance squared, and so does the bound here with the task's clip.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Flow-DPPO on the task `on`."""
    config = configs.load("flow_grpo", __file__, on)
    config.objective.surrogate = "divergence"
    config.objective.clip_low = config.objective.clip_high = 1e3 * config.objective.clip_high**2
    config.terms.kl_base = 0.0
    return config
