"""BranchGRPO pruned by depth: all leaves are drawn and scored, and two of three depths are trained, others every time.

    python -m mixgrpo_jax.train --config=configs/branch_grpo_pruned.py:signs --workdir=runs/branch_grpo_pruned

An approximation: which depths the authors' code trains when is not known; here they are drawn anew every iteration.
Settings are those of branch_grpo.py.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """BranchGRPO, pruned by depth, on the task `on`."""
    config = configs.load("branch_grpo", __file__, on)
    config.plan.train_fraction = 0.67
    config.plan.train_choice = "random"
    return config
