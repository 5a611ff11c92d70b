"""FLUX.1 in its original release: one safetensors file, whose tensors' shapes give all sizes.

Queries, keys and values are fused there, in single blocks with the MLP's first layer too, and the last modulation is
(shift, scale) where diffusers and `flux.model` have (scale, shift).
"""

import os
from collections.abc import Mapping

import numpy as np

from mixgrpo_jax.models.flux.model import MLP_RATIO, FluxConfig
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.weights import Rule, linear

# Of the transformer's tensors, in a file that may hold a text encoder and a VAE as well.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
SWAPPED = slice(None, None, -1)
SIZING = (  # tensors whose shapes give the sizes
    "img_in.weight",
    "txt_in.weight",
    "vector_in.in_layer.weight",
    "single_blocks.0.norm.query_norm.scale",
    "final_layer.linear.weight",
)


def _embedder(theirs: str, ours: str) -> list[Rule]:
    return linear(f"{theirs}.in_layer", f"{ours}/linear_1") + linear(f"{theirs}.out_layer", f"{ours}/linear_2")


def _heads(fused: str, norm: str, ours: str, of: int, head: int) -> list[Rule]:
    return [
        *linear(fused, f"{ours}/q", parts=slice(0, 1), of=of, rotary=head),
        *linear(fused, f"{ours}/k", parts=slice(1, 2), of=of, rotary=head),
        *linear(fused, f"{ours}/v", parts=slice(2, 3), of=of),
        Rule(f"{norm}.query_norm.scale", f"{ours}/q_norm/scale", rotary=head),
        Rule(f"{norm}.key_norm.scale", f"{ours}/k_norm/scale", rotary=head),
    ]


def _stream(theirs: str, ours: str, head: int) -> list[Rule]:
    theirs, ours = f"double_blocks.{{i}}.{theirs}", f"double_blocks/{ours}"
    return [
        *linear(f"{theirs}_mod.lin", f"{ours}/modulation"),
        *_heads(f"{theirs}_attn.qkv", f"{theirs}_attn.norm", f"{ours}/attention", 3, head),
        *linear(f"{theirs}_attn.proj", f"{ours}/attention_out"),
        *linear(f"{theirs}_mlp.0", f"{ours}/mlp_in"),
        *linear(f"{theirs}_mlp.2", f"{ours}/mlp_out"),
    ]


SINGLE = "single_blocks.{i}"
FUSED = 3 + MLP_RATIO  # widths in the rows of a single block's first layer: q, k, v, and the MLP


def table(config: FluxConfig) -> list[Rule]:
    """The rules of the file's tensors."""
    head = config.attention_head_dim
    return [
        *linear("img_in", "image_in"),
        *linear("txt_in", "text_in"),
        *_embedder("time_in", "time_in"),
        *_embedder("guidance_in", "guidance_in"),
        *_embedder("vector_in", "pooled_in"),
        *_stream("img", "image", head),
        *_stream("txt", "text", head),
        *linear(f"{SINGLE}.modulation.lin", "single_blocks/modulation"),
        *_heads(f"{SINGLE}.linear1", f"{SINGLE}.norm", "single_blocks/attention", FUSED, head),
        *linear(f"{SINGLE}.linear1", "single_blocks/mlp_in", parts=slice(3, FUSED), of=FUSED),
        *linear(f"{SINGLE}.linear2", "single_blocks/out"),
        *linear("final_layer.adaLN_modulation.1", "final_modulation", parts=SWAPPED, of=2),
        *linear("final_layer.linear", "final_out"),
    ]


def recognises(file: str | os.PathLike) -> bool:
    """Whether the file's tensors have the names of an original release of FLUX.1."""
    return set(SIZING) <= set(_tensors(file))


def read_file(file: str | os.PathLike) -> tuple[FluxConfig, Mapping[str, np.ndarray]]:
    """The config and the tensors, named as in `table`, of an original release.

    Names may have one of `PREFIXES`; tensors without it are then of other models, and left out.
    Raises ValueError for a file of another model, or of a FLUX.1 model with additional input channels.
    """
    tensors = _tensors(file)
    if absent := [name for name in SIZING if name not in tensors]:
        raise ValueError(f"{file} has no tensor {absent[0]}, it is no original release of FLUX.1")
    config = config_of(tensors)
    if (outputs := tensors["final_layer.linear.weight"].shape[0]) != config.in_channels:
        raise ValueError(
            f"{file}: img_in takes {config.in_channels} channels and final_layer gives {outputs}, which is not "
            "supported; use a text-to-image model, where both are 64"
        )
    return config, tensors


def _tensors(file: str | os.PathLike) -> Mapping[str, np.ndarray]:
    tensors = weights.read_safetensors(file)
    found = [prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)]
    return weights.read_safetensors(file, prefix=found[0]) if found else tensors


def config_of(tensors: Mapping[str, np.ndarray]) -> FluxConfig:
    """The sizes that the tensors' shapes tell."""
    width, in_channels = tensors["img_in.weight"].shape
    (head,) = tensors["single_blocks.0.norm.query_norm.scale"].shape
    return FluxConfig(
        in_channels=in_channels,
        num_layers=_count("double_blocks", tensors),
        num_single_layers=_count("single_blocks", tensors),
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=tensors["txt_in.weight"].shape[1],
        pooled_projection_dim=tensors["vector_in.in_layer.weight"].shape[1],
        guidance_embeds="guidance_in.in_layer.weight" in tensors,
        axes_dims_rope=(head // 8, 7 * head // 16, 7 * head // 16),  # no tensor tells; FLUX.1's own proportions
    )


def _count(blocks: str, tensors: Mapping[str, np.ndarray]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})
