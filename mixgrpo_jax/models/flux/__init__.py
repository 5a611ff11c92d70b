"""FLUX.1: the transformer, its weights, and the policy that it makes with T5, CLIP and an autoencoder."""

from mixgrpo_jax.models.flux.model import (
    FluxConfig,
    apply,
    flops,
    flux1_dev,
    flux1_schnell,
    flux_small,
    init,
)
from mixgrpo_jax.models.flux.weights import TRANSFORMER

__all__ = [
    "TRANSFORMER",
    "FluxConfig",
    "apply",
    "flops",
    "flux1_dev",
    "flux1_schnell",
    "flux_small",
    "init",
]
