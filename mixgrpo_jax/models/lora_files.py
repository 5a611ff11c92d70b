"""Files of adapters: written as diffusers names them, and read as diffusers, PEFT, kohya's scripts or ai-toolkit do.

A file names a layer as diffusers does or as the model's first release did, where one tensor may be of several layers of
ours: they then have the same A, and B's rows are cut. What a file gives is the product s B A, with s = alpha/r; alpha
is a tensor beside each pair, or in the header, or in PEFT's adapter_config.json, and r without any.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import safe_open

from mixgrpo_jax.models import lora
from mixgrpo_jax.models.io import hub, weights
from mixgrpo_jax.models.io.weights import Params, Rule
from mixgrpo_jax.models.lora_config import LoraConfig

FILE_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."  # names a pipeline's part in a file that may hold adapters of several
METADATA = "lora_adapter_metadata"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_FACTOR = re.compile(r"(.+)\.(?:lora_([AB])(?:\.default)?|lora[._](down|up))\.weight")
_PART = re.compile(r"(base_model\.model\.)?(transformer\.|(model\.)?diffusion_model\.|lora_(unet|transformer)_)?")
_REFUSED = {  # what our adapters cannot be, by its tensors' names
    r"(base_model\.model\.)?(text_encoder|text_model|lora_te|te\d?[._]|clip_[lg]|t5)": "of a text encoder",
    r".*(lora_magnitude|dora_scale)": "of DoRA",
    r".*\.lokr_": "of LoKr",
    r".*\.hada_": "of LoHa",
    r".*\.lora_mid": "of a convolution (LoCon)",
    r".*\.(oft_\w+|diff(_b)?)$": "of no low-rank adapter",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin in PEFT that leave another base than the model


def to_peft(table: Sequence[Rule], adapters: Params, scale: float) -> dict[str, np.ndarray]:
    """Tensors of a diffusers LoRA file: `transformer.{layer}.lora_A.weight` (r, in) and `.lora_B.weight` (out, r).

    `table` is the model's weights table. The scale is folded into lora_B: a file that says nothing of alpha means
    alpha = r to every reader, and not every reader looks for more.
    """
    pairs = lora.pairs(adapters)
    folded = {layer: {"a": a, "b": np.asarray(b) * np.float32(scale)} for layer, (a, b) in pairs.items()}
    return weights.export(rules(table), traverse_util.unflatten_dict(folded, sep="/"))


def save(folder: str | os.PathLike, table: Sequence[Rule], adapters: Params, scale: float) -> None:
    """Writes pytorch_lora_weights.safetensors, which diffusers' load_lora_weights and load_lora_adapter open."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights.write_safetensors(Path(folder) / FILE_NAME, to_peft(table, adapters, scale))


def rules(table: Sequence[Rule]) -> list[Rule]:
    """The rules of adapters' factors in a diffusers LoRA file, from the model's."""
    return [
        Rule(
            f"{PREFIX}{rule.theirs.removesuffix('.weight')}.lora_{factor.upper()}.weight",
            rule.ours.removesuffix("kernel") + factor,
            (1, 0),
            rotary=rule.rotary if factor == "b" else 0,
            turned=rule.turned,
            first=rule.first,
        )
        for rule in table
        if rule.ours.endswith("/kernel")
        for factor in "ab"
    ]


def start(config: LoraConfig, table: Sequence[Rule], params: Params, fresh: Params) -> Params:
    """Fresh adapters with those of `config.init_from` in their places: of the file's product, whatever its alpha.

    Layers and blocks that the file leaves out stay fresh, and change nothing. Raises ValueError as `load` does, and
    where the file has adapters of another rank, or of layers that config.targets leaves out.
    """
    path = hub.local(config.init_from, "model.lora.init_from", *hub.WEIGHTS, PEFT_CONFIG)
    found, ours = lora.pairs(load(path, table, params, config.scale)), lora.pairs(fresh)
    rank, of = next(iter(found.values()))[0].shape[-1], f"model.lora.init_from={config.init_from!r}"
    if rank != config.rank:
        raise ValueError(f"model.lora.rank={config.rank}, and {of} is of rank {rank}: set model.lora.rank={rank}")
    if others := sorted(found.keys() - ours.keys()):
        raise ValueError(
            f"model.lora.targets={config.targets!r} leaves out {lora.some(others)}, which {of} adapts: set "
            f"model.lora.targets='{'|'.join(sorted(found))}'"
        )

    def chosen(layer: str, fresh_a: Any, fresh_b: Any) -> dict[str, Any]:
        a, b = found.get(layer, (fresh_a, fresh_b))
        left_out = ~(a != 0).any((-2, -1), keepdims=True)  # where A and B are 0, nothing would ever learn
        return {"a": jnp.where(left_out, fresh_a, a), "b": jnp.asarray(b)}

    return traverse_util.unflatten_dict({layer: chosen(layer, *pair) for layer, pair in ours.items()}, sep="/")


def load(path: str | os.PathLike, table: Sequence[Rule], params: Params, scale: float = 1.0) -> Params:
    """Adapters from a LoRA file, fp32, on the host: scale A B is the product that the file gives.

    B comes back exactly where (alpha/r)/scale is a power of two, and to its last bit otherwise.

    Args:
      path: the file, or a folder of one.
      table: rules of the model's tensors by each of their names, see `Transformer.rules`.
      params: the model's parameters, or their shapes.
      scale: by which `attach` and `merge` multiply.

    Returns:
      {"a", "b"} at the paths of the layers that the file adapts, with zeros for blocks that it leaves out.

    Raises:
      ValueError: a tensor is of no layer of this model or of no low-rank adapter, has another rank than the others or
        another shape than its layer, lacks its pair, or is not finite; or alpha is given twice, or not understood. The
        message names the file and the tensor.
    """
    file = _file(Path(path))
    tensors, fields = weights.read_safetensors(file), _settings(file)
    try:
        return _read(tensors, fields, table, params, scale)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    named = [path / name for name in (FILE_NAME, PEFT_FILE) if (path / name).is_file()]
    found = named or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "no .safetensors"
        raise ValueError(f"{path} holds {names}: give the path of one LoRA file")
    return found[0]


def _settings(file: Path) -> dict[str, Any]:
    """PEFT's settings of the transformer's adapters: in the file's header, or in the file beside it."""
    with safe_open(file, framework="numpy") as opened:
        header = opened.metadata() or {}
    if file.name == PEFT_FILE and METADATA not in header and file.with_name(PEFT_CONFIG).is_file():
        fields = weights.read_json(file.with_name(PEFT_CONFIG))
    else:
        try:
            alone = {
                name: json.loads(header[name]) for name in header if name.endswith(("lora_alpha", "transformer.r"))
            }
            fields = json.loads(header[METADATA]) if METADATA in header else alone
            if not isinstance(fields, dict):
                raise ValueError(f"{METADATA} is no object")
        except ValueError as error:
            raise ValueError(f"{file}: its header is not understood ({error}): save it anew") from None
    return {name.removeprefix(PREFIX): value for name, value in fields.items()}


def _read(
    tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any], table: Sequence[Rule], params: Params, scale: float
) -> Params:
    pairs = _pairs(tensors)
    first, _ = next(iter(pairs.values()))
    rank = (*tensors[first].shape, 0)[0]
    if not rank:
        raise ValueError(f"tensor {first} is empty")
    _check_settings(fields, rank)
    kernels, places = lora.kernels(params), _places(table, params)
    adapters: dict[str, dict[str, np.ndarray]] = {}
    filled: dict[tuple[str, Any], str] = {}
    for module, (down, up) in pairs.items():
        name = module[_PART.match(module).end() :]  # type: ignore[union-attr]
        if name not in places:
            raise ValueError(f"{down} is of no linear layer of this model, which has {lora.some(places)}")
        own = _scale(module, name, rank, tensors, fields)
        for layer, block, rule in places[name]:
            d_in, d_out = kernels[layer].shape[-2:]
            shapes = {down: (rank, d_in), up: rule.their_shape((rank, d_out))}
            for tensor, expected in shapes.items():
                if (shape := tuple(tensors[tensor].shape)) != expected:
                    raise ValueError(
                        f"tensor {tensor} has shape {shape}, and {layer} takes {expected} at the first one's rank: all "
                        "must be of one rank, and of linear layers"
                    )
            if (other := filled.setdefault((layer, block), module)) != module:
                raise ValueError(f"{other} and {module} are both of {layer}: leave one out")
            if layer not in adapters:
                zeros = lora.factors(kernels[layer].shape, rank)
                adapters[layer] = {factor: np.zeros(leaf.shape, np.float32) for factor, leaf in zeros.items()}
            adapters[layer]["a"][block] = _finite(tensors, down).T
            adapters[layer]["b"][block] = rule.to_ours(_finite(tensors, up)) * np.float32(own / scale)
    return traverse_util.unflatten_dict(adapters, sep="/")


def _pairs(tensors: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The names of A and B by module."""
    names: dict[str, dict[str, str]] = {}
    for name in sorted(tensors):
        for pattern, what in _REFUSED.items():
            if re.match(pattern, name):
                raise ValueError(
                    f"{name} is {what}, and adapters here are low-rank ones of the transformer's linear layers alone: "
                    "leave it out, or merge the file into its base by the tool that made it, and start from that model"
                )
        if found := _FACTOR.fullmatch(name):
            names.setdefault(found[1], {})["a" if (found[2] or found[3]) in ("A", "down") else "b"] = name
        elif not name.endswith(".alpha"):
            raise ValueError(f"{name} is no tensor of a LoRA file that is known here")
    for name in sorted(tensors):
        if name.endswith(".alpha") and name.removesuffix(".alpha") not in names:
            raise ValueError(f"{name} is of no adapter in the file")
    for factors in names.values():
        if len(factors) != 2:
            raise ValueError(f"{next(iter(factors.values()))} is without its {'B' if 'a' in factors else 'A'}")
    if not names:
        raise ValueError("it holds no adapters (LoRA)")
    return {module: (factors["a"], factors["b"]) for module, factors in names.items()}


def _places(table: Sequence[Rule], params: Params) -> dict[str, list[tuple[str, Any, Rule]]]:
    """Where a module's adapters go, by its name, with dots or kohya's underscores: layers, blocks, and B's rule."""
    kernels, found = lora.kernels(params), dict[str, list[tuple[str, Any, Rule]]]()
    for rule in table:
        layer = rule.ours.removesuffix("/kernel")
        if layer not in kernels or not rule.ours.endswith("/kernel"):
            continue
        for block, name in enumerate(rule.names(kernels[layer].shape)):
            name, place = name.removesuffix(".weight"), (layer, block if rule.stacked else ..., rule)
            for alias in dict.fromkeys((name, name.replace(".", "_"))):
                found.setdefault(alias, []).append(place)
    return found


def _check_settings(fields: Mapping[str, Any], rank: int) -> None:
    begun = fields.get("init_lora_weights")
    odd = {name: fields[name] for name in ("use_dora", "lora_bias") if fields.get(name)}
    odd |= {"init_lora_weights": begun} if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE) else {}
    odd |= {"peft_type": fields["peft_type"]} if fields.get("peft_type", "LORA") != "LORA" else {}
    patterns = fields.get("alpha_pattern") or {}
    odd |= {} if isinstance(patterns, dict) else {"alpha_pattern": patterns}
    for name, value in odd.items():
        raise ValueError(
            f"its settings have {name}={value!r}, which is not supported: merge it into its base with PEFT"
        )
    if not fields.get("rank_pattern") and fields.get("r", rank) != rank:
        raise ValueError(f"its settings have r={fields['r']!r}, and its tensors are of rank {rank}")


def _scale(module: str, name: str, rank: int, tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> float:
    """alpha/r of a module."""
    given = list(_alphas(module, name, tensors, fields))
    for what, alpha in given:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"{what} is {alpha!r}: it must be a number")
    if len({alpha for _, alpha in given}) > 1:
        (one, first), (other, second), *_ = given
        raise ValueError(f"it gives alpha twice: {one} is {first:g}, and {other} {second:g}; take one out")
    alpha = given[0][1] if given else rank
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _alphas(module: str, name: str, tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What says a module's alpha, and what it says."""
    if (tensor := f"{module}.alpha") in tensors:
        value = tensors[tensor]
        yield tensor, float(value.reshape(())) if value.size == 1 else value.shape
    patterns = fields.get("alpha_pattern") or {}
    matched = [pattern for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)]
    if matched:
        yield f"alpha_pattern[{matched[0]!r}]", patterns[matched[0]]
    elif "lora_alpha" in fields:
        yield "lora_alpha", fields["lora_alpha"]


def _finite(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor in fp32. Raises ValueError where it is of no float type, or not finite."""
    weights.check_dtypes([name], tensors)
    tensor = np.asarray(tensors[name], np.float32)
    if not np.isfinite(tensor).all():
        raise ValueError(f"tensor {name} is not finite: the run that made it has diverged, take an earlier file")
    return tensor
