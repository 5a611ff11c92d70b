"""CLIP's weights as open_clip names them: q, k and v are fused, and projections lie as they multiply from the right."""

from collections.abc import Mapping

import numpy as np

from mixgrpo_jax.models import clip
from mixgrpo_jax.models.clip.text import norm
from mixgrpo_jax.models.clip.vision import PATCH_AXES
from mixgrpo_jax.models.io.weights import Rule, linear


def table() -> list[Rule]:
    """Rules from open_clip's tensors to parameters. They serve to load only: q, k and v share a tensor."""
    text = [
        Rule("token_embedding.weight", "embedding"),
        Rule("positional_embedding", "positions"),
        *_blocks("transformer"),
        *norm("ln_final", "final_norm"),
        Rule("text_projection", "text_projection/kernel"),
    ]
    vision = [
        Rule("visual.class_embedding", "class_embedding"),
        Rule("visual.conv1.weight", "patch_embedding", PATCH_AXES),
        Rule("visual.positional_embedding", "positions"),
        *norm("visual.ln_pre", "pre_norm"),
        *_blocks("visual.transformer"),
        *norm("visual.ln_post", "post_norm"),
        Rule("visual.proj", "projection/kernel"),
    ]
    return clip.whole_table(text, vision)


def _blocks(prefix: str) -> list[Rule]:
    block = f"{prefix}.resblocks.{{i}}"
    return [
        *norm(f"{block}.ln_1", "blocks/attention_norm"),
        *(rule for row, name in enumerate("qkv") for rule in _row(f"{block}.attn.in_proj", f"blocks/{name}", row)),
        *linear(f"{block}.attn.out_proj", "blocks/attention_out"),
        *norm(f"{block}.ln_2", "blocks/mlp_norm"),
        *linear(f"{block}.mlp.c_fc", "blocks/mlp_in"),
        *linear(f"{block}.mlp.c_proj", "blocks/mlp_out"),
    ]


def _row(theirs: str, ours: str, row: int) -> list[Rule]:
    part = slice(row, row + 1)
    return [
        Rule(f"{theirs}_weight", f"{ours}/kernel", (1, 0), parts=part, of=3),
        Rule(f"{theirs}_bias", f"{ours}/bias", parts=part, of=3),
    ]


def rules_for(tensors: Mapping[str, np.ndarray]) -> list[Rule]:
    """The table for a CLIP's tensors, whose names say whether open_clip or transformers wrote them."""
    return table() if "visual.conv1.weight" in tensors else clip.table()
