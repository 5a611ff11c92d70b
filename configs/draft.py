"""DRaFT-K (arXiv 2309.17400): the reward's own gradient, through the decoder and the last K steps of the sampler.

    python -m mixgrpo_jax.train --config=configs/draft.py:signs --workdir=runs/draft

K is `plan.last`, here the paper's DRaFT-1; 0 is all steps. Every step but the first of them costs an evaluation more
and its gradient. Advantages are not used, and nothing holds the policy but `terms`, such as `terms.mse_base`, against
a reward that is fooled. Rewards must have a gradient: reading is rewarded by its likelihood, and `ocr` is watched.

Hardware: 2 CPU cores on `signs`. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """DRaFT-1 on the task `on`."""
    config = configs.load(on, __file__)
    config.plan = configs.choose("plan", "tail", config.plan, last=1)
    config.objective = configs.choose("objective", "draft")
    config.batch.shared_noise = False
    if "ocr" in config.rewards:
        config.rewards = {"ocr_dense" if name == "ocr" else name: weight for name, weight in config.rewards.items()}
        config.watched = (*config.watched, "ocr")
    return config
