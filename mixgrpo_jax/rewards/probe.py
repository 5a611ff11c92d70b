"""A picture and a prompt that every copy of this package has, to see that a reward's weights are the right ones.

A reward with weights that were put in the wrong places still gives scores, and a run would learn from them. Its score
of this picture, taken once from the model's own release, tells:

    Image.fromarray(probe.picture()).save("probe.png")  # score this for probe.PROMPT with the release

    hps(weights, tokenizer, probe=...)  # raises, unless it comes near that score
"""

import math

import numpy as np

from mixgrpo_jax.rewards.contract import Reward

HEIGHT, WIDTH = 256, 320
PROMPT = "a red sun over a green field"
TOLERANCE = 0.02  # of the score; half precision stays well below


def picture() -> np.ndarray:
    """A sun over grass: uint8 [256, 320, 3]. Integers alone go into it, so that it is the same everywhere."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    sky = np.stack([120 + y // 4, 150 + y // 4, 235 - y // 8], axis=-1)
    grass = np.stack([40 + (x * y) % 31, 110 + (7 * x + 3 * y) % 61, 30 + (x ^ y) % 23], axis=-1)
    sun = ((x - 210) ** 2 + (y - 90) ** 2 < 50**2)[..., None]
    image = np.where((y < 170)[..., None], sky, grass)
    return np.where(sun, [225, 40, 30], image).astype(np.uint8)


def check(reward: Reward, expected: float, tolerance: float = TOLERANCE) -> None:
    """Raises ValueError unless the reward of `picture()` for `PROMPT` is `expected`, to within `tolerance` of that."""
    got = float(np.asarray(reward.score(picture()[None], [PROMPT], [{}]), np.float64)[0])
    if not math.isclose(got, expected, rel_tol=0, abs_tol=tolerance * abs(expected)):
        raise ValueError(
            f"reward {reward.name!r} scores the probe {got:.5g}, and {expected:.5g} was expected, to {tolerance:.1%}: "
            "its weights, its tokenizer or the model they are read as are not those that the value was taken from"
        )
