"""MixGRPO with a reward for novelty, after PEC (arXiv 2605.12112), an approximation: a group's pictures are to differ.

    python -m mixgrpo_jax.train --config=configs/pec.py:signs --workdir=runs/pec

`novelty` in mixgrpo_jax/rewards/perceptual.py says what is known and what was chosen. The reward is added to the others
with a tenth of their weight, and normalised by its group as they are. Features are PickScore's image embedding where a
run has it, and else the pixels. Rate, clip, group and guidance are MixGRPO's.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """A reward for novelty on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    weights = config.reward_options.get("pickscore", {}).get("weights")
    config.reward_options.novelty = dict(weights=weights) if weights else dict(encoder="pixels")
    config.rewards.novelty = 0.1 * sum(config.rewards.values())
    return config
