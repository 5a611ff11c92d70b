"""Reward score matching (arXiv 2604.17415) by the reward's gradient: v_base - c (1 - sigma) dR/dx0 is matched.

    python -m mixgrpo_jax.train --config=configs/rsm_first_order.py:signs --workdir=runs/rsm_first_order

The gradient at the clean sample is used at all noise levels, with a weight that is linear in them; three in ten of the
steps are trained, drawn anew. The size of c (`objective.strength`, by the latent's elements) was chosen. Rewards must
have a gradient, see draft.py.

Hardware: 2 CPU cores on `signs`. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """First-order reward score matching on the task `on`."""
    config = configs.load("draft", __file__, on)
    config.plan.last, config.plan.places = 0, max(1, int(0.3 * config.plan.num_steps))
    config.objective = configs.choose("objective", "adjoint", strength=0.1, nested=0.0, schedule="linear")
    return config
