"""Stable Diffusion 3 and 3.5: the transformer, its weights, and the policy that it makes with CLIP, T5 and a VAE."""

from mixgrpo_jax.models.sd3.model import (
    SD3Config,
    apply,
    flops,
    init,
    sd3_medium,
    sd3_small,
    sd35_large,
    sd35_medium,
)
from mixgrpo_jax.models.sd3.weights import TRANSFORMER

__all__ = [
    "TRANSFORMER",
    "SD3Config",
    "apply",
    "flops",
    "init",
    "sd3_medium",
    "sd3_small",
    "sd35_large",
    "sd35_medium",
]
