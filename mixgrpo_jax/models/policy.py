"""What a trainer sees of a model: a velocity, prompt features, pictures, and where parameters lie."""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax import Array
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models import flux
from mixgrpo_jax.models.flux import weights as flux_weights
from mixgrpo_jax.models.text import t5

SHIPPED = pathlib.Path(__file__).parents[1] / "assets" / "signs"

# Column-parallel into a block, row-parallel out of it; everything else is only cut by fsdp. The first axis of a block's
# parameter is the block's index, over which the scan runs: it stays whole.
RULES = (
    (r"blocks/.*(q|k|v|mlp_in|mlp_gate|modulation)/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/.*(q|k|v|mlp_in|mlp_gate|modulation)/bias", P(None, "tensor")),
    (r"blocks/.*(attention_out|mlp_out|out)/kernel", P(None, "tensor", "fsdp")),
    (r"(image_in|text_in|linear_1|final_modulation|final_out)/kernel", P("fsdp", "tensor")),
    (r"linear_2/kernel", P("tensor", "fsdp")),
    (r"embedding", P("fsdp", None)),
)


@dataclass(frozen=True)
class PixelCodec:
    """A latent space without a learned autoencoder: pixels in [-1, 1], folded by 4 x 2 into channels.

    It stands where a VAE stands: pictures [B, H, W, 3] uint8 <-> latents [B, H/4, W/2, 24], which FLUX packs 2 x 2.
    """

    image_size: tuple[int, int]
    fold: tuple[int, int] = (4, 2)

    def __post_init__(self):
        for size, fold, axis in zip(self.image_size, self.fold, ("rows", "columns")):
            if size % (2 * fold):
                raise ValueError(f"model.image_size: {size} {axis} are not a multiple of {2 * fold}; choose one")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of packed tokens."""
        return self.image_size[0] // (2 * self.fold[0]), self.image_size[1] // (2 * self.fold[1])

    @property
    def channels(self) -> int:
        """Channels of a packed token."""
        return 4 * 3 * self.fold[0] * self.fold[1]

    def encode(self, images: Array) -> Array:
        """[B, H, W, 3] uint8 -> packed latents [B, S, C] fp32."""
        b, h, w, _ = images.shape
        (dy, dx), x = self.fold, images.astype(jnp.float32) / 127.5 - 1
        x = x.reshape(b, h // dy, dy, w // dx, dx, 3).transpose(0, 1, 3, 5, 2, 4)
        return flux.pack(x.reshape(b, h // dy, w // dx, 3 * dy * dx))

    def decode(self, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> [B, H, W, 3] uint8, rounded and clipped."""
        (h, w), (dy, dx) = self.image_size, self.fold
        x = flux.unpack(tokens.astype(jnp.float32), h // dy, w // dx)
        x = x.reshape(-1, h // dy, w // dx, 3, dy, dx).transpose(0, 1, 4, 2, 5, 3).reshape(-1, h, w, 3)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclass(frozen=True)
class Policy:
    """A model family behind four functions; parameters are passed in, never held.

    velocity: (params, x [B, S, C], sigma scalar, cond) -> v [B, S, C] fp32.
    features: (text parameters, token ids [P, L]) -> cond, a dict of arrays with leading axis P.
    tokenize: prompts -> ids [P, L] int32; a prompt that does not fit is refused.
    codec: pictures <-> packed latents.
    latent_shape: (S, C).  flops: of one velocity of one sample.
    """

    velocity: Callable[[Any, Array, Array, Any], Array]
    features: Callable[[Any, Array], dict[str, Array]]
    tokenize: Callable[[Sequence[str]], np.ndarray]
    codec: PixelCodec
    flops: float

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, channels) of a packed latent."""
        return int(np.prod(self.codec.grid)), self.codec.channels


@dataclass(frozen=True)
class Parts:
    """The architecture of a FLUX-shaped policy and its tokenizer."""

    transformer: flux.FluxConfig
    text_encoder: t5.T5Config
    tokenizer: transformers.PreTrainedTokenizerBase


def signs_parts(tokenizer: transformers.PreTrainedTokenizerBase) -> Parts:
    """The embedded default: FLUX.1's architecture at width 128 over a two-layer T5."""
    return Parts(flux.flux_small(), t5.t5_tiny(vocab_size=64), tokenizer)


def init(parts: Parts, key: Array) -> dict[str, Any]:
    """Fresh parameters {"transformer": ..., "text_encoder": ...}."""
    keys = jax.random.split(key)
    return {
        "transformer": flux.init(parts.transformer, keys[0]),
        "text_encoder": t5.init(parts.text_encoder, keys[1]),
    }


def load(folder: str | pathlib.Path) -> tuple[Parts, dict[str, Any]]:
    """Read a checkpoint folder as diffusers lays it out: transformer/, text_encoder_2/ (T5), tokenizer_2/.

    "" is the checkpoint that ships with the package. Raises ValueError where a part is missing.
    """
    folder = pathlib.Path(folder) if folder else SHIPPED
    for part in ("transformer", "text_encoder_2", "tokenizer_2"):
        if not (folder / part).is_dir():
            raise ValueError(
                f"model.folder={str(folder)!r} has no {part}/; expected a checkpoint as diffusers saves it"
            )
    transformer, params = flux_weights.load_folder(folder / "transformer")
    text_encoder, text_params = t5.load_folder(folder / "text_encoder_2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer_2")
    return Parts(transformer, text_encoder, tokenizer), {"transformer": params, "text_encoder": text_params}


def save(folder: str | pathlib.Path, parts: Parts, params: dict[str, Any]) -> None:
    """Write what `load` reads, and diffusers and transformers read too."""
    folder = pathlib.Path(folder)
    flux_weights.save_folder(folder / "transformer", parts.transformer, params["transformer"])
    t5.save_folder(folder / "text_encoder_2", parts.text_encoder, params["text_encoder"])
    parts.tokenizer.save_pretrained(folder / "tokenizer_2")


def make(parts: Parts, config: Any, remat: str | None = None) -> Policy:
    """The policy of these parts under a config's `model` section.

    `remat` overrides the config's: a rollout keeps no activations, so it recomputes none. Guidance is ignored by models
    without its embedding.
    """
    codec = PixelCodec(tuple(config.image_size))
    if codec.channels != parts.transformer.in_channels:
        raise ValueError(
            f"the transformer takes {parts.transformer.in_channels} channels a token, the codec makes {codec.channels}"
        )
    ids = flux.image_ids(*codec.grid)
    length, pad = parts.tokenizer.model_max_length, parts.tokenizer.pad_token_id
    guidance = config.guidance if parts.transformer.guidance_embeds else None
    options = dict(dtype=jnp.dtype(config.dtype), remat=config.remat if remat is None else remat)

    def velocity(params, x, sigma, cond):
        return flux.apply(parts.transformer, params, x, sigma, cond["text"], cond["pooled"], guidance, ids, **options)

    def features(params, tokens):
        text = t5.apply(parts.text_encoder, params, tokens, options["dtype"])
        real = (tokens != pad)[..., None]
        # A T5-only model has no CLIP to pool from: the mean over the prompt's tokens stands in its place.
        return {"text": text, "pooled": (text * real).sum(1) / real.sum(1).astype(text.dtype)}

    def tokenize(prompts):
        rows = parts.tokenizer(list(prompts), padding="max_length", max_length=length)["input_ids"]
        for prompt, row in zip(prompts, rows):
            if len(row) > length:
                raise ValueError(f"prompt {prompt!r} has {len(row)} tokens; the model takes {length}")
        return np.asarray(rows, np.int32)

    flops = flux.flops(parts.transformer, int(np.prod(codec.grid)), length)
    return Policy(velocity, features, tokenize, codec, flops)
