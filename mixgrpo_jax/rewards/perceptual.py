"""What a picture's encoder tells beside a score: where in it something is, and how unlike the others of a group it is.

The encoder is CLIP's image tower, from any weights of a CLIP reward, or "pixels": the picture itself, in cells. The
file is long because both rewards read it.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mixgrpo_jax.models import clip
from mixgrpo_jax.models.clip import CLIPConfig, vision
from mixgrpo_jax.rewards.clip import load_params
from mixgrpo_jax.rewards.contract import Reward, Score
from mixgrpo_jax.rewards.on_device import Options, build
from mixgrpo_jax.rewards.preprocess import preprocess

Kind = Literal["clip", "pixels"]


@dataclass(frozen=True)
class Encoder:
    """Features of pictures [B, H, W, 3], uint8 or float: by patch, and as one unit vector."""

    config: CLIPConfig | None
    cell: tuple[int, int]
    dtype: Any

    def patches(self, params: Any, images: jax.Array) -> jax.Array:
        """[B, rows, columns, D], fp32, of the squashed picture."""
        if self.config is None:
            (b, h, w, _), (dy, dx) = images.shape, self.cell
            cells = jnp.asarray(images, jnp.float32).reshape(b, h // dy, dy, w // dx, dx, 3).swapaxes(2, 3) / 255
            return cells.reshape(b, h // dy, w // dx, dy * dx * 3)
        sizes = self.config.vision
        pixels, side = preprocess(images, sizes.image_size, resize="squash"), sizes.image_size // sizes.patch_size
        found = vision.features(sizes, params["vision"], pixels, self.dtype).astype(jnp.float32)
        return found.reshape(len(found), side, side, -1)

    def vector(self, params: Any, images: jax.Array) -> jax.Array:
        """[B, D], fp32, of length 1."""
        if self.config is not None:
            pixels = preprocess(images, self.config.vision.image_size)
            return clip.embed_images(self.config, params, pixels, self.dtype)
        means = jnp.asarray(images, jnp.float32).reshape(len(images), -1) - 127.5
        return means / jnp.maximum(jnp.linalg.norm(means, axis=-1, keepdims=True), 1e-6)


def saliency(
    weights: str | os.PathLike | None = None,
    *,
    encoder: Kind = "clip",
    cell: tuple[int, int] = (16, 16),
    smooth: float = 1.0,
    config: CLIPConfig | None = None,
    **options: Unpack[Options],
) -> Reward:
    """ViPO's map (arXiv 2511.18719) beside a score of 0: to be watched, and named in advantage.map.

    The three largest principal components of a picture's features, each brought to [0, 1] and added up by its share of
    their variance; smoothed, brought to the latent's grid, and to [0, 1]. A picture without features has a map of ones.
    The paper's encoder is DINOv2. Which end of a component is 1, the paper does not say, and a released program leaves
    to the solver: here it is the rarer one, that of the third moment's sign.

    Args:
        weights: of the encoder "clip", as of `clipscore`; None is shapes.
        encoder: "clip" or "pixels".
        cell: pixels of a latent position, rows and columns.
        smooth: standard deviation of the smoothing, in patches.
        config: another model than ViT-H/14.
        options: see `rewards.on_device.Options`.

    Raises:
        ValueError: weights that do not fit.
    """
    own, params = _encoder(weights, encoder, cell, config, options)

    def score(params: Any, images: jax.Array, inputs: Any) -> Score:
        del inputs
        found = own.patches(params, images)
        grid = images.shape[1] // cell[0], images.shape[2] // cell[1]
        maps = jax.vmap(functools.partial(_map, smooth=smooth, grid=grid))(found)
        return Score(jnp.zeros(len(images)), maps.reshape(len(images), -1))

    return build("saliency", score, params, lambda prompts, metadata: None, options)


def novelty(
    weights: str | os.PathLike | None = None,
    *,
    encoder: Kind = "clip",
    neighbours: int = 1,
    config: CLIPConfig | None = None,
    **options: Unpack[Options],
) -> Reward:
    """log of the distance to the nearest picture of the group: as a reward it pays for what the others are not.

    An approximation of PEC (arXiv 2605.12112): published is that a step's entropy is the schedule's, and that diversity
    is to be kept in a perceptual space (PickScore's, DINO's, CLIP's), and no estimator. Chosen was the entropy of
    Kozachenko and Leonenko by sample, log of the distance to the k-th neighbour; the weight of the reward is the
    constraint's. Alone, a picture scores 0.

    Args:
        weights, encoder, config, options: as in `saliency`.
        neighbours: k.

    Raises:
        ValueError: weights that do not fit, or neighbours below 1.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} must be at least 1")
    own, params = _encoder(weights, encoder, (1, 1), config, options)

    def score(params: Any, images: jax.Array, inputs: Any) -> Score:
        del inputs
        return Score(jnp.zeros(len(images)), None, own.vector(params, images))

    reward = build("novelty", score, params, lambda prompts, metadata: None, options)
    return Reward(reward.name, reward.where, reward.score, functools.partial(log_distance, neighbours=neighbours))


def log_distance(features: np.ndarray, group: np.ndarray, neighbours: int = 1) -> np.ndarray:
    """log of the distance of features [B, D] to their k-th nearest of the same group, [B]; k is at most the others."""
    distance = np.linalg.norm(features[:, None] - features, axis=-1)
    result = np.zeros(len(features), np.float32)
    for one in np.unique(group):
        members = np.flatnonzero(group == one)
        if len(members) > 1:
            ranked = np.sort(distance[np.ix_(members, members)], axis=1)  # itself is first
            result[members] = np.log(np.maximum(ranked[:, min(neighbours, len(members) - 1)], 1e-6))
    return result


def _map(features: jax.Array, smooth: float, grid: tuple[int, int]) -> jax.Array:
    """[rows, columns, D] -> [*grid] in [0, 1]."""
    rows, columns, _ = features.shape
    flat = features.reshape(rows * columns, -1)
    flat -= flat.mean(0)
    variance, vectors = jnp.linalg.eigh(flat @ flat.T)  # ascending
    components = vectors[:, -3:] * jnp.sign((vectors[:, -3:] ** 3).sum(0))
    share = jnp.maximum(variance[-3:], 0) / jnp.maximum(variance[-3:].sum(), 1e-8)
    total = (share * _unit(components)).sum(1).reshape(rows, columns)
    total = _gaussian(rows, smooth) @ total @ _gaussian(columns, smooth).T
    return _unit(jax.image.resize(total, grid, "linear", antialias=True).reshape(-1, 1))[:, 0]


def _unit(values: jax.Array) -> jax.Array:
    """Each column [N, K] brought to [0, 1]; 1 where all are the same."""
    low, high = values.min(0), values.max(0)
    return jnp.where(high - low > 1e-6, (values - low) / jnp.maximum(high - low, 1e-6), 1.0)


def _gaussian(size: int, width: float) -> jax.Array:
    """The matrix that smooths an axis of that size; its rows sum to 1."""
    distance = jnp.arange(size)[:, None] - jnp.arange(size)
    kernel = jnp.exp(-jnp.square(distance / max(width, 1e-3)) / 2)
    return kernel / kernel.sum(1, keepdims=True)


def _encoder(weights: Any, encoder: str, cell: Any, config: CLIPConfig | None, options: Options) -> tuple[Encoder, Any]:
    dtype = options.get("dtype", jnp.bfloat16)
    if encoder == "pixels":
        return Encoder(None, tuple(cell), dtype), {}
    if encoder != "clip":
        raise ValueError(f"encoder={encoder!r} is unknown: choose 'clip' or 'pixels'")
    sizes = config or clip.clip_h14()
    return Encoder(sizes, tuple(cell), dtype), load_params(weights, sizes, options, parts=("vision",))
