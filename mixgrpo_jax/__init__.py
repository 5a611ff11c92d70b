"""MixGRPO for flow-matching models: how samples are drawn, and how a policy learns from them.

These names are what a loop of one's own is built from, see examples/two_moons.py; each is imported when it is first
used, so that `import mixgrpo_jax` itself brings nothing along.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "GRPO",
    "KERNELS",
    "NFT",
    "ODE",
    "SOLVERS",
    "Average",
    "Batch",
    "Credit",
    "Layout",
    "Metrics",
    "Objective",
    "PerPrompt",
    "Plan",
    "Planner",
    "Point",
    "Roles",
    "Rollout",
    "Rows",
    "Sampler",
    "Samples",
    "Segment",
    "Steps",
    "Tools",
    "TrainState",
    "Transition",
    "Tree",
    "Velocity",
    "Window",
    "__version__",
    "init_state",
    "initial_noise",
    "integrate",
    "make_terms",
    "make_update",
    "rollout",
    "shifted_sigmas",
]

_NAMES = {
    "flow.kernels": ["KERNELS", "Transition"],
    "flow.plans": ["Layout", "Plan", "Planner", "Segment", "Steps"],
    "flow.plans.ode": ["ODE"],
    "flow.plans.per_prompt": ["PerPrompt"],
    "flow.plans.tree": ["Tree"],
    "flow.plans.window": ["Window"],
    "flow.rollout": ["Rollout", "Rows", "initial_noise", "integrate", "rollout"],
    "flow.sampler": ["Sampler", "Velocity"],
    "flow.schedules": ["shifted_sigmas"],
    "flow.solvers": ["SOLVERS"],
    "rl.credit": ["Credit"],
    "rl.objectives.grpo": ["GRPO"],
    "rl.objectives.nft": ["NFT"],
    "rl.samples": ["Metrics", "Objective", "Point", "Roles", "Samples", "Tools"],
    "rl.terms": ["make_terms"],
    "rl.update": ["Average", "Batch", "TrainState", "init_state", "make_update"],
}
_HOME = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

if TYPE_CHECKING:
    from mixgrpo_jax.flow.kernels import KERNELS, Transition
    from mixgrpo_jax.flow.plans import Layout, Plan, Planner, Segment, Steps
    from mixgrpo_jax.flow.plans.ode import ODE
    from mixgrpo_jax.flow.plans.per_prompt import PerPrompt
    from mixgrpo_jax.flow.plans.tree import Tree
    from mixgrpo_jax.flow.plans.window import Window
    from mixgrpo_jax.flow.rollout import Rollout, Rows, initial_noise, integrate, rollout
    from mixgrpo_jax.flow.sampler import Sampler, Velocity
    from mixgrpo_jax.flow.schedules import shifted_sigmas
    from mixgrpo_jax.flow.solvers import SOLVERS
    from mixgrpo_jax.rl.credit import Credit
    from mixgrpo_jax.rl.objectives.grpo import GRPO
    from mixgrpo_jax.rl.objectives.nft import NFT
    from mixgrpo_jax.rl.samples import Metrics, Objective, Point, Roles, Samples, Tools
    from mixgrpo_jax.rl.terms import make_terms
    from mixgrpo_jax.rl.update import Average, Batch, TrainState, init_state, make_update
else:  # a type checker that saw this function would take any name for one of ours

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
