"""MixGRPO's plan: of every trajectory a short window of steps is stochastic, and moves from iteration to iteration."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from mixgrpo_jax.flow.plans.base import (
    Layout,
    Plan,
    Segment,
    Track,
    choose_trained,
    lay,
    num_trained,
    require,
    solver_orders,
    trained_at,
)
from mixgrpo_jax.flow.schedules import SPACINGS, compressed_suffix, shifted_sigmas

Strategy = Literal["progressive", "random", "decay", "exp_decay", "frozen", "all"]
AtEnd = Literal["stop", "roll_back"]
TrainChoice = Literal["first", "random"]


class WindowState(NamedTuple):
    """Where the window is: its start, the iterations already spent there, and those spent in all."""

    start: int
    dwell: int
    iteration: int


@dataclass(frozen=True)
class Windowed:
    """Prefix, window, suffix: what every way of placing the window shares.

    Attributes:
      num_steps: steps T of the schedule.
      shift, spacing: the schedule's shift towards noise and its spacing, see `shifted_sigmas`.
      length: steps w in the window.
      bound: exclusive upper limit of the steps that the window may hold. None is T - 1, which leaves at least one
        deterministic step at the end; T makes every step trainable.
      train_fraction: share of the window's steps that are trained, rounded down, at least one.
      train_choice: which steps of the window are trained: the "first", or a new "random" choice every iteration.
      suffix_ratio: share of the suffix's steps that are kept (MixGRPO-Flash); 1 keeps the schedule.
      solver_order: order of the suffix's solver, 1..3.
      chunks: the schedule's steps at which chunks begin, for objectives that have one ratio for several steps: (0,) is
        one chunk, and () makes each step its own.
      group: samples of a prompt.
      seed: of every random choice; the same on every host.

    Raises:
      ValueError: when a field is out of range.
    """

    num_steps: int = 25
    shift: float = 3.0
    length: int = 4
    bound: int | None = None
    train_fraction: float = 1.0
    train_choice: TrainChoice = "first"
    suffix_ratio: float = 1.0
    solver_order: int = 1
    spacing: str = "trailing"
    chunks: tuple[int, ...] = ()
    _: dataclasses.KW_ONLY
    group: int = 1
    seed: int = 0

    def __post_init__(self):
        self._choices(train_choice=TrainChoice)
        require(self, self.length >= 1, "length", "it must be at least 1")
        for field in ("train_fraction", "suffix_ratio"):
            require(self, 0 < getattr(self, field) <= 1, field, "it must be in (0, 1]")
        require(self, self.num_steps >= 2, "num_steps", "a trajectory needs at least 2 steps")
        require(self, self.shift > 0, "shift", "it must be positive; 1 is the uniform schedule")
        require(self, self.spacing in SPACINGS, "spacing", f"choose one of {SPACINGS}")
        require(self, 1 <= self.trainable_steps <= self.num_steps, "bound", f"it must be in 1..{self.num_steps}")
        require(
            self,
            self.window_length <= self.trainable_steps,
            "length",
            f"the window may hold {self.trainable_steps} steps; shorten it, or raise plan.bound or plan.num_steps",
        )
        require(self, self.solver_order in (1, 2, 3), "solver_order", "choose 1, 2 or 3")
        rising = [-1, *self.chunks, self.num_steps]
        require(self, rising == sorted(set(rising)), "chunks", f"give rising steps within num_steps={self.num_steps}")
        require(self, self.seed >= 0, "seed", "it must not be negative")

    def _choices(self, **fields):
        for field, kind in fields.items():
            known = get_args(kind)
            require(self, getattr(self, field) in known, field, f"choose one of {known}")

    @property
    def trainable_steps(self) -> int:
        """The bound, resolved."""
        return self.num_steps - 1 if self.bound is None else self.bound

    @property
    def window_length(self) -> int:
        """Steps w in every window."""
        return self.length

    @property
    def num_trained(self) -> int:
        """Steps of every window that are trained."""
        return num_trained(self.window_length, self.train_fraction)

    @property
    def last_start(self) -> int:
        """The last position of the window."""
        return self.trainable_steps - self.window_length

    @property
    def layout(self) -> Layout:
        """Prefix, window, suffix: the group branches at the window."""
        rest = Segment(self.num_steps - self.window_length)
        return rest, Segment(self.window_length, branch=self.group, sde=True, record=True), rest

    def starts(self, state: WindowState, prompts: int) -> list[int]:
        """Where each prompt's window begins."""
        raise NotImplementedError

    def initial(self) -> WindowState:
        """The state of a run's first iteration."""
        return WindowState(0, 0, 0)

    def advance(self, state: WindowState) -> WindowState:
        """The state of the next iteration."""
        return state._replace(iteration=state.iteration + 1)

    def plan(self, state: WindowState, prompts: int) -> Plan:
        """Lays out the iteration's trajectories; a window is within the bound whatever the state holds."""
        sigmas = shifted_sigmas(self.num_steps, self.shift, self.spacing)
        prefix, window, suffix = [], [], []
        for start in self.starts(state, prompts):
            start = min(max(start, 0), self.last_start)
            end = start + self.window_length
            grid = compressed_suffix(self.num_steps, self.shift, end, self.suffix_ratio, self.spacing)
            prefix.append(Track(sigmas[: start + 1], 0))
            window.append(Track(sigmas[start : end + 1], start))
            suffix.append(Track(grid, end, solver_orders(self.solver_order, len(grid) - 1, end + len(grid) - 1)))
        segments = [lay(segment, tracks) for segment, tracks in zip(self.layout, (prefix, window, suffix))]
        # A third word keeps this stream apart from the one that places the window.
        chosen = choose_trained(
            self.window_length, self.train_fraction, self.train_choice, (self.seed, state.iteration, 1)
        )
        plan = trained_at(self.layout, segments, chosen)
        if not self.chunks:
            return plan
        return plan._replace(chunk=np.searchsorted(self.chunks, plan.step, side="right").astype(np.int32))


@dataclass(frozen=True)
class Window(Windowed):
    """One window for all prompts of an iteration.

    Attributes:
      strategy: how the window's start moves. "progressive" by `stride` after a fixed number of iterations; "decay" and
        "exp_decay" likewise, with fewer iterations the later the start; "random" anywhere, every iteration; "frozen"
        never; "all" has every trainable step in the window, and does not read `length`.
      iterations_per_window: iterations tau at one start ("progressive", and the most for "exp_decay").
      stride: steps by which the window moves.
      at_end: whether a window at the last position stays there ("stop") or returns to the first step ("roll_back").
      decay_min: iterations at the bound ("decay").
      decay_max: iterations at the first step ("decay"); in between they are linear in the start.
      decay_rate: k of "exp_decay", `ceil(tau exp(-k max(start - threshold, 0)))` iterations.
      decay_threshold: start from which "exp_decay" decays.

    Raises:
      ValueError: when a field is out of range.
    """

    strategy: Strategy = "progressive"
    iterations_per_window: int = 25
    stride: int = 1
    at_end: AtEnd = "stop"
    decay_min: int = 1
    decay_max: int = 10
    decay_rate: float = 0.1
    decay_threshold: int = 13

    def __post_init__(self):
        self._choices(strategy=Strategy, at_end=AtEnd)
        super().__post_init__()
        for field in ("iterations_per_window", "decay_min"):
            require(self, getattr(self, field) >= 1, field, "it must be at least 1")
        for field in ("stride", "decay_rate"):
            require(self, getattr(self, field) >= 0, field, "it must not be negative")
        require(
            self, self.decay_max >= self.decay_min, "decay_max", f"it must be at least plan.decay_min={self.decay_min}"
        )

    @property
    def window_length(self) -> int:
        """Steps w in every window."""
        return self.trainable_steps if self.strategy == "all" else self.length

    def starts(self, state: WindowState, prompts: int) -> list[int]:
        """The state's start, for every prompt."""
        return [state.start] * prompts

    def initial(self) -> WindowState:
        """The state of a run's first iteration."""
        return WindowState(self._random_start(0) if self.strategy == "random" else 0, 0, 0)

    def advance(self, state: WindowState) -> WindowState:
        """The state of the next iteration.

        >>> planner = Window(iterations_per_window=2)
        >>> state = planner.initial()
        >>> [(state := planner.advance(state)).start for _ in range(5)]
        [0, 1, 1, 2, 2]
        """
        iteration = state.iteration + 1
        if state.dwell + 1 < self._dwell(state.start):
            return WindowState(state.start, state.dwell + 1, iteration)
        if self.strategy == "random":
            return WindowState(self._random_start(iteration), 0, iteration)
        return WindowState(self._next_start(state.start), 0, iteration)

    def _dwell(self, start: int) -> float:
        """Iterations that the window spends at a start."""
        match self.strategy:
            case "progressive":
                return self.iterations_per_window
            case "decay":
                progress = start / self.trainable_steps
                dwell = int(self.decay_max * (1 - progress) + self.decay_min * progress)
                return max(self.decay_min, dwell)
            case "exp_decay":
                past = max(start - self.decay_threshold, 0)
                return math.ceil(self.iterations_per_window * math.exp(-self.decay_rate * past))
            case "random":
                return 1
            case _:
                return math.inf

    def _next_start(self, start: int) -> int:
        if start >= self.last_start and self.at_end == "roll_back":
            return 0
        return min(start + self.stride, self.last_start)

    def _random_start(self, iteration: int) -> int:
        return int(np.random.default_rng([self.seed, iteration]).integers(self.last_start + 1))
