"""MixGRPO on the embedded task, end to end.

    python -m mixgrpo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores, about ten minutes. Expected: see README.md.
"""

from mixgrpo_jax import config as configs


def get_config():
    """MixGRPO's recipe on `signs`."""
    return configs.load("mixgrpo", __file__, "signs")
