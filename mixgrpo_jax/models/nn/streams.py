"""What transformers of text and image streams share: a stream's layers in a block, and blocks in a stack."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.layers import ZEROS, Linear, RMSNorm, Turns

MLP_RATIO = 4


class Heads(nnx.Module):
    """Queries and keys, normalised and rotated or not, and values: [B, S, D] -> three of [B, S, H, d] or [B, H, d, S].

    Without a `norm` nothing is rotated.
    """

    def __init__(self, width: int, heads: int, *, norm: bool = True, rngs: nnx.Rngs):
        self.q, self.k, self.v = (Linear(width, width, rngs=rngs) for _ in range(3))
        self.q_norm, self.k_norm = (RMSNorm(width // heads) if norm else None for _ in range(2))
        self.heads = heads

    def __call__(self, x: jax.Array, turns: Turns | None, tokens_last: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The heads of x; with `tokens_last` in the form [B, H, d, S]."""
        linears = (self.q, self.k, self.v)
        if tokens_last:
            q, k, v = (linear.tokens_last(x).reshape(len(x), self.heads, -1, x.shape[1]) for linear in linears)
        else:
            q, k, v = (linear(x).reshape(*x.shape[:2], self.heads, -1) for linear in linears)
        if self.q_norm is None or self.k_norm is None:
            return q, k, v
        if not tokens_last:
            return self.q_norm(q, turns), self.k_norm(k, turns), v
        # Or products would leave in fp32 for the norms, and their squares beside them.
        q, k = jax.lax.optimization_barrier((q, k))
        return self.q_norm(q, turns, axis=-2), self.k_norm(k, turns, axis=-2), v


class Stream(nnx.Module):
    """One modality's weights of a block in which text and image attend to each other.

    The modulation has `chunks` vectors: shift, scale and gate of the attention, then of the MLP, then what a subclass
    adds.
    """

    chunks = 6

    def __init__(self, width: int, heads: int, *, norm: bool = True, rngs: nnx.Rngs):
        self.modulation = Linear(width, self.chunks * width, init=ZEROS, rngs=rngs)
        self.attention = Heads(width, heads, norm=norm, rngs=rngs)
        self.attention_out = Linear(width, width, rngs=rngs)
        self.mlp_in = Linear(width, MLP_RATIO * width, rngs=rngs)
        self.mlp_out = Linear(MLP_RATIO * width, width, rngs=rngs)

    def finish(self, x: jax.Array, y: jax.Array, modulation: list[jax.Array]) -> jax.Array:
        """Adds the attention's output y to the stream x, then the MLP's."""
        _, _, gate, shift_mlp, scale_mlp, gate_mlp, *_ = modulation
        x = x + gate * self.attention_out(y)
        return x + gate_mlp * self.mlp_out(layers.gelu(self.mlp_in(layers.modulate(x, shift_mlp, scale_mlp))))


def jointly(attend: Any, heads: list[tuple[jax.Array, ...]], lengths: list[int], tokens_last: bool) -> list[jax.Array]:
    """All streams' tokens attend to all: `attend` of the heads of each, one behind the other, cut up again."""
    y = attend(*(jnp.concatenate(each, axis=3 if tokens_last else 1) for each in zip(*heads)))
    return jnp.split(y, [sum(lengths[:n]) for n in range(1, len(lengths))], axis=1)


def stack(block: Any, count: int, rngs: nnx.Rngs) -> Any:
    """`count` blocks, each made by `block(rngs=...)`, stacked along the first axis of their parameters."""
    return jax.vmap(lambda key: block(rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def chunks(modulation: jax.Array, count: int) -> list[jax.Array]:
    """The vectors of a modulation [B, count D], each [B, 1, D]."""
    return jnp.split(modulation[:, None], count, axis=-1)
