"""Save and resume a run: the train state and the host's state, in one Orbax checkpoint."""

import functools
import operator
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of a run, in `workdir`/checkpoints, by the number of finished iterations.

    Saves are asynchronous: `save` returns once the state is copied, and `close` waits for the last one.
    """

    def __init__(self, workdir: str | pathlib.Path, every: int = 1, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
        self._manager = ocp.CheckpointManager(pathlib.Path(workdir).absolute() / "checkpoints", options=options)

    @property
    def latest(self) -> int | None:
        """Iterations finished at the newest checkpoint; None without one."""
        return self._manager.latest_step()

    def save(self, iteration: int, state: Any, host: dict, samples: Any = None, force: bool = False) -> bool:
        """Save at the set interval (or now). True where it was due.

        Args:
            iteration: how many are finished.
            state: the train state.
            host: a dict that JSON can hold.
            samples: a tree of arrays, what is drawn of the next iteration already.
            force: save now.
        """
        if iteration == self.latest:
            return False
        items = dict(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        if samples is not None:
            items["samples"] = ocp.args.StandardSave(samples)
        return self._manager.save(iteration, args=ocp.args.Composite(**items), force=force)

    def restore_host(self) -> dict:
        """The host state of the newest checkpoint."""
        return self._manager.restore(self.latest, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]

    def restore(self, like: Any) -> Any:
        """The newest state, laid out as `like`: a tree of arrays, or of shapes with shardings."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(self.latest, args=args)["state"]

    @property
    def folder(self) -> pathlib.Path:
        """Of the newest checkpoint."""
        return pathlib.Path(self._manager.directory) / str(self.latest)

    def has_samples(self) -> bool:
        """Whether the newest checkpoint has samples of the next iteration."""
        return (self.folder / "samples").exists()

    def restore_samples(self, like: Any) -> Any:
        """Samples of the newest checkpoint, laid out as `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(samples=ocp.args.StandardRestore(abstract))
        return self._manager.restore(self.latest, args=args)["samples"]

    def restore_part(self, path: Sequence[str], like: Any) -> Any:
        """A part of the newest state by its path (its parameters, or an average of them), laid out as `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for name in reversed(path):
            abstract = {name: abstract}
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, partial_restore=True))
        return functools.reduce(operator.getitem, path, self._manager.restore(self.latest, args=args)["state"])

    def close(self) -> None:
        """Wait for saves under way, and let go."""
        self._manager.wait_until_finished()
        self._manager.close()
