"""BranchGRPO (arXiv 2509.06040): samples are leaves of a tree, and each step learns from the mean reward below it.

    python -m mixgrpo_jax.train --config=configs/branch_grpo.py:signs --workdir=runs/branch_grpo

Rewards of nodes are normalised within their depth. Published (the authors' code): rows branch in two before steps 0, 3,
6 and 9 of 20, 0.6 of the steps are trained, and a window of SDE in the ODE is an option. Here rows branch at the same
shares of the schedule, as often as the task's group has room for (12 = 2 x 2 x 3), and only the steps at which they do
are stochastic, and are trained; the kernel, DanceGRPO's with eta 0.3, is chosen. Its noise is fourfold, as with the
code's tree_split_noise_scale=4; but there log-probs are those of the single noise, a density that was not sampled.
Here the step is that of the SDE with eta 1.2, mean and density. The loss is a mean over leaves, in which the nodes of
a depth count alike; a node is computed once for each leaf below it.

Pruning: by depth in branch_grpo_pruned.py; by width, here to the best and worst leaves, with
config.select = configs.choose("select", "extremes"). Nodes' rewards are those of all leaves, and nodes count by the
leaves that are left. Published: HPSv2.1 of FLUX.1-dev 0.369 pruned by depth, 0.363 with the window; MixGRPO 0.359.

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
        steps,
        splits=tuple(steps.num_steps * k // 20 for k in (0, 3, 6)),
        noise=(4.0, 4.0, 4.0),
    )
    config.sampler.kernel = "dance"
    config.sampler.eta = 0.3
    config.advantage.spread = "nodes"
    return config
