"""Sigma grids: the noise levels at which a trajectory is evaluated, from 1 (noise) down to 0 (data)."""

import math

import numpy as np

SPACINGS = ("trailing", "linspace")
TRAIN_STEPS = 1000  # levels of noise at which diffusers' schedulers say a model was trained


def shifted_sigmas(num_steps: int, shift: float, spacing: str = "trailing") -> np.ndarray:
    """The shifted schedule of rectified-flow models, `sigma = s t / (1 + (s - 1) t)` with t from 1 to 0.

    A shift s > 1 spends more steps at high noise; s = 1 is uniform. With the spacing "trailing" t is uniform, as in
    FLUX's pipeline. With "linspace" it is uniform down to the shifted 1/1000, from where the last step goes to 0: so
    diffusers' scheduler sets it by itself, as in Stable Diffusion 3's pipeline.

    >>> shifted_sigmas(4, shift=3.0)
    array([1.  , 0.9 , 0.75, 0.5 , 0.  ], dtype=float32)
    >>> shifted_sigmas(4, shift=3.0, spacing="linspace").round(4)
    array([1.    , 0.8577, 0.6022, 0.0089, 0.    ], dtype=float32)

    Args:
      num_steps: number of steps T.
      shift: s.
      spacing: one of SPACINGS.

    Returns:
      [T + 1] float32, strictly decreasing, 1 first and 0 last.
    """
    return _shifted(_times(1.0, num_steps, shift, spacing), shift)


def resolution_shift(
    num_tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> float:
    """The shift that FLUX derives from the number of latent tokens: `e^mu`, with mu linear in the tokens.

    mu is `base_shift` at `base_tokens` and `max_shift` at `max_tokens`, and extrapolates outside. FLUX's dynamic shift
    `e^mu / (e^mu + 1/t - 1)` is `shifted_sigmas` with s = e^mu.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (num_tokens - base_tokens))


def empirical_shift(num_tokens: int, num_steps: int) -> float:
    """The shift that FLUX.2's pipelines derive from the number of latent tokens and of steps: `e^mu`.

    mu is linear in the tokens, with the coefficients of the pipelines for 10 and for 200 steps, and linear in the steps
    between these; for more than 4,300 tokens it is that of 200 steps. The spacing is "trailing".

    >>> round(empirical_shift(1024, 10), 3), round(empirical_shift(4096, 50), 3), round(empirical_shift(8100, 4), 3)
    (7.3, 7.564, 6.22)
    """
    few, many = 8.73809524e-05 * num_tokens + 1.89833333, 0.00016927 * num_tokens + 0.45666666
    slope = (many - few) / 190
    return math.exp(many if num_tokens > 4300 else many + slope * (num_steps - 200))


def compressed_suffix(
    num_steps: int, shift: float, window_end: int, ratio: float, spacing: str = "trailing"
) -> np.ndarray:
    """The steps that follow the window, on a grid coarser by `ratio` (MixGRPO-Flash).

    The grid is spaced in t before the shift as the schedule is, and has `max(int((T - window_end + 1) ratio), 2)`
    points, so that a trajectory always reaches sigma = 0. A ratio of 1 gives the schedule's own tail.

    >>> compressed_suffix(25, shift=3.0, window_end=4, ratio=0.2).round(5)
    array([0.9403 , 0.79245, 0.53846, 0.     ], dtype=float32)

    Args:
      num_steps: number of steps T of the uncompressed schedule.
      shift: s.
      window_end: index one past the window's last step, in [0, T]. At T nothing follows and the result is [0.].
      ratio: in (0, 1].
      spacing: one of SPACINGS.

    Returns:
      [points] float32, from `shifted_sigmas(T, s, spacing)[window_end]` to 0.
    """
    if window_end == num_steps:
        return np.zeros(1, np.float32)
    start = _times(1.0, num_steps, shift, spacing)[window_end]
    num_points = max(int((num_steps - window_end + 1) * ratio), 2)
    return _shifted(_times(start, num_points - 1, shift, spacing), shift)


def _times(start: float, num_steps: int, shift: float, spacing: str) -> np.ndarray:
    """t of num_steps from start to 0."""
    if spacing == "trailing":
        return np.linspace(start, 0.0, num_steps + 1)
    return np.append(np.linspace(start, float(_shifted(np.asarray(1 / TRAIN_STEPS), shift)), num_steps), 0.0)


def _shifted(t: np.ndarray, shift: float) -> np.ndarray:
    return (shift * t / (1.0 + (shift - 1.0) * t)).astype(np.float32)
