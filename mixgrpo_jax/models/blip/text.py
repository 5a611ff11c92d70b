"""BLIP's text encoder: a post-norm BERT whose every layer looks at the image's tokens as well."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from mixgrpo_jax.models.blip.vision import INIT, Params, check_heads, gelu, linear
from mixgrpo_jax.models.clip.text import LayerNorm
from mixgrpo_jax.models.nn import layers

# Added to the logits of padding, as in training; zero after a softmax in fp32.
MASKED = -1e4


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the BERT, named as in transformers' BlipTextConfig; `encoder_hidden_size` is the image tokens' width."""

    vocab_size: int = 30524
    hidden_size: int = 768
    encoder_hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        check_heads(self.hidden_size, self.num_attention_heads)


class _Attention(nnx.Module):
    """Attention of x to a memory of another width, added to x; the sum is normalised after."""

    def __init__(self, config: TextConfig, memory_width: int, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.q = linear(d, d, rngs=rngs)
        self.k, self.v = (linear(memory_width, d, rngs=rngs) for _ in range(2))
        self.out = linear(d, d, rngs=rngs)
        self.norm = LayerNorm(d, eps=config.layer_norm_eps)
        self.heads = config.num_attention_heads

    def __call__(self, x, memory, bias=None):
        inputs = ((self.q, x), (self.k, memory), (self.v, memory))
        q, k, v = (project(y).reshape(*y.shape[:2], self.heads, -1) for project, y in inputs)
        return self.norm(x + self.out(layers.attention(q, k, v, bias=bias)))


class _TextBlock(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.attention = _Attention(config, d, rngs=rngs)
        self.cross_attention = _Attention(config, config.encoder_hidden_size, rngs=rngs)
        self.mlp_in = linear(d, config.intermediate_size, rngs=rngs)
        self.mlp_out = linear(config.intermediate_size, d, rngs=rngs)
        self.mlp_norm = LayerNorm(d, eps=config.layer_norm_eps)

    def __call__(self, x, memory, bias):
        x = self.cross_attention(self.attention(x, x, bias), memory)
        return self.mlp_norm(x + self.mlp_out(gelu(self.mlp_in(x))))


class _Text(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.embedding = nnx.Param(INIT(rngs.params(), (config.vocab_size, d), jnp.float32))
        self.positions = nnx.Param(INIT(rngs.params(), (config.max_position_embeddings, d), jnp.float32))
        self.norm = LayerNorm(d, eps=config.layer_norm_eps)
        self.blocks = jax.vmap(lambda key: _TextBlock(config, rngs=nnx.Rngs(key)))(keys)

    def __call__(self, tokens, mask, memory):
        bias = jnp.where(mask, 0.0, MASKED)[:, None, None]
        x = self.embedding[...][tokens] + self.positions[...][: tokens.shape[1]]
        x = self.norm(x.astype(memory.dtype))
        x, _ = jax.lax.scan(lambda x, block: (block(x, memory, bias), None), x, self.blocks)
        return x


@functools.cache
def _graphdef(config: TextConfig) -> nnx.GraphDef:
    return nnx.split(jax.eval_shape(lambda: _Text(config, rngs=nnx.Rngs(0))))[0]


def init(config: TextConfig, key: jax.Array) -> Params:
    """Parameters in fp32 to train from scratch, N(0, 0.02^2)."""
    return nnx.to_pure_dict(nnx.state(_Text(config, rngs=nnx.Rngs(key))))


def apply(config: TextConfig, params: Params, tokens: jax.Array, mask: jax.Array, memory: jax.Array) -> jax.Array:
    """Features of token ids that look at an image.

    Args:
      config: the sizes of `params`.
      params: as `init` returns them, in any float dtype.
      tokens: ids [B, L], int32.
      mask: [B, L], true or 1 for text, false or 0 for padding, which no token attends to.
      memory: the image's features [B, N, encoder_hidden_size], all of which are attended to.

    Returns:
      [B, L, D] in memory's dtype. Those at padding mean nothing.

    Raises:
      ValueError: more tokens than positions.
    """
    if tokens.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"{tokens.shape[1]} tokens do not fit max_position_embeddings={config.max_position_embeddings}: truncate"
        )
    return nnx.merge(_graphdef(config), params)(tokens, mask, memory)
