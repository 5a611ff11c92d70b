"""FLUX.2 [klein] as a family: the parts, the text, guidance, and the policy that they make."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models import flux2, qwen3, vae
from mixgrpo_jax.models.codec import codec_for
from mixgrpo_jax.models.families import Family, Part, Parts, Text
from mixgrpo_jax.models.nn import guidance, placement
from mixgrpo_jax.models.nn.patches import image_ids
from mixgrpo_jax.models.policy import Policy, apply_options
from mixgrpo_jax.models.qwen3 import Qwen3Config

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
TAPS = (9, 18, 27)  # the layers of Qwen3 whose features the text is


def make(parts: Parts, config: Any, remat: str | None = None) -> Policy:
    """The policy of these parts, see `Family.make`.

    A transformer with a guidance embedding is told the scale. In others, guidance of a scale above 1 is part of the
    velocity, but of models that were distilled to few steps, which ignore it.
    """
    model, size, dtype = parts.configs["transformer"], tuple(config.image_size), jnp.dtype(config.dtype)
    codec = codec_for(parts.configs.get("vae"), size, dtype, model.in_channels)
    _check_width(parts)
    guided = config.guidance > 1 and not _distilled(parts)
    told = config.guidance if model.guidance_embeds else None
    ids = jnp.pad(image_ids(*codec.grid), ((0, 0), (0, 1)))
    options = apply_options(config, remat)
    all_features, tokenize, limits, _ = text(parts, config.text_length, dtype, config.negative_prompt)

    def velocity(params, x, sigma, cond):
        def evaluate(x, sigma, cond):
            return flux2.apply(model, params, x, sigma, cond["text"], told, ids, **options)

        return guidance.guided(evaluate, config.guidance, x, sigma, cond) if guided else evaluate(x, sigma, cond)

    def features(params, tokens):
        cond = all_features(params, tokens)
        return cond if guided else guidance.own(cond)

    def token_shapes(prompts):
        shape = jax.ShapeDtypeStruct((prompts, limits[ENCODER]), jnp.int32)
        return guidance.doubled({"ids": shape, "mask": shape})

    def cond_shapes(prompts):
        shape = jax.ShapeDtypeStruct((prompts, config.text_length, model.joint_attention_dim), jnp.bfloat16)
        return guidance.doubled({"text": shape}) if guided else {"text": shape}

    return Policy(
        velocity=velocity,
        features=features,
        tokenize=tokenize,
        token_shapes=token_shapes,
        cond_shapes=cond_shapes,
        codec=codec,
        flops=flux2.flops(model, int(np.prod(codec.grid)), config.text_length),
        evaluations=2 if guided else 1,
    )


def _distilled(parts: Parts) -> bool:
    """Whether the model takes no classifier-free guidance: it embeds the scale, or was distilled to few steps."""
    embeds = getattr(parts.configs.get("transformer"), "guidance_embeds", False)  # encoders may be alone
    return embeds or bool(parts.pipeline.get("is_distilled"))


def _check_width(parts: Parts) -> None:
    """Raises ValueError for another text encoder than the transformer's; with cached features there is none."""
    if ENCODER not in parts.configs:
        return
    takes, encoder = parts.configs["transformer"].joint_attention_dim, parts.configs[ENCODER]
    if takes != (gives := len(TAPS) * encoder.hidden_size):
        raise ValueError(
            f"the transformer takes text of joint_attention_dim={takes} channels, and {ENCODER}/ gives {gives}, "
            f"{len(TAPS)} layers of hidden_size={encoder.hidden_size}: it is of another model; put one of "
            f"hidden_size={takes / len(TAPS):g} there, as Qwen3-4B's 2560 for klein 4B and Qwen3-8B's 4096 for klein 9B"
        )


def taps(encoder: Qwen3Config) -> tuple[int, ...]:
    """The layers whose features the text is: of one that is too shallow for a release's, those at its quarters."""
    count = encoder.num_hidden_layers
    return TAPS if count >= TAPS[-1] else (count // 4, count // 2, 3 * count // 4)


def text(parts: Parts, length: int, dtype: Any, negative: str = "") -> Text:
    """Prompts as a user's words in a chat of `length` tokens, and `negative`, away from which guidance leads.

    cond is {"text": Qwen3's features [P, L, 3 D] at three layers side by side, padding included, as FLUX.2 attends to
    it; and "negative_text", the same of the negative one, encoded once}. A prompt whose chat does not fit is refused,
    unless it is to be cut. Raises ValueError for a negative prompt of a distilled model.
    """
    encoder, tokenizer = parts.configs.get(ENCODER), parts.tokenizers.get(TOKENIZER)
    if negative and _distilled(parts):
        raise ValueError(f"negative_prompt={negative!r}: this model is distilled and takes none; leave it empty")

    def encode(params, tokens):
        given = tokens["ids"], tokens["mask"]
        return {"text": qwen3.apply(encoder, params[ENCODER], *given, dtype, layers=taps(encoder))}

    def features(params, tokens):
        return guidance.with_negative(functools.partial(encode, params), tokens)

    def tokenize(prompts, cut=False):
        tokens = {}
        for name, rows in zip(("ids", "mask"), qwen3.tokenize(tokenizer, [*prompts, negative], length, cut)):
            tokens |= {name: rows[:-1], guidance.NEGATIVE + name: np.repeat(rows[-1:], len(prompts), axis=0)}
        return tokens

    return Text(features, tokenize, {ENCODER: length}, functools.partial(qwen3.chats, tokenizer))


def _small() -> dict[str, Any]:
    """Klein's architecture at width 128 over a four-layer Qwen3, without a VAE."""
    return {"transformer": flux2.flux2_small(), ENCODER: qwen3.qwen3_tiny()}


FAMILY = Family(
    transformer=flux2.TRANSFORMER,
    parts={ENCODER: Part(qwen3, TOKENIZER), "vae": Part(vae, optional=True)},
    rules=((r"(image_in|text_in|_modulation|final_out)/kernel", P(placement.CUT, "tensor")), *placement.RULES),
    targets=r"double_blocks/.*/(q|k|v|attention_out)|single_blocks/(attention/qkv_mlp|out)",
    text=text,
    make=make,
    small=_small,
    architectures={
        "flux2-klein-4b": lambda: {
            "transformer": flux2.flux2_klein_4b(),
            ENCODER: qwen3.qwen3_4b(),
            "vae": vae.flux2_vae(),
        }
    },
)
