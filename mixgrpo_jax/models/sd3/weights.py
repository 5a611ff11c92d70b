"""Stable Diffusion 3's weights: the rules of diffusers' tensors, and what of its config.json is supported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixgrpo_jax.models.io.transformer import Transformer
from mixgrpo_jax.models.io.weights import Rule, linear
from mixgrpo_jax.models.sd3.model import SD3Config, init

BLOCK = "transformer_blocks.{i}"


def _attention(theirs: str, ours: str, first: int, form: str = "to_{}", norm: str = "norm_{}") -> list[Rule]:
    rules = [rule for n in "qkv" for rule in linear(f"{theirs}.{form.format(n)}", f"{ours}/{n}", first=first)]
    norms = [Rule(f"{theirs}.{norm.format(n)}.weight", f"{ours}/{n}_norm/scale", first=first) for n in "qk"]
    return rules + norms


def _blocks(ours: str, first: int) -> list[Rule]:
    """The rules of a stack of blocks, the first of which is their block `first`. Not every kind of block has all."""

    def layer(theirs: str, path: str) -> list[Rule]:
        return linear(f"{BLOCK}.{theirs}", f"{ours}/{path}", first=first)

    return [
        *layer("norm1.linear", "image/modulation"),
        *_attention(f"{BLOCK}.attn", f"{ours}/image/attention", first),
        *layer("attn.to_out.0", "image/attention_out"),
        *_attention(f"{BLOCK}.attn2", f"{ours}/image/own/attention", first),
        *layer("attn2.to_out.0", "image/own/attention_out"),
        *layer("ff.net.0.proj", "image/mlp_in"),
        *layer("ff.net.2", "image/mlp_out"),
        *layer("norm1_context.linear", "text/modulation"),
        *_attention(f"{BLOCK}.attn", f"{ours}/text/attention", first, "add_{}_proj", "norm_added_{}"),
        *layer("attn.to_add_out", "text/attention_out"),
        *layer("ff_context.net.0.proj", "text/mlp_in"),
        *layer("ff_context.net.2", "text/mlp_out"),
    ]


def _embedder(theirs: str, ours: str) -> list[Rule]:
    return [rule for n in ("linear_1", "linear_2") for rule in linear(f"time_text_embed.{theirs}.{n}", f"{ours}/{n}")]


def table(config: SD3Config) -> list[Rule]:
    """The rules of diffusers' tensors."""
    return [
        Rule("pos_embed.proj.weight", "patch_embedding", (1, 2, 3, 0)),  # a convolution's (out, in, y, x)
        Rule("pos_embed.proj.bias", "patch_bias"),
        Rule("pos_embed.pos_embed", "position_table"),
        *linear("context_embedder", "text_in"),
        *_embedder("timestep_embedder", "time_in"),
        *_embedder("text_embedder", "pooled_in"),
        *_blocks("dual_blocks", 0),
        *_blocks("joint_blocks", len(config.dual_attention_layers)),
        *_blocks("last_blocks", config.num_layers - 1),
        *linear("norm_out.linear", "final_modulation"),
        *linear("proj_out", "final_out"),
    ]


def _check(folder: Path, config: SD3Config, fields: Mapping[str, Any]) -> None:
    if config.patch_size != 2 or config.out_channels != config.in_channels:
        raise ValueError(
            f"{folder}: patch_size={config.patch_size}, out_channels={config.out_channels} are not supported; use a "
            f"model with patch_size=2 and out_channels=in_channels={config.in_channels}"
        )


TRANSFORMER = Transformer("SD3Transformer2DModel", SD3Config, init, table, check=_check)
