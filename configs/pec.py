"""MixGRPO with a reward for novelty, after PEC (arXiv 2605.12112), an approximation: a group's pictures are to differ.

    python -m mixgrpo_jax.train --config=configs/pec.py:signs --workdir=runs/pec

What is known and what was chosen: see `novelty` in mixgrpo_jax/rewards/perceptual.py. It is one reward more, with a
tenth of the others' weight, normalised by its group as they are; features are PickScore's image embedding where a run
has it, and else the pixels. Rate, clip, group and guidance are MixGRPO's.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """A reward for novelty on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    weights = config.reward_options.get("pickscore", {}).get("weights")
    config.reward_options.novelty = dict(weights=weights) if weights else dict(encoder="pixels")
    config.rewards.novelty = 0.1 * sum(config.rewards.values())
    return config
