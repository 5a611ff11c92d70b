"""Which steps of an iteration's trajectory are prefix, window and suffix.

The window moves from iteration to iteration by a state machine on the host; what the device sees are arrays whose
shapes never change, so that moving the window compiles nothing.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from mixgrpo_jax.flow.schedules import compressed_suffix, shifted_sigmas

Strategy = Literal["progressive", "random", "decay", "exp_decay", "frozen", "all"]
AtEnd = Literal["stop", "roll_back"]
TrainChoice = Literal["first", "random"]


@dataclass(frozen=True)
class PlanConfig:
    """How trajectories are laid out, and how the window moves over them.

    Attributes:
      num_steps: steps T of the schedule.
      shift: shift of the schedule.
      strategy: how the window's start moves. "progressive" by `stride` after a fixed number of iterations; "decay" and
        "exp_decay" likewise, with fewer iterations the later the start; "random" anywhere, every iteration; "frozen"
        never; "all" has every trainable step in the window.
      length: steps w in the window; not read by "all".
      iterations_per_window: iterations tau at one start ("progressive", and the most for "exp_decay").
      stride: steps by which the window moves.
      at_end: whether a window at the last position stays there or rolls back to the first step.
      bound: exclusive upper limit of the steps that the window may hold. None is T - 1, which leaves at least one
        deterministic step at the end; T makes every step trainable.
      decay_min: iterations at the bound ("decay").
      decay_max: iterations at the first step ("decay"); in between they are linear in the start.
      decay_rate: k of "exp_decay", `ceil(tau exp(-k max(start - threshold, 0)))` iterations.
      decay_threshold: start from which "exp_decay" decays.
      train_fraction: share of the window's steps that are trained, rounded down, at least one.
      train_choice: which ones: the first, or a new random choice every iteration.
      suffix_ratio: share of the suffix's steps that are kept (MixGRPO-Flash); 1 keeps the schedule.
      solver_order: order of the suffix's solver, 1..3.
      seed: of the random window and of the random choice; the same on every host.

    Raises:
      ValueError: when a field is out of range.
    """

    num_steps: int = 25
    shift: float = 3.0
    strategy: Strategy = "progressive"
    length: int = 4
    iterations_per_window: int = 25
    stride: int = 1
    at_end: AtEnd = "stop"
    bound: int | None = None
    decay_min: int = 1
    decay_max: int = 10
    decay_rate: float = 0.1
    decay_threshold: int = 13
    train_fraction: float = 1.0
    train_choice: TrainChoice = "first"
    suffix_ratio: float = 1.0
    solver_order: int = 1
    seed: int = 0

    def __post_init__(self):
        for field, choices in (("strategy", Strategy), ("at_end", AtEnd), ("train_choice", TrainChoice)):
            self._require(getattr(self, field) in get_args(choices), field, f"choose one of {get_args(choices)}")
        for field in ("iterations_per_window", "length", "decay_min"):
            self._require(getattr(self, field) >= 1, field, "it must be at least 1")
        for field in ("stride", "decay_rate", "seed"):
            self._require(getattr(self, field) >= 0, field, "it must not be negative")
        for field in ("train_fraction", "suffix_ratio"):
            self._require(0 < getattr(self, field) <= 1, field, "it must be in (0, 1]")
        self._require(self.num_steps >= 2, "num_steps", "a trajectory needs at least 2 steps")
        self._require(self.shift > 0, "shift", "it must be positive; 1 is the uniform schedule")
        self._require(1 <= self.trainable_steps <= self.num_steps, "bound", f"it must be in 1..{self.num_steps}")
        self._require(
            self.window_length <= self.trainable_steps,
            "length",
            f"the window may hold {self.trainable_steps} steps; shorten it, or raise bound or num_steps",
        )
        self._require(self.decay_max >= self.decay_min, "decay_max", f"it must be at least decay_min={self.decay_min}")
        self._require(self.solver_order in (1, 2, 3), "solver_order", "choose 1, 2 or 3")

    def _require(self, valid: bool, field: str, remedy: str):
        if not valid:
            raise ValueError(f"{field}={getattr(self, field)!r}: {remedy}")

    @property
    def trainable_steps(self) -> int:
        """The bound, resolved."""
        return self.num_steps - 1 if self.bound is None else self.bound

    @property
    def window_length(self) -> int:
        """Steps w in every window."""
        return self.trainable_steps if self.strategy == "all" else self.length

    @property
    def num_trained(self) -> int:
        """Steps of every window that are trained."""
        return max(1, int(self.train_fraction * self.window_length))

    @property
    def last_start(self) -> int:
        """The last position of the window."""
        return self.trainable_steps - self.window_length


class Plan(NamedTuple):
    """One iteration's trajectory, in arrays of static shape.

    Step i goes from `sigmas[i]` to `sigmas[i + 1]`. Steps before `start` are the prefix, the next w the window; the
    suffix is the first `suffix_steps` steps of `suffix_sigmas`, with the solver's order for each in `suffix_order`.
    """

    sigmas: np.ndarray  # [T + 1] float32
    start: np.int32
    suffix_sigmas: np.ndarray  # [T + 1] float32, zero padded
    suffix_steps: np.int32
    suffix_order: np.ndarray  # [T] int32
    train: np.ndarray  # [num_trained] int32, offsets in the window


class WindowState(NamedTuple):
    """Where the window is: its start, the iterations already spent there, and those spent in all."""

    start: int
    dwell: int
    iteration: int


def initial_state(config: PlanConfig) -> WindowState:
    """The state of a run's first iteration."""
    return WindowState(_random_start(config, 0) if config.strategy == "random" else 0, 0, 0)


def advance(config: PlanConfig, state: WindowState) -> WindowState:
    """The state of the next iteration.

    >>> config = PlanConfig(iterations_per_window=2)
    >>> state = initial_state(config)
    >>> [(state := advance(config, state)).start for _ in range(5)]
    [0, 1, 1, 2, 2]
    """
    iteration = state.iteration + 1
    if state.dwell + 1 < _dwell(config, state.start):
        return WindowState(state.start, state.dwell + 1, iteration)
    if config.strategy == "random":
        return WindowState(_random_start(config, iteration), 0, iteration)
    return WindowState(_next_start(config, state.start), 0, iteration)


def make_plan(config: PlanConfig, state: WindowState) -> Plan:
    """Lays out the iteration's trajectory; the window is within the bound whatever the state holds."""
    start = min(max(state.start, 0), config.last_start)
    window_end = start + config.window_length
    suffix = compressed_suffix(config.num_steps, config.shift, window_end, config.suffix_ratio)
    num_suffix = len(suffix) - 1
    return Plan(
        sigmas=shifted_sigmas(config.num_steps, config.shift),
        start=np.int32(start),
        suffix_sigmas=np.pad(suffix, (0, config.num_steps + 1 - len(suffix))),
        suffix_steps=np.int32(num_suffix),
        suffix_order=solver_orders(config.solver_order, num_suffix, config.num_steps, window_end + num_suffix),
        train=_trained_offsets(config, state.iteration),
    )


def evaluations(plan: Plan, num_prompts: int, group_size: int, shared_noise: bool) -> dict[str, int]:
    """Model evaluations that the iteration costs, in samples.

    With P prompts and groups of G, a shared initial noise runs the deterministic prefix once for each prompt:
    `rollout = start P + (w + suffix) P G`, and `start P G` for the first term otherwise; `update = trained P G`.
    """
    samples = num_prompts * group_size
    prefix_rows = num_prompts if shared_noise else samples
    # The suffix begins where the window ends.
    window_end = int(np.flatnonzero(plan.sigmas == plan.suffix_sigmas[0])[0])
    prefix, window = int(plan.start), window_end - int(plan.start)
    return {
        "rollout": prefix * prefix_rows + (window + int(plan.suffix_steps)) * samples,
        "update": len(plan.train) * samples,
    }


def _dwell(config: PlanConfig, start: int) -> float:
    """Iterations that the window spends at a start."""
    match config.strategy:
        case "progressive":
            return config.iterations_per_window
        case "decay":
            progress = start / config.trainable_steps
            dwell = int(config.decay_max * (1 - progress) + config.decay_min * progress)
            return max(config.decay_min, dwell)
        case "exp_decay":
            past = max(start - config.decay_threshold, 0)
            return math.ceil(config.iterations_per_window * math.exp(-config.decay_rate * past))
        case "random":
            return 1
        case _:
            return math.inf


def _next_start(config: PlanConfig, start: int) -> int:
    if start >= config.last_start and config.at_end == "roll_back":
        return 0
    return min(start + config.stride, config.last_start)


def _random_start(config: PlanConfig, iteration: int) -> int:
    return int(np.random.default_rng([config.seed, iteration]).integers(config.last_start + 1))


def _trained_offsets(config: PlanConfig, iteration: int) -> np.ndarray:
    if config.train_choice == "first":
        return np.arange(config.num_trained, dtype=np.int32)
    # A third word keeps this stream apart from the one that places the window.
    rng = np.random.default_rng([config.seed, iteration, 1])
    return np.sort(rng.choice(config.window_length, config.num_trained, replace=False)).astype(np.int32)


def solver_orders(order: int, num_steps: int, length: int, total: int | None = None) -> np.ndarray:
    """The solver's order at each of `num_steps` steps that end at sigma 0, int32 [length], padded with ones.

    It is lowered at the end: 1 on the last step, at most 2 before it on trajectories of `total` < 15 steps.

    >>> solver_orders(3, num_steps=4, length=6)
    array([3, 3, 2, 1, 1, 1], dtype=int32)
    """
    orders = np.ones(length, np.int32)
    orders[: max(num_steps - 1, 0)] = order
    if (num_steps if total is None else total) < 15 and num_steps >= 2:
        orders[num_steps - 2] = min(order, 2)
    return orders
