"""The contract that every reward keeps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

Array = np.ndarray | jax.Array
Images = Array  # uint8 [B, H, W, 3]


class Score(NamedTuple):
    """What a reward gives a batch of images; arrays of NumPy or JAX.

    value: [B]; larger is better.
    map: None, or [B, S]: how much of the value each of the S latent positions earned, for spatial credit.
    features: None, or [B, D]: what the reward's `of_group` makes the value of, once it sees whole groups.
    """

    value: Any
    map: Any = None
    features: Any = None


class Missing(NamedTuple):
    """Why an image has no score, and whether it may have one when it is asked for later: `passing`."""

    why: str
    passing: bool


class Incomplete(NamedTuple):
    """A `Score` of some images: those in `missing`, by position, have none, whatever stands in its arrays."""

    value: Any
    missing: Mapping[int, Missing]
    map: Any = None
    features: Any = None


def as_incomplete(given: Array | Score | Incomplete) -> Incomplete:
    """What a reward returned, and which images are missing of it."""
    if isinstance(given, Incomplete):
        return given
    return Incomplete(given.value, {}, *given[1:]) if isinstance(given, Score) else Incomplete(given, {})


@runtime_checkable
class Differentiable(Protocol):
    """What the `score` of a differentiable reward has beside it; `on_device.OnDevice` is one."""

    @property
    def function(self) -> Callable[..., jax.Array]:
        """`(params, images, inputs) -> scores [B]`, pure JAX, differentiable in float images [B, H, W, 3], 0 to 255."""

    @property
    def params(self) -> Any:
        """Of the function: a tree of arrays, which may be empty."""

    @property
    def inputs(self) -> Callable[[list[str], list[dict]], Any]:
        """`(prompts, metadata) -> ` what the function is told of each image: a tree of arrays, [B, ...] each."""


@dataclass(frozen=True)
class Reward:
    """A score of each image for its prompt; larger is better.

    Attributes:
        name: how logs and configs call it.
        where: "device" if `score` only enqueues work on the accelerator, "host" if it keeps the CPU busy.
        score: `(images, prompts, metadata) -> scores`, with images uint8 [B, H, W, 3], B prompts, and for each prompt
            the dict that came with it from the data; scores are float32 [B], a `Score`, or an `Incomplete`, where some
            images may be left out. It may raise: a run stops rather than learn from a made-up score. Scores that are
            not finite are refused by `score_all`.
        of_group: None, or `(features [B, D], group [B]) -> values [B]` on the host, of rewards that compare the images
            of a prompt; where there is no group, the score's own value stands.
    """

    name: str
    where: Literal["device", "host"]
    score: Callable[[Images, list[str], list[dict]], Array | Score | Incomplete]
    of_group: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    @property
    def differentiable(self) -> Differentiable | None:
        """`score`, if it is differentiable in float images and the reward is its value; otherwise None."""
        return self.score if self.of_group is None and isinstance(self.score, Differentiable) else None
