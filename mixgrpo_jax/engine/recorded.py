"""The config of the run in a workdir: `--config=.../recorded.py:WORKDIR`, which commands put in where none is given."""

from mixgrpo_jax.engine.workdir import recorded


def get_config(workdir):
    """The run's own."""
    return recorded(workdir)
