"""FLUX.2: the transformer, its weights, and the policy that it makes with Qwen3 and an autoencoder."""

from mixgrpo_jax.models.flux2.model import (
    Flux2Config,
    apply,
    flops,
    flux2_dev,
    flux2_klein_4b,
    flux2_klein_9b,
    flux2_small,
    init,
)
from mixgrpo_jax.models.flux2.weights import TRANSFORMER

__all__ = [
    "TRANSFORMER",
    "Flux2Config",
    "apply",
    "flops",
    "flux2_dev",
    "flux2_klein_4b",
    "flux2_klein_9b",
    "flux2_small",
    "init",
]
