"""MixGRPO with ViPO's maps (arXiv 2511.18719): a position's advantage is the sample's times how much there is to see.

    python -m mixgrpo_jax.train --config=configs/vipo.py:signs --workdir=runs/vipo

The map is of the principal components of an encoder's patches, see `saliency` in mixgrpo_jax/rewards/perceptual.py:
DINOv2 in the paper, here CLIP with PickScore's weights where a run has them, and else the pixels. Each position has a
ratio and a clip of its own, as published; there, a map of ones is worse than one advantage. Rate, clip, group and
guidance are MixGRPO's. On the embedded tasks, `--config.advantage.map` can name an exact map: "digits", "shapes".

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """ViPO on the task `on`."""
    config = configs.load("mixgrpo", __file__, on)
    weights = config.reward_options.get("pickscore", {}).get("weights")
    options = dict(weights=weights) if weights else dict(encoder="pixels", cell=(8, 4))
    config.watched = (*config.watched, "saliency")
    config.reward_options.saliency = options
    config.advantage.spread = "map"
    config.advantage.map = "saliency"
    return config
