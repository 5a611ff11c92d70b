"""Deterministic adjoint matching (arXiv 2605.06583), an approximation: the velocity is matched to an optimal control.

    python -m mixgrpo_jax.train --config=configs/adjoint.py:signs --workdir=runs/adjoint

The adjoint goes back over the last three steps. What is known of the method and what was chosen is said in
mixgrpo_jax/rl/objectives/adjoint.py; `objective.strength` stands between the reward and the distance to the base.
Rewards must have a gradient, see draft.py.

Hardware: 2 CPU cores on `signs`. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Deterministic adjoint matching on the task `on`."""
    config = configs.load("draft", __file__, on)
    config.plan.last = 3
    config.objective = configs.choose("objective", "adjoint", strength=0.1)
    return config
