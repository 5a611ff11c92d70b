"""FLUX.1 as a family: its parts, the text that it is conditioned on, and the policy that they make."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models import flux, t5, vae
from mixgrpo_jax.models.clip import text as clip
from mixgrpo_jax.models.codec import codec_for
from mixgrpo_jax.models.families import Family, Part, Parts, Text
from mixgrpo_jax.models.nn import placement
from mixgrpo_jax.models.nn.patches import image_ids
from mixgrpo_jax.models.policy import Policy, apply_options
from mixgrpo_jax.models.vae import VAEConfig


def flux1_vae() -> VAEConfig:
    """The autoencoder of FLUX.1: 83.8 M parameters, 16 latent channels."""
    return vae.vae_16(scaling_factor=0.3611, shift_factor=0.1159)


def make(parts: Parts, config: Any, remat: str | None = None) -> Policy:
    """The policy of these parts, see `Family.make`. Guidance is ignored by models without its embedding."""
    model, size, dtype = parts.configs["transformer"], tuple(config.image_size), jnp.dtype(config.dtype)
    codec = codec_for(parts.configs.get("vae"), size, dtype, model.in_channels)
    ids = image_ids(*codec.grid)
    guidance = config.guidance if model.guidance_embeds else None
    options = apply_options(config, remat)
    features, tokenize, limits, _ = text(parts, config.text_length, dtype, config.negative_prompt)

    def velocity(params, x, sigma, cond):
        return flux.apply(model, params, x, sigma, cond["text"], cond["pooled"], guidance, ids, **options)

    def token_shapes(prompts):
        return {NAMES[name]: jax.ShapeDtypeStruct((prompts, limit), jnp.int32) for name, limit in limits.items()}

    def cond_shapes(prompts):
        sizes = {"text": (config.text_length, model.joint_attention_dim), "pooled": (model.pooled_projection_dim,)}
        return {name: jax.ShapeDtypeStruct((prompts, *size), jnp.bfloat16) for name, size in sizes.items()}

    return Policy(
        velocity=velocity,
        features=features,
        tokenize=tokenize,
        token_shapes=token_shapes,
        cond_shapes=cond_shapes,
        codec=codec,
        flops=flux.flops(model, int(np.prod(codec.grid)), config.text_length),
    )


NAMES = {"text_encoder_2": "t5", "text_encoder": "clip"}  # of the encoders' tokens


def text(parts: Parts, length: int, dtype: Any, negative: str = "") -> Text:
    """Prompts of `length` T5 tokens as T5 and CLIP see them.

    cond is {"text": T5's features [P, L, D], padding included, as FLUX attends to it; "pooled": CLIP's [P, C]}. A
    model without CLIP pools the mean over the prompt's own T5 tokens. A prompt that does not fit T5's length is
    refused, unless it is to be cut; CLIP's is always cut at its 77 tokens, as FLUX's own pipeline does.
    """
    if negative:
        raise ValueError(
            f"negative_prompt={negative!r}: FLUX.1 is told a guidance scale and takes none; leave it empty"
        )
    encoder, pooler = parts.configs.get("text_encoder_2"), parts.configs.get("text_encoder")
    limits = {"text_encoder_2": length} | ({"text_encoder": pooler.max_position_embeddings} if pooler else {})

    def features(params, tokens):
        text = t5.apply(encoder, params["text_encoder_2"], tokens["t5"], dtype)
        if pooler:
            pooled = clip.apply(pooler, params["text_encoder"], tokens["clip"], dtype).pooled
            return {"text": text, "pooled": pooled}
        real = (tokens["t5"] != parts.tokenizers["tokenizer_2"].pad_token_id)[..., None]
        return {"text": text, "pooled": (text * real).sum(1) / real.sum(1).astype(text.dtype)}

    def tokenize(prompts, cut=False):
        cuts = {name: cut or name == "text_encoder" for name in limits}
        return {NAMES[name]: parts.token_ids(name, prompts, limit, cuts[name]) for name, limit in limits.items()}

    return Text(features, tokenize, limits)


def _small() -> dict[str, Any]:
    """FLUX.1's architecture at width 128 over a two-layer T5, without CLIP and VAE."""
    return {"transformer": flux.flux_small(), "text_encoder_2": t5.t5_tiny(vocab_size=64)}


def _released(transformer: flux.FluxConfig) -> dict[str, Any]:
    encoders = {"text_encoder_2": t5.t5_xxl(), "text_encoder": clip.clip_l()}
    return {"transformer": transformer, **encoders, "vae": flux1_vae()}


FAMILY = Family(
    transformer=flux.TRANSFORMER,
    parts={
        "text_encoder_2": Part(t5, "tokenizer_2"),
        "text_encoder": Part(clip, "tokenizer", optional=True),
        "vae": Part(vae, optional=True),
    },
    rules=((r"(image_in|text_in|final_modulation|final_out)/kernel", P(placement.CUT, "tensor")), *placement.RULES),
    targets=r"double_blocks/.*/(q|k|v|attention_out)|single_blocks/attention/(q|k|v)",
    text=text,
    make=make,
    small=_small,
    architectures={
        "flux1-dev": lambda: _released(flux.flux1_dev()),
        "flux1-schnell": lambda: _released(flux.flux1_schnell()),
    },
)
