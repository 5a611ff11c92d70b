"""DiffusionNFT with OmniNFT's routes (arXiv 2605.12480): a modality learns from the rewards that speak of it.

    python -m mixgrpo_jax.train --config=configs/omninft.py:signs --workdir=runs/omninft

It is for policies of several modalities, as pictures with sound. With one modality, as here, it is DiffusionNFT.
Rewards without a route (how well sound and picture fit) speak of all. Its scaled gradients of cross-attention and its
weights of regions by attention need what policies do not give, and are not here. Rate, clip, group and guidance are
`nft`'s.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """OmniNFT's routes on the task `on`."""
    config = configs.load("nft", __file__, on)
    config.advantage.spread = "routes"
    config.advantage.routes = tuple(f"{reward}:image" for reward in config.rewards)
    return config
