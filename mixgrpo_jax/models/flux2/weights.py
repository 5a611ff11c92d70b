"""FLUX.2's weights: the rules of diffusers' tensors, and what of its config.json is supported."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixgrpo_jax.models.flux2.model import Flux2Config, init
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.transformer import Transformer
from mixgrpo_jax.models.io.weights import Rule

DOUBLE = "transformer_blocks.{i}"
SINGLE = "single_transformer_blocks.{i}"
EPS = 1e-6  # of all norms

linear = functools.partial(weights.linear, bias=False)


def _embedder(theirs: str, ours: str) -> list[Rule]:
    names = ("linear_1", "linear_2")
    return [rule for n in names for rule in linear(f"time_guidance_embed.{theirs}.{n}", f"{ours}/{n}")]


def _stream(ours: str, head: int, form: str, norm: str, out: str, mlp: str) -> list[Rule]:
    """The rules of a modality's weights of double blocks, of which `form`, `norm`, `out` and `mlp` name the tensors."""
    attention, ours = f"{DOUBLE}.attn", f"double_blocks/{ours}"
    return [
        *linear(f"{attention}.{form.format('q')}", f"{ours}/attention/q", rotary=head),
        *linear(f"{attention}.{form.format('k')}", f"{ours}/attention/k", rotary=head),
        *linear(f"{attention}.{form.format('v')}", f"{ours}/attention/v"),
        Rule(f"{attention}.{norm.format('q')}.weight", f"{ours}/attention/q_norm/scale", rotary=head),
        Rule(f"{attention}.{norm.format('k')}.weight", f"{ours}/attention/k_norm/scale", rotary=head),
        *linear(f"{attention}.{out}", f"{ours}/attention_out"),
        *linear(f"{DOUBLE}.{mlp}.linear_in", f"{ours}/mlp_in"),
        *linear(f"{DOUBLE}.{mlp}.linear_out", f"{ours}/mlp_out"),
    ]


def table(config: Flux2Config) -> list[Rule]:
    """The rules of diffusers' tensors."""
    head = config.attention_head_dim
    wide: Any = dict(rotary=head, turned=2 * config.width)  # queries, keys, and what is not rotated
    return [
        *linear("x_embedder", "image_in"),
        *linear("context_embedder", "text_in"),
        *_embedder("timestep_embedder", "time_in"),
        *_embedder("guidance_embedder", "guidance_in"),
        *linear("double_stream_modulation_img.linear", "image_modulation"),
        *linear("double_stream_modulation_txt.linear", "text_modulation"),
        *linear("single_stream_modulation.linear", "single_modulation"),
        *_stream("image", head, "to_{}", "norm_{}", "to_out.0", "ff"),
        *_stream("text", head, "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        *linear(f"{SINGLE}.attn.to_qkv_mlp_proj", "single_blocks/attention/qkv_mlp", **wide),
        Rule(f"{SINGLE}.attn.norm_q.weight", "single_blocks/attention/q_norm/scale", rotary=head),
        Rule(f"{SINGLE}.attn.norm_k.weight", "single_blocks/attention/k_norm/scale", rotary=head),
        *linear(f"{SINGLE}.attn.to_out", "single_blocks/out"),
        *linear("norm_out.linear", "final_modulation"),
        *linear("proj_out", "final_out"),
    ]


def _check(folder: Path, config: Flux2Config, fields: Mapping[str, Any]) -> None:
    needed = {"patch_size": 1, "out_channels": config.in_channels, "eps": EPS}
    found = {name: value if fields.get(name) is None else fields[name] for name, value in needed.items()}
    if found != needed:
        raise ValueError(f"{folder}: {_listed(found)} are not supported; use a model with {_listed(needed)}")


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


TRANSFORMER = Transformer(
    "Flux2Transformer2DModel", Flux2Config, init, table, {"patch_size": 1, "eps": EPS}, check=_check
)
