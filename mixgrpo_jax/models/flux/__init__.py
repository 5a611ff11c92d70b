"""FLUX.1: the transformer and its weights."""

from mixgrpo_jax.models.flux.model import (
    FluxConfig,
    apply,
    flops,
    flux1_dev,
    flux1_schnell,
    flux_small,
    image_ids,
    init,
    pack,
    unpack,
)
from mixgrpo_jax.models.flux.weights import load_folder, save_folder

__all__ = [
    "FluxConfig",
    "apply",
    "flops",
    "flux1_dev",
    "flux1_schnell",
    "flux_small",
    "image_ids",
    "init",
    "load_folder",
    "pack",
    "save_folder",
    "unpack",
]
