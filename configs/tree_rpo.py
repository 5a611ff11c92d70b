"""Dynamic-TreeRPO (arXiv 2509.23352): a sliding window that is a tree, with more noise the deeper a step is in it.

    python -m mixgrpo_jax.train --config=configs/tree_rpo.py:signs --workdir=runs/tree_rpo

An approximation: no code is public, and reviews tell what is known. There, every step of the window branches in two, to
a depth of 4; noise grows linearly with the depth; the clip range depends on the reward; and the best path's velocities
are targets (objectives/tree_rpo.py). Chosen: three steps (12 = 2 x 2 x 3 leaves), noise of 0.5, 1 and 1.5 times the
task's, a range of up to twice the task's clip, a weight of 0.01, and a window that moves as fast as the task's.
Published: HPS-v2.1 4.9% higher than before.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """Dynamic-TreeRPO on the task `on`."""
    config = configs.load(on, __file__)
    steps = config.plan
    last = steps.num_steps - 4  # of its starts, so that the last step stays deterministic
    config.plan = configs.choose(
        "plan",
        "tree",
        steps,
        splits=(0, 1, 2),
        late=(last, last + 1, last + 2),
        late_after=last * steps.iterations_per_window,
        noise=(0.5, 1.0, 1.5),
    )
    config.objective = configs.choose(
        "objective", "tree_rpo", clip_low=config.objective.clip_low, clip_high=config.objective.clip_high
    )
    return config
