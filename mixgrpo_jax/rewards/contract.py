"""The contract that every reward keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

Images = np.ndarray | jax.Array  # uint8 [B, H, W, 3]


@dataclass(frozen=True)
class Reward:
    """A score of each image for its prompt; larger is better.

    Attributes:
        name: how logs and configs call it.
        where: "device" if `score` only enqueues work on the accelerator, "host" if it keeps the CPU busy.
        score: `(images, prompts, metadata) -> scores`, with images uint8 [B, H, W, 3], B prompts, and for each prompt
            the dict that came with it from the data; scores are float32 [B]. It may raise: a run stops rather than
            learn from a made-up score. Scores that are not finite are refused by `score_all`.
    """

    name: str
    where: Literal["device", "host"]
    score: Callable[[Images, list[str], list[dict]], Images]
