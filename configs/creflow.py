"""CreFlow (arXiv 2605.14274), an approximation: DiffusionNFT in regions, and a pull to what is good.

    python -m mixgrpo_jax.train --config=configs/creflow.py:signs --workdir=runs/creflow

`CreFlow` in mixgrpo_jax/rl/objectives/creflow.py says what is known and what was chosen. The paper's maps are traces of
violated constraints in videos of robots; here they are `edit_grpo`'s: where a sign's number is to be, a scene's shapes,
or what an encoder sees. Rate, group and guidance are not public: they are `nft`'s.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """CreFlow on the task `on`."""
    config, regions = configs.load("nft", __file__, on), configs.load("edit_grpo", __file__, on)
    config.objective = configs.choose("objective", "creflow", beta=config.objective.beta, reflow=0.1)
    config.advantage.map, config.watched = regions.advantage.map, regions.watched
    config.reward_options = regions.reward_options
    return config
