"""ImageReward's weights: BLIP's towers and a head of linear layers, which is one affine map."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mixgrpo_jax.models.blip.model import BLIPConfig, init
from mixgrpo_jax.models.blip.vision import Params
from mixgrpo_jax.models.clip.text import norm
from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.lazy import place
from mixgrpo_jax.models.io.weights import Rule, linear

VISION, TEXT = "blip.visual_encoder", "blip.text_encoder"
VISION_BLOCK, TEXT_BLOCK = f"{VISION}.blocks.{{i}}", f"{TEXT}.encoder.layer.{{i}}"

# The head's layers by index in its release (those between are dropouts), and their widths.
HEAD = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}

# In the release and not read: BLIP's projections for contrastive training, and the positions 0, 1, 2, ...
UNUSED = (
    *(f"blip.{name}_proj.{kind}" for name in ("vision", "text") for kind in ("weight", "bias")),
    f"{TEXT}.embeddings.position_ids",
)


def _attention(theirs: str, ours: str) -> list[Rule]:
    return [
        *linear(f"{theirs}.self.query", f"{ours}/q"),
        *linear(f"{theirs}.self.key", f"{ours}/k"),
        *linear(f"{theirs}.self.value", f"{ours}/v"),
        *linear(f"{theirs}.output.dense", f"{ours}/out"),
        *norm(f"{theirs}.output.LayerNorm", f"{ours}/norm"),
    ]


TABLE = [
    Rule(f"{VISION}.cls_token", "vision/class_token"),
    Rule(f"{VISION}.pos_embed", "vision/positions"),
    Rule(f"{VISION}.patch_embed.proj.weight", "vision/patch_kernel", (2, 3, 1, 0)),
    Rule(f"{VISION}.patch_embed.proj.bias", "vision/patch_bias"),
    *norm(f"{VISION_BLOCK}.norm1", "vision/blocks/attention_norm"),
    *linear(f"{VISION_BLOCK}.attn.qkv", "vision/blocks/qkv"),
    *linear(f"{VISION_BLOCK}.attn.proj", "vision/blocks/attention_out"),
    *norm(f"{VISION_BLOCK}.norm2", "vision/blocks/mlp_norm"),
    *linear(f"{VISION_BLOCK}.mlp.fc1", "vision/blocks/mlp_in"),
    *linear(f"{VISION_BLOCK}.mlp.fc2", "vision/blocks/mlp_out"),
    *norm(f"{VISION}.norm", "vision/final_norm"),
    Rule(f"{TEXT}.embeddings.word_embeddings.weight", "text/embedding"),
    Rule(f"{TEXT}.embeddings.position_embeddings.weight", "text/positions"),
    *norm(f"{TEXT}.embeddings.LayerNorm", "text/norm"),
    *_attention(f"{TEXT_BLOCK}.attention", "text/blocks/attention"),
    *_attention(f"{TEXT_BLOCK}.crossattention", "text/blocks/cross_attention"),
    *linear(f"{TEXT_BLOCK}.intermediate.dense", "text/blocks/mlp_in"),
    *linear(f"{TEXT_BLOCK}.output.dense", "text/blocks/mlp_out"),
    *norm(f"{TEXT_BLOCK}.output.LayerNorm", "text/blocks/mlp_norm"),
    *(rule for layer in HEAD for rule in linear(f"mlp.layers.{layer}", f"head/{layer}")),
]


@functools.cache
def skeleton(config: BLIPConfig) -> Params:
    """Shapes of the parameters as released: {"vision": ..., "text": ..., "head": {"0": {"kernel", "bias"}, ...}}."""
    d_in = [config.text.hidden_size, *HEAD.values()]
    head = {
        layer: {"kernel": _shape(rows, columns), "bias": _shape(columns)}
        for (layer, columns), rows in zip(HEAD.items(), d_in)
    }
    return {**jax.eval_shape(functools.partial(init, config), jax.random.key(0)), "head": head}


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


def collapse(head: Params) -> Params:
    """Linear layers in a row as one, in fp32: x -> (x W_1 + b_1) W_2 + ... = x "kernel" + "bias"."""
    layers = [{name: np.asarray(array, np.float64) for name, array in head[layer].items()} for layer in HEAD]
    kernel, bias = layers[0]["kernel"], layers[0]["bias"]
    for layer in layers[1:]:
        kernel, bias = kernel @ layer["kernel"], bias @ layer["kernel"] + layer["bias"]
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def shapes(config: BLIPConfig, dtype: Any) -> Params:
    """What `load` gives, of whatever weights, as shapes; the towers in `dtype`."""
    towers = {name: tower for name, tower in skeleton(config).items() if name != "head"}
    head = {"kernel": _shape(config.text.hidden_size, 1), "bias": _shape(1)}
    return {**jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), towers), "head": head}


def load(config: BLIPConfig, tensors: Mapping[str, Any], dtype: Any = None) -> Params:
    """Parameters of ImageReward, on the host: those of `model.init`, and "head", an affine map in fp32.

    Args:
      config: the sizes of the release.
      tensors: the release by name, as `read_safetensors` gives it.
      dtype: of the towers; the tensors' own by default.

    Raises:
      ValueError: tensors that do not fit the config; the message names one. Everything is checked before any data are
        read.
    """
    read = functools.partial(weights.lazy_load, TABLE, skeleton(config), tensors, ignore=UNUSED)
    head = collapse(place(read(dtype=np.float32)["head"]))
    return {**place({tower: params for tower, params in read(dtype=dtype).items() if tower != "head"}), "head": head}
