"""AutoencoderKL and AutoencoderKLFlux2, and their weights."""

from mixgrpo_jax.models.vae.model import (
    VAEConfig,
    decode,
    encode,
    flux2_vae,
    init,
    restore,
    standardise,
    to_latents,
    vae_16,
    vae_tiny,
)
from mixgrpo_jax.models.vae.tiling import tiled_decode
from mixgrpo_jax.models.vae.weights import load_folder, read_config, save_folder

__all__ = [
    "VAEConfig",
    "decode",
    "encode",
    "flux2_vae",
    "init",
    "load_folder",
    "read_config",
    "restore",
    "save_folder",
    "standardise",
    "tiled_decode",
    "to_latents",
    "vae_16",
    "vae_tiny",
]
