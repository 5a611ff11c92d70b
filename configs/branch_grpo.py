"""BranchGRPO (arXiv 2509.06040): samples are leaves of a tree, and each step learns from the mean reward below it.

    python -m mixgrpo_jax.train --config=configs/branch_grpo.py:signs --workdir=runs/branch_grpo

Rewards of nodes are normalised within their depth. Published (the authors' code): DanceGRPO's kernel with eta 0.3, rows
branch in two before steps 0, 3, 6 and 9 of 20, and the steps between are stochastic too; its window of ODE and SDE has
fewer. Here they are at the same shares of the schedule, as many as the task's group has room for (12 = 2 x 2 x 3), and
the steps at which rows branch alone are stochastic. These have four times the noise, as with the code's
tree_split_noise_scale=4; the code then evaluates log-probs at one time, which is not the density that was sampled.
Here the step is that of the SDE with eta 1.2, mean and density. The loss is a mean over leaves, in which the nodes of
a depth count alike; a node is computed once for each leaf below it.

Pruning: by depth in branch_grpo_pruned.py; by width, to the best and worst leaves, by
config.select = configs.choose("select", "extremes"). Nodes' rewards are those of all leaves, and nodes count by the
leaves that are left. Published: HPSv2.1 of FLUX.1-dev 0.363 with the window, 0.369 pruned by depth, MixGRPO 0.359.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """BranchGRPO on the task `on`."""
    config = configs.load(on, __file__)
    steps = config.plan
    config.plan = configs.choose(
        "plan",
        "tree",
        num_steps=steps.num_steps,
        shift=steps.shift,
        spacing=steps.spacing,
        splits=tuple(steps.num_steps * k // 20 for k in (0, 3, 6)),
        noise=(4.0, 4.0, 4.0),
    )
    config.sampler.kernel = "dance"
    config.sampler.eta = 0.3
    config.advantage.spread = "nodes"
    return config
