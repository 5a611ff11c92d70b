"""Stable Diffusion 3 and 3.5 as a family: the parts, the text, guidance, and the policy that they make."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models import sd3, t5, vae
from mixgrpo_jax.models.clip import text as clip
from mixgrpo_jax.models.codec import codec_for
from mixgrpo_jax.models.families import Family, Part, Parts, Text
from mixgrpo_jax.models.nn import guidance, placement
from mixgrpo_jax.models.policy import Policy, apply_options
from mixgrpo_jax.models.vae import VAEConfig

NAMES = {"text_encoder_3": "t5", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # of the encoders' tokens
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


def sd3_vae() -> VAEConfig:
    """The autoencoder of Stable Diffusion 3: 83.8 M parameters, 16 latent channels."""
    return vae.vae_16(scaling_factor=1.5305, shift_factor=0.0609)


def make(parts: Parts, config: Any, remat: str | None = None) -> Policy:
    """The policy of these parts, see `Family.make`. Guidance of a scale above 1 is part of its velocity."""
    model, size, dtype = parts.configs["transformer"], tuple(config.image_size), jnp.dtype(config.dtype)
    codec = codec_for(parts.configs.get("vae"), size, dtype, model.channels)
    encoders = parts.configs  # which are not read where the data have the features
    wide = encoders[T5].d_model if T5 in encoders else model.joint_attention_dim
    pooled = [encoders[name].projection_dim or 0 for name in CLIPS if name in encoders]
    for ours, theirs, of in (
        (model.joint_attention_dim, wide, T5),
        (model.pooled_projection_dim, sum(pooled), "CLIPs"),
    ):
        if ours != theirs and (of == T5 or pooled):
            raise ValueError(
                f"the transformer takes text of {ours} channels, and {of} gives {theirs}: of another model?"
            )
    guided = config.guidance > 1
    options = apply_options(config, remat)
    all_features, tokenize, limits, _ = text(parts, config.text_length, dtype, config.negative_prompt)
    clips = limits["text_encoder"]

    def velocity(params, x, sigma, cond):
        def evaluate(x, sigma, cond):
            return sd3.apply(model, params, x, sigma, cond["text"], cond["pooled"], codec.grid, **options)

        return guidance.guided(evaluate, config.guidance, x, sigma, cond) if guided else evaluate(x, sigma, cond)

    def features(params, tokens):
        cond = all_features(params, tokens)
        return cond if guided else guidance.own(cond)

    def token_shapes(prompts):
        shapes = {NAMES[name]: jax.ShapeDtypeStruct((prompts, limit), jnp.int32) for name, limit in limits.items()}
        return guidance.doubled(shapes)

    def cond_shapes(prompts):
        length = clips + config.text_length
        sizes = {"text": (length, model.joint_attention_dim), "pooled": (model.pooled_projection_dim,)}
        sizes = guidance.doubled(sizes) if guided else sizes
        return {name: jax.ShapeDtypeStruct((prompts, *size), jnp.bfloat16) for name, size in sizes.items()}

    return Policy(
        velocity=velocity,
        features=features,
        tokenize=tokenize,
        token_shapes=token_shapes,
        cond_shapes=cond_shapes,
        codec=codec,
        flops=sd3.flops(model, int(np.prod(codec.grid)), clips + config.text_length),
        evaluations=2 if guided else 1,
    )


def text(parts: Parts, length: int, dtype: Any, negative: str = "") -> Text:
    """Prompts as CLIP-L, CLIP-G and `length` tokens of T5 see them, and `negative`, away from which guidance leads.

    cond is {"text": [P, 77 + L, D], CLIP's features before the last block side by side, filled up with zeros to T5's
    width, then T5's, padding included; "pooled": [P, C], both CLIPs' side by side; and the same of the negative one,
    encoded once, as "negative_text" and "negative_pooled"}. Zeros stand in the place of a T5 that is not there.

    A prompt that does not fit T5's length, or without T5 CLIP's, is refused, unless it is to be cut; beside T5, CLIP's
    is always cut, as the released pipelines do.
    """
    encoders = parts.configs
    width = encoders[T5].d_model if T5 in encoders else encoders.get("transformer", sd3.SD3Config()).joint_attention_dim
    limits = {T5: length} if T5 in encoders else {}
    limits |= {name: encoders.get(name, clip.clip_l()).max_position_embeddings for name in CLIPS}

    def encode(params, tokens):
        clips = [clip.apply(encoders[name], params[name], tokens[NAMES[name]], dtype) for name in CLIPS]
        joined = jnp.concatenate([encoded.penultimate for encoded in clips], axis=-1)
        joined = jnp.pad(joined, ((0, 0), (0, 0), (0, width - joined.shape[-1])))
        if T5 in encoders:
            behind = t5.apply(encoders[T5], params[T5], tokens["t5"], dtype)
        else:
            behind = jnp.zeros((len(joined), length, width), dtype)
        pooled = jnp.concatenate([encoded.pooled for encoded in clips], axis=-1)
        return {"text": jnp.concatenate([joined, behind], axis=1), "pooled": pooled}

    def features(params, tokens):
        return guidance.with_negative(functools.partial(encode, params), tokens)

    def tokenize(prompts, cut=False):
        first, tokens = next(iter(limits)), {}
        for name, limit in limits.items():
            *ids, of_negative = parts.token_ids(name, [*prompts, negative], limit, cut or name != first)
            tokens[NAMES[name]] = np.stack(ids)
            tokens[guidance.NEGATIVE + NAMES[name]] = np.stack([of_negative] * len(ids))
        return tokens

    return Text(features, tokenize, limits)


def _small() -> dict[str, Any]:
    """3.5 Medium's architecture at width 128 over two-layer encoders, without a VAE."""
    clips = {name: clip.clip_tiny(hidden_size=64, projection_dim=64) for name in CLIPS}
    return {"transformer": sd3.sd3_small(), T5: t5.t5_tiny(vocab_size=64), **clips}


def _released(transformer: sd3.SD3Config) -> dict[str, Any]:
    encoders = {T5: t5.t5_xxl(), "text_encoder": clip.clip_l_projected(), "text_encoder_2": clip.clip_g()}
    return {"transformer": transformer, **encoders, "vae": sd3_vae()}


FAMILY = Family(
    transformer=sd3.TRANSFORMER,
    parts={
        T5: Part(t5, "tokenizer_3", optional=True),
        "text_encoder": Part(clip, "tokenizer"),
        "text_encoder_2": Part(clip, "tokenizer_2"),
        "vae": Part(vae, optional=True),
    },
    rules=(
        (r"(text_in|final_modulation|final_out)/kernel", P(placement.CUT, "tensor")),
        (r"patch_embedding", P(None, None, None, placement.CUT)),
        (r"position_table", P(None, None, placement.CUT)),  # so that a crop moves nothing
        *placement.RULES,
    ),
    targets=r".*_blocks/(image|text)/(attention/(q|k|v)|attention_out)",
    text=text,
    make=make,
    small=_small,
    architectures={
        "sd3-medium": lambda: _released(sd3.sd3_medium()),
        "sd35-medium": lambda: _released(sd3.sd35_medium()),
        "sd35-large": lambda: _released(sd3.sd35_large()),
    },
    fixed="position_table",
)
