"""CLIP's text encoder: token ids to features and one pooled vector."""

import dataclasses
import functools
import os
from collections.abc import Callable
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
from mixgrpo_jax.models.nn.layers import Linear, normal

Params = dict[str, Any]

RELEASE = {"model_type": "clip_text_model"}
PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
# In front of every tensor but the projection's. transformers 5 saves a plain encoder without it, and reads both.
PREFIX = "text_model."
# The id by which older configs say that the end of text is the vocabulary's largest id in the sequence.
LEGACY_EOS = 2

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def norm(theirs: str, ours: str) -> list[Rule]:
    """Rules of a layer norm."""
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def block_table(prefix: str) -> list[Rule]:
    """Rules of a tower's blocks; `prefix` stands before transformers' names of its tensors."""
    block = f"{prefix}encoder.layers.{{i}}"
    return [
        *norm(f"{block}.layer_norm1", "blocks/attention_norm"),
        *linear(f"{block}.self_attn.q_proj", "blocks/q"),
        *linear(f"{block}.self_attn.k_proj", "blocks/k"),
        *linear(f"{block}.self_attn.v_proj", "blocks/v"),
        *linear(f"{block}.self_attn.out_proj", "blocks/attention_out"),
        *norm(f"{block}.layer_norm2", "blocks/mlp_norm"),
        *linear(f"{block}.mlp.fc1", "blocks/mlp_in"),
        *linear(f"{block}.mlp.fc2", "blocks/mlp_out"),
    ]


def table(prefix: str = PREFIX) -> list[Rule]:
    """Rules from transformers' tensors to parameters; `prefix` stands before the names of the encoder's tensors."""
    return [
        Rule(f"{prefix}embeddings.token_embedding.weight", "embedding"),
        Rule(f"{prefix}embeddings.position_embedding.weight", "positions"),
        *block_table(prefix),
        *norm(f"{prefix}final_layer_norm", "final_norm"),
        *linear("text_projection", "text_projection", bias=False),
    ]


@dataclass(frozen=True)
class TowerConfig:
    """Sizes that CLIP's text and image encoders share, named as in transformers' config.json."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown: choose one of {tuple(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )


@dataclass(frozen=True)
class CLIPTextConfig(TowerConfig):
    """Sizes of a CLIP text encoder, named as in transformers' config.json.

    `projection_dim` is None for an encoder without a projection of its pooled vector.
    """

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(f"eos_token_id={self.eos_token_id} must be an id below vocab_size={self.vocab_size}")


def clip_l() -> CLIPTextConfig:
    """The text encoder of openai/clip-vit-large-patch14, without its projection: 123 M parameters."""
    return CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)


def clip_tiny(**overrides) -> CLIPTextConfig:
    """A two-layer encoder for tests and for training from scratch on a small vocabulary."""
    sizes: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        eos_token_id=63,
    )
    return CLIPTextConfig(**(sizes | overrides))


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias over the last axis, in fp32."""

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape and dtype as x [..., dim]."""
        y = layers.layer_norm(x.astype(jnp.float32), self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block of CLIP's towers; `bias` [1, 1, S, S] is added to the attention's logits."""

    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        d, d_ff = config.hidden_size, config.intermediate_size
        # What is added to the residual stream is scaled down with depth.
        residual = normal((2 * config.num_hidden_layers * d) ** -0.5)
        self.attention_norm = LayerNorm(d, eps=config.layer_norm_eps)
        self.q, self.k, self.v = (Linear(d, d, init=normal(d**-0.5), rngs=rngs) for _ in range(3))
        self.attention_out = Linear(d, d, init=residual, rngs=rngs)
        self.mlp_norm = LayerNorm(d, eps=config.layer_norm_eps)
        self.mlp_in = Linear(d, d_ff, init=normal((2 * d) ** -0.5), rngs=rngs)
        self.mlp_out = Linear(d_ff, d, init=residual, rngs=rngs)
        self.heads, self.activation = config.num_attention_heads, config.hidden_act

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """[B, S, D] -> [B, S, D]; without `bias` every token attends to all."""
        h = self.attention_norm(x)
        q, k, v = (linear(h).reshape(*x.shape[:2], self.heads, -1) for linear in (self.q, self.k, self.v))
        x = x + self.attention_out(layers.attention(q, k, v, bias=bias))
        return x + self.mlp_out(ACTIVATIONS[self.activation](self.mlp_in(self.mlp_norm(x))))


def make_blocks(config: TowerConfig, rngs: nnx.Rngs) -> Block:
    """A tower's blocks, stacked along the first axis of their parameters."""
    keys = jax.random.split(rngs.params(), config.num_hidden_layers)
    return jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)


def apply_blocks(blocks: Block, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """The stacked blocks one after the other: [B, S, D] -> [B, S, D]."""
    return jax.lax.scan(lambda x, block: (block(x, bias), None), x, blocks)[0]


class _Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.blocks = make_blocks(config, rngs)
        self.embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocab_size, d), jnp.float32))
        self.positions = nnx.Param(normal(0.01)(rngs.params(), (config.max_position_embeddings, d), jnp.float32))
        self.final_norm = LayerNorm(d, eps=config.layer_norm_eps)
        projection = functools.partial(Linear, d, bias=False, init=normal(d**-0.5), rngs=rngs)
        self.text_projection = projection(config.projection_dim) if config.projection_dim else None

    def __call__(self, tokens, ends, dtype):
        bias = jnp.where(np.tri(tokens.shape[1], dtype=bool), 0.0, -jnp.inf)[None, None]
        x = (self.embedding[...][tokens] + self.positions[...][: tokens.shape[1]]).astype(dtype)
        features = self.final_norm(apply_blocks(self.blocks, x, bias))
        pooled = features[jnp.arange(len(ends)), ends]
        return features, self.text_projection(pooled) if self.text_projection else pooled


def end_positions(tokens: jax.Array, eos_token_id: int) -> jax.Array:
    """Position of the end of text in ids [B, L], where the features are pooled: [B].

    It is that of the first `eos_token_id`, or 0 where there is none. Configs from before the id was put right have
    eos_token_id=2, and there it is the first position of the largest id.
    """
    return jnp.argmax(tokens if eos_token_id == LEGACY_EOS else tokens == eos_token_id, axis=-1)


@functools.cache
def _graphdef(config: CLIPTextConfig) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Encoder(config, rngs=nnx.Rngs(0))))[0]


def init(config: CLIPTextConfig, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch, normal with CLIP's own scales (residual branches by 1/sqrt(2 D N))."""
    return nnx.to_pure_dict(nnx.state(_Encoder(config, rngs=nnx.Rngs(key))))


def apply(
    config: CLIPTextConfig, params: Params, tokens: jax.Array, dtype: jnp.dtype = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Features of token ids, and their pooled vector.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      tokens: ids [B, L], int32. Attention is causal, so that padding after the end of text changes neither the
        features up to there nor the pooled vector.
      dtype: dtype of the matmuls; norm statistics are fp32 in any case.

    Returns:
      Features [B, L, D] after the final norm, and those at `end_positions` [B, D], projected to [B, projection_dim]
      by a model with a projection; in `dtype`.

    Raises:
      ValueError: more tokens than positions.
    """
    if tokens.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"{tokens.shape[1]} tokens do not fit max_position_embeddings={config.max_position_embeddings}: truncate"
        )
    return nnx.merge(_graphdef(config), params)(tokens, end_positions(tokens, config.eos_token_id), dtype)


def read_config(folder: str | os.PathLike) -> CLIPTextConfig:
    """The sizes in a folder's config.json. Raises ValueError for a folder of another model."""
    raw = weights.read_config(folder, RELEASE)
    config = weights.sized(CLIPTextConfig, folder, raw)
    projected = PROJECTED in raw["architectures"] if isinstance(raw.get("architectures"), list) else False
    return config if projected else dataclasses.replace(config, projection_dim=None)


def load_folder(folder: str | os.PathLike, dtype: Any = None) -> tuple[CLIPTextConfig, Params]:
    """Reads a CLIP text encoder as transformers saves it, with its projection if the architecture has one.

    Returns the config and the parameters as host arrays, in `dtype` or else in the files' own. Raises ValueError for a
    folder of another model, an unknown activation, or tensors that do not fit the config.
    """
    config = read_config(folder)
    tensors = weights.read_safetensors(folder)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    skeleton = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    # Older files hold the positions 0, 1, 2, ... as a tensor.
    ignore = (f"{prefix}embeddings.position_ids",)
    return config, weights.load(table(prefix), skeleton, tensors, dtype=dtype, ignore=ignore)


def save_folder(folder: str | os.PathLike, config: CLIPTextConfig, params: Params) -> None:
    """Writes a folder that `load_folder` and from_pretrained of transformers' CLIPTextModel open.

    With a projection the class to open it with is CLIPTextModelWithProjection.
    """
    architecture = PROJECTED if config.projection_dim else PLAIN
    weights.write_config(folder, {"architectures": [architecture], **RELEASE, **dataclasses.asdict(config)})
    weights.write_safetensors(Path(folder) / "model.safetensors", weights.export(table(), params))
