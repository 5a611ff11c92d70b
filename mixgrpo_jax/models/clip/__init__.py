"""CLIP: its two towers, and its weights by the names of three releases."""

from mixgrpo_jax.models.clip.model import (
    IGNORED,
    LOGIT_SCALE,
    PARTS,
    CLIPConfig,
    Params,
    clip_h14,
    clip_h14_378_quickgelu,
    clip_l14,
    clip_tiny,
    embed_images,
    embed_text,
    init,
    load,
    shapes,
    table,
    whole_table,
)

__all__ = [
    "IGNORED",
    "LOGIT_SCALE",
    "PARTS",
    "CLIPConfig",
    "Params",
    "clip_h14",
    "clip_h14_378_quickgelu",
    "clip_l14",
    "clip_tiny",
    "embed_images",
    "embed_text",
    "init",
    "load",
    "shapes",
    "table",
    "whole_table",
]
