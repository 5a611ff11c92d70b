"""What a trainer sees of a model: a velocity, prompt features, pictures, what is trained, and where parameters lie."""

import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax import Array
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.models import flux, lora, t5, vae
from mixgrpo_jax.models.clip import text as clip
from mixgrpo_jax.models.codec import Codec, PixelCodec, VAECodec
from mixgrpo_jax.models.flux import weights as flux_weights
from mixgrpo_jax.models.lora import LoraConfig
from mixgrpo_jax.models.vae import VAEConfig

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
SHIPPED = ASSETS / "signs"
SHIPS = "shipped:"

# Column-parallel into a block, row-parallel out of it; everything else is only cut by fsdp and context. The first axis
# of a block's parameter is the block's index, over which the scan runs: it stays whole.
CUT = ("fsdp", "context")
RULES = (
    (r"blocks/(.*/)?(q|k|v|mlp_in|mlp_gate|modulation)/kernel", P(None, CUT, "tensor")),
    (r"blocks/(.*/)?(q|k|v|mlp_in|mlp_gate|modulation)/bias", P(None, "tensor")),
    (r"blocks/(.*/)?(attention_out|mlp_out|out)/kernel", P(None, "tensor", CUT)),
    (r"(image_in|text_in|linear_1|final_modulation|final_out)/kernel", P(CUT, "tensor")),
    (r"linear_2/kernel", P("tensor", CUT)),
    (r"embedding", P(CUT, None)),
    (r"blocks/.*/a$", P(None, CUT, None)),  # adapters
    (r"blocks/.*/b$", P(None, None, CUT)),
)


@dataclass(frozen=True)
class Policy:
    """A model family behind a few functions; parameters are passed in, never held.

    `params` are the folder's parts by name: "transformer", "text_encoder" (CLIP), "text_encoder_2" (T5), "vae".

    velocity: (transformer parameters, x [B, S, C], sigma scalar, cond) -> v [B, S, C] fp32.
    features: (params, tokens) -> cond, a dict of arrays with leading axis P.
    tokenize: prompts -> tokens, a dict of ids [P, L] int32.
    codec: pictures <-> packed latents.  flops: of one velocity of one sample.
    """

    velocity: Callable[[Any, Array, Array, Any], Array]
    features: Callable[[Any, Any], dict[str, Array]]
    tokenize: Callable[[Sequence[str]], dict[str, np.ndarray]]
    codec: Codec
    flops: float

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(tokens, channels) of a packed latent."""
        return int(np.prod(self.codec.grid)), self.codec.channels

    def decode(self, params: Any, tokens: Array) -> Array:
        """Packed latents [B, S, C] -> pictures [B, H, W, 3] uint8."""
        return self.codec.decode(params.get("vae"), tokens)


@dataclass(frozen=True)
class Parts:
    """The architectures of a FLUX-shaped policy and its tokenizers; None for what a folder does not hold."""

    transformer: flux.FluxConfig
    text_encoder_2: t5.T5Config | None = None
    tokenizer_2: transformers.PreTrainedTokenizerBase | None = None
    text_encoder: clip.CLIPTextConfig | None = None
    tokenizer: transformers.PreTrainedTokenizerBase | None = None
    vae: VAEConfig | None = None


def small_parts(tokenizer: transformers.PreTrainedTokenizerBase) -> Parts:
    """The embedded default: FLUX.1's architecture at width 128 over a two-layer T5."""
    return Parts(flux.flux_small(), t5.t5_tiny(vocab_size=64), tokenizer)


def find(folder: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint; "shipped:NAME" is one of those in the package, and "" is its `signs`.

    Raises ValueError for a name that does not ship.
    """
    if not str(folder).startswith(SHIPS):
        return pathlib.Path(folder) if folder else SHIPPED
    name = str(folder).removeprefix(SHIPS)
    known = sorted(path.name for path in ASSETS.iterdir())
    if name not in known:
        raise ValueError(f"model.folder={str(folder)!r} does not ship with the package; choose from {', '.join(known)}")
    return ASSETS / name


def init(parts: Parts, key: Array) -> dict[str, Any]:
    """Fresh parameters {"transformer": ..., "text_encoder_2": ...} of a policy without CLIP and VAE."""
    assert parts.text_encoder_2
    keys = jax.random.split(key)
    return {
        "transformer": flux.init(parts.transformer, keys[0]),
        "text_encoder_2": t5.init(parts.text_encoder_2, keys[1]),
    }


def load(
    folder: str | pathlib.Path,
    *,
    transformer: str = "",
    text: bool = True,
    dtype: Any = None,
    place: Callable[[Any], Any] | None = None,
) -> tuple[Parts, dict[str, Any]]:
    """Read a checkpoint folder as diffusers lays it out.

    transformer/ is needed; text_encoder/ (CLIP), text_encoder_2/ (T5) with their tokenizers, and vae/ are read where
    they are.

    Args:
        folder: the folder, see `find`.
        transformer: where else to take the transformer from: a folder, or FLUX.1's original single file.
        text: whether to read the text encoders; with cached features they are not needed.
        dtype: of the transformer's parameters; the file's own by default.
        place: shapes -> shardings, for parameters that go straight onto a mesh; host arrays by default.

    Raises ValueError where a part is missing.
    """
    folder = find(folder)
    source = pathlib.Path(transformer) if transformer else folder / "transformer"
    for needed in (source, *([folder / "text_encoder_2", folder / "tokenizer_2"] if text else [])):
        if not needed.exists():
            raise ValueError(
                f"model.folder={str(folder)!r} has no {needed.name}/; expected a checkpoint as diffusers saves it"
            )
    configs: dict[str, Any] = {}
    params: dict[str, Any] = {}
    configs["transformer"], params["transformer"] = flux_weights.load_folder(source, dtype, shardings=place)
    readers: dict[str, Callable] = {"text_encoder_2": t5.load_folder, "text_encoder": clip.load_folder}
    for name, read in ((readers if text else {}) | {"vae": vae.load_folder}).items():
        if (folder / name).is_dir():
            configs[name], host = read(folder / name)
            params[name] = host if place is None else jax.device_put(host, place(host))
    for name in ("tokenizer", "tokenizer_2") if text else ():
        if (folder / name).is_dir():
            configs[name] = transformers.AutoTokenizer.from_pretrained(folder / name)
    return Parts(**configs), params


def save(folder: str | pathlib.Path, parts: Parts, params: dict[str, Any]) -> None:
    """Write what `load` reads, and diffusers and transformers read too."""
    folder = pathlib.Path(folder)
    writers: dict[str, Callable] = {
        "transformer": flux_weights.save_folder,
        "text_encoder": clip.save_folder,
        "text_encoder_2": t5.save_folder,
        "vae": vae.save_folder,
    }
    for name in params:
        writers[name](folder / name, getattr(parts, name), params[name])
    for name in ("tokenizer", "tokenizer_2"):
        if tokenizer := getattr(parts, name):
            tokenizer.save_pretrained(folder / name)


def make(parts: Parts, config: Any, remat: str | None = None) -> Policy:
    """The policy of these parts under a config's `model` section.

    `remat` overrides the config's: a rollout keeps no activations, so it recomputes none. Guidance is ignored by models
    without its embedding.
    """
    size, dtype = tuple(config.image_size), jnp.dtype(config.dtype)
    codec: Codec = VAECodec(parts.vae, size, dtype) if parts.vae else PixelCodec(size)
    if codec.channels != parts.transformer.in_channels:
        raise ValueError(
            f"the transformer takes {parts.transformer.in_channels} channels a token, the codec makes {codec.channels}"
        )
    ids = flux.image_ids(*codec.grid)
    guidance = config.guidance if parts.transformer.guidance_embeds else None
    options = dict(dtype=dtype, remat=config.remat if remat is None else remat, attention=config.attention)

    def velocity(params, x, sigma, cond):
        return flux.apply(parts.transformer, params, x, sigma, cond["text"], cond["pooled"], guidance, ids, **options)

    flops = flux.flops(parts.transformer, int(np.prod(codec.grid)), config.text_length)
    return Policy(velocity, *text_functions(parts, config.text_length, dtype), codec, flops)


def text_functions(parts: Parts, length: int, dtype: Any) -> tuple[Callable, Callable]:
    """`features(params, tokens) -> cond` and `tokenize(prompts) -> tokens` with T5 prompts of `length` tokens.

    cond is {"text": T5's features [P, L, D], padding included, as FLUX attends to it; "pooled": CLIP's [P, C]}. A
    model without CLIP pools the mean over the prompt's own T5 tokens. A prompt that does not fit T5's length is
    refused; CLIP's is cut at its 77 tokens, as FLUX's own pipeline does.
    """

    def features(params, tokens):
        text = t5.apply(parts.text_encoder_2, params["text_encoder_2"], tokens["t5"], dtype)
        if parts.text_encoder:
            _, pooled = clip.apply(parts.text_encoder, params["text_encoder"], tokens["clip"], dtype)
            return {"text": text, "pooled": pooled}
        real = (tokens["t5"] != parts.tokenizer_2.pad_token_id)[..., None]
        return {"text": text, "pooled": (text * real).sum(1) / real.sum(1).astype(text.dtype)}

    def tokenize(prompts):
        rows = parts.tokenizer_2(list(prompts), padding="max_length", max_length=length)["input_ids"]
        for prompt, row in zip(prompts, rows):
            if len(row) > length:
                raise ValueError(
                    f"prompt {prompt!r} has {len(row)} tokens; the model takes {length}: shorten it, or raise "
                    "model.text_length"
                )
        tokens = {"t5": np.asarray(rows, np.int32)}
        if parts.text_encoder:
            limit = parts.text_encoder.max_position_embeddings
            cut = parts.tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True)
            tokens["clip"] = np.asarray(cut["input_ids"], np.int32)
        return tokens

    return features, tokenize


class Trainable(NamedTuple):
    """What is trained of a transformer, what stays, and how the two make the parameters of a velocity."""

    params: Any
    base: Any
    attach: Callable[[Any, Any], Any]


def trainable(params: Any, config: LoraConfig, key: Array, keep_base: bool) -> Trainable:
    """All parameters, or with a LoRA rank its adapters over the frozen base.

    `keep_base` asks for the parameters before training, as a KL to the reference and hybrid sampling do: a second copy
    of a fully trained model; with LoRA they are there at no cost.
    """
    if config.rank:
        return Trainable(lora.init(config, params, key), lora.freeze(params, config.base), attachment(config))
    copy = jax.tree.map(jnp.copy, params) if keep_base else None  # training takes the buffers of its own over
    return Trainable(params, copy, attachment(config))


def attachment(config: LoraConfig) -> Callable[[Any, Any], Any]:
    """`attach` of a `Trainable`."""
    if config.rank:
        return lambda trained, base: lora.attach(base, trained, config.scale)
    return lambda trained, base: trained
