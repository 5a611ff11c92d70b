"""T5 v1.1 encoder: token ids to features, without an attention mask."""

import dataclasses
import functools
import math
import os
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
from mixgrpo_jax.models.nn.layers import Linear, RMSNorm, normal
from mixgrpo_jax.models.nn.placement import spread

Params = dict[str, Any]

BLOCK = "encoder.block.{i}.layer"
RELEASE = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
# Older files hold the embedding a second time, under the encoder's name.
TIED = ("encoder.embed_tokens.weight",)

TABLE = [
    Rule("shared.weight", "embedding"),
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
    Rule(f"{BLOCK}.0.layer_norm.weight", "blocks/attention_norm/scale"),
    *linear(f"{BLOCK}.0.SelfAttention.q", "blocks/q", bias=False),
    *linear(f"{BLOCK}.0.SelfAttention.k", "blocks/k", bias=False),
    *linear(f"{BLOCK}.0.SelfAttention.v", "blocks/v", bias=False),
    *linear(f"{BLOCK}.0.SelfAttention.o", "blocks/attention_out", bias=False),
    Rule(f"{BLOCK}.1.layer_norm.weight", "blocks/mlp_norm/scale"),
    *linear(f"{BLOCK}.1.DenseReluDense.wi_0", "blocks/mlp_gate", bias=False),
    *linear(f"{BLOCK}.1.DenseReluDense.wi_1", "blocks/mlp_in", bias=False),
    *linear(f"{BLOCK}.1.DenseReluDense.wo", "blocks/mlp_out", bias=False),
    Rule("encoder.final_layer_norm.weight", "final_norm/scale"),
]


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder, named as in transformers' config.json."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128


def t5_xxl() -> T5Config:
    """The encoder of T5 v1.1 XXL: 4.8 B parameters."""
    return T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)


def t5_tiny(**overrides) -> T5Config:
    """A two-layer encoder for tests and for training from scratch on a small vocabulary."""
    sizes: dict[str, Any] = dict(vocab_size=64, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    return T5Config(**(sizes | overrides))


class _Block(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        d, inner, d_ff = config.d_model, config.num_heads * config.d_kv, config.d_ff

        def linear(d_in, d_out, std):
            return Linear(d_in, d_out, bias=False, init=normal(std), rngs=rngs)

        self.attention_norm = RMSNorm(d)
        # Logits are not divided by sqrt(d_kv): the queries' initialisation carries that factor instead.
        self.q = linear(d, inner, (d * config.d_kv) ** -0.5)
        self.k = linear(d, inner, d**-0.5)
        self.v = linear(d, inner, d**-0.5)
        self.attention_out = linear(inner, d, inner**-0.5)
        self.mlp_norm = RMSNorm(d)
        self.mlp_gate = linear(d, d_ff, d**-0.5)
        self.mlp_in = linear(d, d_ff, d**-0.5)
        self.mlp_out = linear(d_ff, d, d_ff**-0.5)
        self.heads = config.num_heads

    def __call__(self, x, bias):
        h = self.attention_norm(x)
        q, k, v = (linear(h).reshape(*x.shape[:2], self.heads, -1) for linear in (self.q, self.k, self.v))
        x = x + self.attention_out(layers.attention(q, k, v, bias=bias, scale=1.0))
        h = self.mlp_norm(x)
        return x + self.mlp_out(layers.gelu(self.mlp_gate(h)) * self.mlp_in(h))


class _Encoder(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        table = (config.relative_attention_num_buckets, config.num_heads)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)))
        self.relative_bias = nnx.Param(normal(1.0)(rngs.params(), table, jnp.float32))
        self.blocks = jax.vmap(lambda key: _Block(config, rngs=nnx.Rngs(key)))(keys)
        self.final_norm = RMSNorm(config.d_model)

    def __call__(self, tokens, buckets, dtype):
        bias = jnp.moveaxis(self.relative_bias[...][buckets], -1, 0)[None].astype(jnp.float32)
        x = self.embedding[...][tokens].astype(dtype)
        x, _ = jax.lax.scan(lambda x, block: (spread(block(x, bias)), None), spread(x), self.blocks)
        return self.final_norm(x)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of key position minus query position, [length, length] int32.

    Half of the buckets are for each sign. In each half, the first half are exact distances, and the others grow
    logarithmically up to `max_distance`, beyond which all distances share the last one.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.abs(relative)
    # In fp32, as the released models were trained: some distances lie on the edge of two buckets.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + half * (relative > 0)).astype(np.int32)


@functools.cache
def _graphdef(config: T5Config) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Encoder(config, rngs=nnx.Rngs(0))))[0]


def init(config: T5Config, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch, with T5's own scales (unit embeddings, q by (d_model d_kv)^-1/2).

    But for the biases by distance: T5's begin with a scale of d_model^-1/2, these with 1.
    """
    return nnx.to_pure_dict(nnx.state(_Encoder(config, rngs=nnx.Rngs(key))))


def apply(config: T5Config, params: Params, tokens: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Features of token ids.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      tokens: ids [B, L], int32. No mask: padding is attended like any token.
      dtype: dtype of the matmuls; fp16 overflows with the released weights, bf16 does not.

    Returns:
      Features [B, L, d_model] in `dtype`.
    """
    buckets = relative_buckets(
        tokens.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    return nnx.merge(_graphdef(config), params)(tokens, buckets, dtype)


def read_config(folder: str | os.PathLike) -> T5Config:
    """The sizes in a folder's config.json. Raises ValueError for a folder of another model."""
    return weights.sized(T5Config, folder, weights.read_config(folder, RELEASE))


def load_folder(folder: str | os.PathLike, dtype: Any = None) -> tuple[T5Config, Params]:
    """Reads a T5 v1.1 encoder as transformers saves it.

    Returns the config and the parameters as host arrays, in `dtype` or else in the files' own. Raises ValueError for a
    folder of another model, or tensors that do not fit the config.
    """
    config = read_config(folder)
    skeleton = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return config, weights.load(TABLE, skeleton, weights.read_safetensors(folder), dtype=dtype, ignore=TIED)


def save_folder(folder: str | os.PathLike, config: T5Config, params: Params) -> None:
    """Writes a folder that `load_folder` and transformers' T5EncoderModel.from_pretrained open."""
    weights.write_config(folder, {"architectures": ["T5EncoderModel"], **RELEASE, **dataclasses.asdict(config)})
    weights.write_safetensors(Path(folder) / "model.safetensors", weights.export(TABLE, params))
