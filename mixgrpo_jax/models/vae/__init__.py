"""The autoencoder of FLUX.1 and Stable Diffusion, and its weights."""

from mixgrpo_jax.models.vae.model import VAEConfig, decode, encode, flux_vae, init, to_latents, vae_tiny
from mixgrpo_jax.models.vae.tiling import tiled_decode
from mixgrpo_jax.models.vae.weights import load_folder, read_config, save_folder

__all__ = [
    "VAEConfig",
    "decode",
    "encode",
    "flux_vae",
    "init",
    "load_folder",
    "read_config",
    "save_folder",
    "tiled_decode",
    "to_latents",
    "vae_tiny",
]
