"""What an iteration costs, in evaluations of the model: one account for the log, the estimate and the benchmarks."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Evaluations by phase, in samples.

    rollout: that are executed. update: likewise, of all roles, and gradients in x alone. gradient: those of the update
    that have a gradient in the parameters.
    """

    rollout: float
    update: float
    gradient: float

    def work(self, adapters: bool, recomputed: bool = False) -> dict[str, float]:
        """Each phase's work, in forward passes.

        A gradient costs two forward passes more; with adapters one, since the base has none. Where blocks are
        recomputed, that is another one, which does no useful work.
        """
        backward = (1 if adapters else 2) + recomputed
        return {"rollout": self.rollout, "update": self.update + backward * self.gradient}
