"""MixGRPO with credit by region, after Edit-GRPO (arXiv 2605.16951), an approximation: a reward of a part alone.

    python -m mixgrpo_jax.train --config=configs/edit_grpo.py:signs --workdir=runs/edit_grpo

`by_region` in mixgrpo_jax/rl/spread.py says what is known and what was chosen. The paper edits pictures, where a mask
says what may change. On `signs` the mask is where the number is to be: the digits learn from the reader, and all from
the colours. Elsewhere it is `vipo`'s map, and the first reward is the inside's. Rate, clip, group and guidance are
MixGRPO's.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Credit by region on the task `on`."""
    config = configs.load("vipo", __file__, on)
    if config.data.name in ("signs", "scenes"):
        config.advantage.map = {"signs": "digits", "scenes": "shapes"}[config.data.name]
        config.watched = (*config.watched[:-1], config.advantage.map)
        del config.reward_options.saliency
    config.advantage.spread = "regions"
    config.advantage.routes = (f"{next(iter(config.rewards))}:inside",)
    return config
