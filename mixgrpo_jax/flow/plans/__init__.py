"""How trajectories are laid out, iteration by iteration; each strategy is a file, loaded when it is named."""

from mixgrpo_jax.flow.plans.base import (
    Layout,
    Plan,
    Planner,
    Segment,
    Steps,
    evaluations,
    executed,
    leaves_below,
    nodes,
    solver_orders,
    whole,
)

PLANS = {
    "window": "mixgrpo_jax.flow.plans.window:Window",
    "per_prompt": "mixgrpo_jax.flow.plans.per_prompt:PerPrompt",
    "tree": "mixgrpo_jax.flow.plans.tree:Tree",
    "ode": "mixgrpo_jax.flow.plans.ode:ODE",
    "tail": "mixgrpo_jax.flow.plans.tail:Tail",
}

__all__ = [
    "PLANS",
    "Layout",
    "Plan",
    "Planner",
    "Segment",
    "Steps",
    "evaluations",
    "executed",
    "leaves_below",
    "nodes",
    "solver_orders",
    "whole",
]
