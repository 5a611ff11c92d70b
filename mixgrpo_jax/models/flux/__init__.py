"""FLUX.1: the transformer and its weights."""

from mixgrpo_jax.models.flux.latents import image_ids, pack, unpack
from mixgrpo_jax.models.flux.model import (
    FluxConfig,
    apply,
    flops,
    flux1_dev,
    flux1_schnell,
    flux_small,
    init,
)
from mixgrpo_jax.models.flux.weights import load_folder, read_config, save_folder

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
    "read_config",
    "save_folder",
    "unpack",
]
