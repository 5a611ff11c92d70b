"""TMPO on its trees (arXiv 2605.10983): three splits, which move from early to late steps, each with jitter.

    python -m mixgrpo_jax.train --config=configs/tmpo_tree.py:signs --workdir=runs/tmpo_tree

Published (the authors' code): of 6 steps, rows branch in three before steps 1, 2 and 3 at first and 1, 3 and 5 at last,
by a Beta distribution of kappa 6 around these; settings of the objective: tmpo.py. Here a tree has as many leaves as
the task's group has samples, so that the mesh divides them: 12 = 2 x 2 x 3, and --config.batch.group=27 makes it
3 x 3 x 3. Splits are at the same shares of the schedule, reach the last ones with the last iteration, and leave the
last step deterministic, where "cps" has no noise. Which steps the code draws from, and how it keeps them in order, is
not known. An update takes whole groups.

Hardware: 2 CPU cores. Expected result: not measured yet.
"""

from mixgrpo_jax import config as configs


def get_config(on="signs"):
    """TMPO's trees on the task `on`."""
    config = configs.load("tmpo", __file__, on)
    steps = config.plan
    config.plan = configs.choose(
        "plan",
        "tree",
        steps,
        splits=tuple(steps.num_steps * k // 6 for k in (1, 2, 3)),
        late=tuple(steps.num_steps * k // 6 for k in (1, 3, 5)),
        late_after=config.iterations,
        jitter=6.0,
    )
    return config
