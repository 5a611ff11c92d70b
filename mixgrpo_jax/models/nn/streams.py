"""What transformers of text and image streams share: a stream's layers in a block, and blocks in a stack."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixgrpo_jax.models.nn import layers
from mixgrpo_jax.models.nn.layers import ZEROS, Linear, RMSNorm, Turns
from mixgrpo_jax.models.nn.placement import spread
from mixgrpo_jax.models.nn.products import gathered
from mixgrpo_jax.models.nn.remat import rematerialise

MLP_RATIO = 4


class Heads(nnx.Module):
    """Queries and keys, normalised and rotated or not, and values: [B, S, D] -> three of [B, S, H, d] or [B, H, d, S].

    Without a `norm` nothing is rotated.
    """

    def __init__(self, width: int, heads: int, *, norm: bool = True, bias: bool = True, rngs: nnx.Rngs):
        self.q, self.k, self.v = (Linear(width, width, bias=bias, rngs=rngs) for _ in range(3))
        self.q_norm, self.k_norm = (RMSNorm(width // heads) if norm else None for _ in range(2))
        self.heads = heads

    def __call__(self, x: jax.Array, turns: Turns | None, tokens_last: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The heads of x; with `tokens_last` in the form [B, H, d, S]."""
        linears = (self.q, self.k, self.v)
        if tokens_last:
            q, k, v = (linear.tokens_last(x).reshape(len(x), self.heads, -1, x.shape[1]) for linear in linears)
        else:
            q, k, v = (linear(x).reshape(*x.shape[:2], self.heads, -1) for linear in linears)
        return *self.turned(q, k, turns, tokens_last), v

    def turned(self, q: jax.Array, k: jax.Array, turns: Turns | None, tokens_last: bool) -> tuple[jax.Array, jax.Array]:
        """Queries and keys, normalised and rotated."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        if not tokens_last:
            return self.q_norm(q, turns), self.k_norm(k, turns)
        # Or products would leave in fp32 for the norms, and their squares beside them.
        q, k = jax.lax.optimization_barrier((q, k))
        return self.q_norm(q, turns, axis=-2), self.k_norm(k, turns, axis=-2)


class Stream(nnx.Module):
    """One modality's weights of a block in which text and image attend to each other.

    The modulation has `chunks` vectors: shift, scale and gate of the attention, then of the MLP, then what a subclass
    adds.
    """

    chunks = 6
    activation = staticmethod(layers.gelu)

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
        return x + gate_mlp * self.mlp_out(self.activation(self.mlp_in(layers.modulate(x, shift_mlp, scale_mlp))))


class TwoStreams(nnx.Module):
    """A transformer whose first blocks have weights of text and image apart, and whose others run them as one stream.

    A subclass makes its layers; axes_dims and theta are of its rotary positions.
    """

    text_in: Linear
    image_in: Linear
    double_blocks: Any
    single_blocks: Any
    axes_dims: tuple[int, ...]
    theta: float = 1e4

    def tokens(
        self,
        x: jax.Array,
        text: jax.Array,
        conditions: tuple[Any, Any],
        ids: jax.Array,
        remat: str,
        backend: layers.Backend,
        reduce_dtype: Any,
    ) -> jax.Array:
        """The image's tokens [B, S, D] behind all blocks; `conditions` are what double and single blocks are given."""
        (split, length), dtype = (text.shape[1], len(ids)), x.dtype
        total, tokens_last = layers.form(length, dtype, backend)
        padding = (0, total - length)  # behind all tokens, where attention leaves it out
        x, ids = jnp.pad(x, ((0, 0), padding, (0, 0))), jnp.pad(ids, (padding, (0, 0)))
        angles = layers.rope_angles(ids, self.axes_dims, self.theta)
        turns = [layers.rotary(part, tokens_last=tokens_last) for part in (angles, *jnp.split(angles, [split]))]
        keys = length if total > length else None
        attend = functools.partial(layers.attention, length=keys, tokens_last=tokens_last, backend=backend)

        def double(streams, block):
            with jax.named_scope("double_block"):
                block = gathered(block, dtype, reduce_dtype)
                return spread(block(*streams, conditions[0], turns[1:], attend, tokens_last)), None

        def single(x, block):
            with jax.named_scope("single_block"):
                block = gathered(block, dtype, reduce_dtype)
                return spread(block(x, conditions[1], turns[0], attend, tokens_last)), None

        double, single = (rematerialise(body, remat) for body in (double, single))
        streams = self.text_in(spread(text)), self.image_in(spread(x))
        (text, image), _ = jax.lax.scan(double, spread(streams), self.double_blocks)
        tokens, _ = jax.lax.scan(single, jnp.concatenate([text, image], axis=1), self.single_blocks)
        return tokens[:, split:length]


def mutual(
    streams: Sequence[Any],
    xs: Sequence[jax.Array],
    modulations: Sequence[list[jax.Array]],
    turns: Sequence[Turns],
    attend: Any,
    tokens_last: bool,
) -> tuple[jax.Array, ...]:
    """A block of several `Stream`s, whose tokens attend to all: each one's next x."""
    heads = [
        stream.attention(layers.modulate(x, shift, scale), turn, tokens_last)
        for stream, x, turn, (shift, scale, *_) in zip(streams, xs, turns, modulations)
    ]
    parts = jointly(attend, heads, [x.shape[1] for x in xs], tokens_last)
    return tuple(stream.finish(*args) for stream, *args in zip(streams, xs, parts, modulations))


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


def scales(
    timestep: jax.Array | float, guidance: jax.Array | float | None, batch: int, guidance_embeds: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Time and guidance scale of each sample, [B] in fp32; guidance is None for a model that does not embed it.

    Raises ValueError for a scale that the model does not take, or none that it needs.
    """
    if (guidance is not None) != guidance_embeds:
        need = "a guidance scale" if guidance_embeds else "guidance=None"
        raise ValueError(f"guidance={guidance} with guidance_embeds={guidance_embeds}: pass {need}")

    def by_sample(a: jax.Array | float) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(a, jnp.float32), (batch,))

    return by_sample(timestep), None if guidance is None else by_sample(guidance)
