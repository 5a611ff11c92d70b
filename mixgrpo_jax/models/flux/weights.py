"""FLUX.1's weights: the rules of diffusers' tensors, and what of its config.json is supported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixgrpo_jax.models.flux import release
from mixgrpo_jax.models.flux.model import FluxConfig, init
from mixgrpo_jax.models.io.transformer import Transformer
from mixgrpo_jax.models.io.weights import Rule, linear

DOUBLE = "transformer_blocks.{i}"
SINGLE = "single_transformer_blocks.{i}"


def _embedder(theirs: str, ours: str) -> list[Rule]:
    return [rule for n in ("linear_1", "linear_2") for rule in linear(f"time_text_embed.{theirs}.{n}", f"{ours}/{n}")]


def table(config: FluxConfig) -> list[Rule]:
    """The rules of diffusers' tensors."""
    head = config.attention_head_dim
    return [
        *linear("x_embedder", "image_in"),
        *linear("context_embedder", "text_in"),
        *_embedder("timestep_embedder", "time_in"),
        *_embedder("guidance_embedder", "guidance_in"),
        *_embedder("text_embedder", "pooled_in"),
        *linear(f"{DOUBLE}.norm1.linear", "double_blocks/image/modulation"),
        *linear(f"{DOUBLE}.attn.to_q", "double_blocks/image/attention/q", rotary=head),
        *linear(f"{DOUBLE}.attn.to_k", "double_blocks/image/attention/k", rotary=head),
        *linear(f"{DOUBLE}.attn.to_v", "double_blocks/image/attention/v"),
        Rule(f"{DOUBLE}.attn.norm_q.weight", "double_blocks/image/attention/q_norm/scale", rotary=head),
        Rule(f"{DOUBLE}.attn.norm_k.weight", "double_blocks/image/attention/k_norm/scale", rotary=head),
        *linear(f"{DOUBLE}.attn.to_out.0", "double_blocks/image/attention_out"),
        *linear(f"{DOUBLE}.ff.net.0.proj", "double_blocks/image/mlp_in"),
        *linear(f"{DOUBLE}.ff.net.2", "double_blocks/image/mlp_out"),
        *linear(f"{DOUBLE}.norm1_context.linear", "double_blocks/text/modulation"),
        *linear(f"{DOUBLE}.attn.add_q_proj", "double_blocks/text/attention/q", rotary=head),
        *linear(f"{DOUBLE}.attn.add_k_proj", "double_blocks/text/attention/k", rotary=head),
        *linear(f"{DOUBLE}.attn.add_v_proj", "double_blocks/text/attention/v"),
        Rule(f"{DOUBLE}.attn.norm_added_q.weight", "double_blocks/text/attention/q_norm/scale", rotary=head),
        Rule(f"{DOUBLE}.attn.norm_added_k.weight", "double_blocks/text/attention/k_norm/scale", rotary=head),
        *linear(f"{DOUBLE}.attn.to_add_out", "double_blocks/text/attention_out"),
        *linear(f"{DOUBLE}.ff_context.net.0.proj", "double_blocks/text/mlp_in"),
        *linear(f"{DOUBLE}.ff_context.net.2", "double_blocks/text/mlp_out"),
        *linear(f"{SINGLE}.norm.linear", "single_blocks/modulation"),
        *linear(f"{SINGLE}.attn.to_q", "single_blocks/attention/q", rotary=head),
        *linear(f"{SINGLE}.attn.to_k", "single_blocks/attention/k", rotary=head),
        *linear(f"{SINGLE}.attn.to_v", "single_blocks/attention/v"),
        Rule(f"{SINGLE}.attn.norm_q.weight", "single_blocks/attention/q_norm/scale", rotary=head),
        Rule(f"{SINGLE}.attn.norm_k.weight", "single_blocks/attention/k_norm/scale", rotary=head),
        *linear(f"{SINGLE}.proj_mlp", "single_blocks/mlp_in"),
        *linear(f"{SINGLE}.proj_out", "single_blocks/out"),
        *linear("norm_out.linear", "final_modulation"),
        *linear("proj_out", "final_out"),
    ]


def _check(folder: Path, config: FluxConfig, fields: Mapping[str, Any]) -> None:
    if fields.get("patch_size", 1) != 1 or (fields.get("out_channels") or config.in_channels) != config.in_channels:
        raise ValueError(
            f"{folder}: patch_size={fields.get('patch_size')}, out_channels={fields.get('out_channels')} are not "
            f"supported; use a model with patch_size=1 and out_channels=in_channels={config.in_channels}"
        )


TRANSFORMER = Transformer("FluxTransformer2DModel", FluxConfig, init, table, {"patch_size": 1}, _check, release)
