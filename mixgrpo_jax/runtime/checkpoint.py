"""Save and resume a run: the train state and the host's state, in one Orbax checkpoint."""

import pathlib
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

    def save(self, iteration: int, state: Any, host: dict, force: bool = False) -> bool:
        """Save at the set interval (or now); `host` is a dict that JSON can hold. True where it was due."""
        if iteration == self.latest:
            return False
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        return self._manager.save(iteration, args=args, force=force)

    def restore(self, like: Any, iteration: int | None = None) -> tuple[Any, dict]:
        """State and host state, laid out as `like`: a tree of arrays, or of shapes with shardings."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest if iteration is None else iteration, args=args)
        return restored["state"], restored["host"]

    def restore_part(self, name: str, like: Any) -> Any:
        """One field of the newest state (of its parameters, or their average), laid out as `like`."""
        abstract = {name: jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, partial_restore=True))
        return self._manager.restore(self.latest, args=args)["state"][name]

    def close(self) -> None:
        """Wait for saves under way, and let go."""
        self._manager.wait_until_finished()
        self._manager.close()
