"""AutoencoderKL, and its weights."""

from mixgrpo_jax.models.vae.model import VAEConfig, decode, encode, init, to_latents, vae_tiny
from mixgrpo_jax.models.vae.tiling import tiled_decode
from mixgrpo_jax.models.vae.weights import load_folder, read_config, save_folder

__all__ = [
    "VAEConfig",
    "decode",
    "encode",
    "init",
    "load_folder",
    "read_config",
    "save_folder",
    "tiled_decode",
    "to_latents",
    "vae_tiny",
]
