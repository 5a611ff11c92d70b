"""Qwen3's transformer as a text encoder: ids of a chat to the features between its layers."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.weights import Rule, linear
from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.layers import Linear, RMSNorm
from mixgrpo_jax.models.nn.placement import spread
from mixgrpo_jax.models.nn.streams import stack
from mixgrpo_jax.models.policy import check_lengths

Params = dict[str, Any]

BLOCK = "model.layers.{i}"
RELEASE = {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
# The next token's logits: a matrix of its own in the large models, which no features need.
HEAD = ("lm_head.weight",)

TABLE = [
    Rule("model.embed_tokens.weight", "embedding"),
    Rule(f"{BLOCK}.input_layernorm.weight", "blocks/attention_norm/scale"),
    *linear(f"{BLOCK}.self_attn.q_proj", "blocks/q", bias=False),
    *linear(f"{BLOCK}.self_attn.k_proj", "blocks/k", bias=False),
    *linear(f"{BLOCK}.self_attn.v_proj", "blocks/v", bias=False),
    Rule(f"{BLOCK}.self_attn.q_norm.weight", "blocks/q_norm/scale"),
    Rule(f"{BLOCK}.self_attn.k_norm.weight", "blocks/k_norm/scale"),
    *linear(f"{BLOCK}.self_attn.o_proj", "blocks/attention_out", bias=False),
    Rule(f"{BLOCK}.post_attention_layernorm.weight", "blocks/mlp_norm/scale"),
    *linear(f"{BLOCK}.mlp.gate_proj", "blocks/mlp_gate", bias=False),
    *linear(f"{BLOCK}.mlp.up_proj", "blocks/mlp_in", bias=False),
    *linear(f"{BLOCK}.mlp.down_proj", "blocks/mlp_out", bias=False),
    Rule("model.norm.weight", "final_norm/scale"),
]


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3 model, named as in transformers' config.json, whose defaults for absent fields these are."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: positions turn pairs of channels")


def qwen3_4b() -> Qwen3Config:
    """Qwen3-4B, the text encoder of FLUX.2-klein-4B: 4.0 B parameters."""
    sizes = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_key_value_heads=8)
    return Qwen3Config(**sizes, rope_theta=1e6)


def qwen3_8b() -> Qwen3Config:
    """Qwen3-8B without its head, the text encoder of FLUX.2-klein-9B: 7.6 B parameters."""
    return dataclasses.replace(qwen3_4b(), hidden_size=4096, intermediate_size=12288)


def qwen3_tiny(**overrides) -> Qwen3Config:
    """Four layers for tests and for training from scratch on a small vocabulary."""
    sizes: dict[str, Any] = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return Qwen3Config(**(sizes | overrides))


class _Block(nnx.Module):
    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        d, d_ff, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        linear = functools.partial(Linear, bias=False, rngs=rngs)
        self.attention_norm = RMSNorm(d, eps=eps)
        self.q, self.k, self.v = linear(d, queries), linear(d, keys), linear(d, keys)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, eps=eps) for _ in range(2))
        self.attention_out = linear(queries, d)
        self.mlp_norm = RMSNorm(d, eps=eps)
        self.mlp_gate, self.mlp_in, self.mlp_out = linear(d, d_ff), linear(d, d_ff), linear(d_ff, d)
        self.head_dim = config.head_dim

    def __call__(self, x, turns, seen):
        h = self.attention_norm(x)
        q, k, v = (linear(h).reshape(*x.shape[:2], -1, self.head_dim) for linear in (self.q, self.k, self.v))
        k, v = (jnp.repeat(heads, q.shape[2] // k.shape[2], axis=2) for heads in (self.k_norm(k, turns), v))
        bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
        y = layers.attention(self.q_norm(q, turns), k, v, bias=bias)
        # Padding before the text sees nothing.
        x = x + self.attention_out(jnp.where(seen[:, 0].any(-1, keepdims=True), y, 0))
        h = self.mlp_norm(x)
        return x + self.mlp_out(jax.nn.silu(self.mlp_gate(h)) * self.mlp_in(h))


class _Tower(nnx.Module):
    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)))
        self.blocks = stack(functools.partial(_Block, config), config.num_hidden_layers, rngs)
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config

    def __call__(self, ids, mask, dtype, taps):
        angles = layers.rope_angles(jnp.arange(ids.shape[1])[:, None], (self.config.head_dim,), self.config.rope_theta)
        seen = np.tri(ids.shape[1], dtype=bool) & (mask[:, None, None] != 0)
        turns = layers.rotary(angles)

        def step(x, i):
            # Indexed here, because slices of the stacked parameters would be copies of them.
            block = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), self.blocks)
            return spread(block(x, turns, seen)), None

        x, features = spread(self.embedding[...][ids].astype(dtype)), []
        for first, last in itertools.pairwise((0, *taps)):
            x = jax.lax.scan(step, x, jnp.arange(first, last))[0]
            features.append(self.final_norm(x) if last == self.config.num_hidden_layers else x)
        return jnp.concatenate(features, axis=-1)


@functools.cache
def _graphdef(config: Qwen3Config) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Tower(config, rngs=nnx.Rngs(0))))[0]


def init(config: Qwen3Config, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch: embeddings of unit scale, kernels LeCun normal."""
    return nnx.to_pure_dict(nnx.state(_Tower(config, rngs=nnx.Rngs(key))))


def apply(
    config: Qwen3Config,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    layers: Sequence[int] = (9, 18, 27),
) -> jax.Array:
    """Features of token ids between the layers of the model. Layers after the last of these are not computed.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      ids: [P, L], int32.
      mask: [P, L], 0 where ids are padding, which no token attends to. Attention is causal, and positions count
        padding, so that padding after the text does not change the text's features; it has features of its own.
      dtype: dtype of the matmuls; norms and rotations are fp32 in any case.
      layers: the numbers of layers after which to take the features, ascending; those after all layers are normalised.

    Returns:
      Features [P, L, len(layers) hidden_size] in `dtype`, side by side.

    Raises:
      ValueError: `layers` do not ascend, or are not of the model.
    """
    ascend = all(a < b for a, b in itertools.pairwise((0, *layers)))
    if not layers or not ascend or layers[-1] > config.num_hidden_layers:
        raise ValueError(f"layers={tuple(layers)} must ascend from 1 to num_hidden_layers={config.num_hidden_layers}")
    return nnx.merge(_graphdef(config), params)(ids, mask, dtype, layers)


def chats(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts as a user's words in a chat that the model is to answer without thinking aloud.

    Raises ValueError for a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: fetch its folder again, chat_template.jinja with it")
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options) for prompt in prompts]


def tokenize(tokenizer: Any, prompts: Sequence[str], limit: int, cut: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of `chats` of prompts, each [P, limit] int32, padded on the side of the tokenizer.

    Raises ValueError as `chats` does, and for a chat of more than `limit` tokens, unless it is to be cut.
    """
    encoded = tokenizer(chats(tokenizer, prompts), padding="max_length", max_length=limit, truncation=cut)
    check_lengths(prompts, encoded["input_ids"], limit)
    return np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["attention_mask"], np.int32)


def read_config(folder: str | os.PathLike) -> Qwen3Config:
    """The sizes in a folder's config.json. Raises ValueError for a folder of another model."""
    raw = weights.read_config(folder, RELEASE)
    # Older files have the base of the angles in an entry of its own, and how they change with the length in this one.
    rope = (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f"{Path(folder) / 'config.json'} has rope_type={kind!r}, and this model needs 'default'")
    return weights.sized(Qwen3Config, folder, raw | {name: rope[name] for name in rope if name == "rope_theta"})


def load_folder(folder: str | os.PathLike, dtype: Any = None) -> tuple[Qwen3Config, Params]:
    """Reads a Qwen3ForCausalLM as transformers saves it, without its head.

    Returns the config and the parameters as host arrays, in `dtype` or else in the files' own. Raises ValueError for a
    folder of another model, or tensors that do not fit the config.
    """
    config = read_config(folder)
    skeleton = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return config, weights.load(TABLE, skeleton, weights.read_safetensors(folder), dtype=dtype, ignore=HEAD)


def save_folder(folder: str | os.PathLike, config: Qwen3Config, params: Params) -> None:
    """Writes a folder that `load_folder` and transformers' Qwen3ForCausalLM.from_pretrained open.

    The head that transformers gives it is the embedding.
    """
    fields = {"architectures": ["Qwen3ForCausalLM"], **RELEASE, "tie_word_embeddings": True}
    weights.write_config(folder, fields | dataclasses.asdict(config))
    weights.write_safetensors(Path(folder) / "model.safetensors", weights.export(TABLE, params))
