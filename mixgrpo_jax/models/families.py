"""The model families, each in a folder of its own that is imported when it is named, and checkpoints of any of them.

A checkpoint is a folder as diffusers lays it out: transformer/, text encoders with their tokenizers, vae/. The class
name in transformer/config.json tells the family. To add one, write its `Family` and a line of `FAMILIES`.
"""

import functools
import os
import pathlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from mixgrpo_jax.models.io import hub, weights
from mixgrpo_jax.models.io.transformer import Transformer
from mixgrpo_jax.models.policy import Policy, check_lengths

# By diffusers' class name of the transformer.
FAMILIES = {
    "FluxTransformer2DModel": "mixgrpo_jax.models.flux.policy:FAMILY",
    "Flux2Transformer2DModel": "mixgrpo_jax.models.flux2.policy:FAMILY",
    "SD3Transformer2DModel": "mixgrpo_jax.models.sd3.policy:FAMILY",
}

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
SHIPPED = ASSETS / "signs"
SHIPS = "shipped:"
PIPELINE, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
# What says which parts there are, and how they are used.
CONFIGS = ("config.json", "*/config.json", "*/tokenizer_config.json", PIPELINE, SCHEDULER)

Rules = Sequence[tuple[str, PartitionSpec]]


class Model(Protocol):
    """A module, or `Transformer`, that initialises a part of a checkpoint, and reads and writes its folder."""

    def init(self, config: Any, key: Array, /) -> Any:
        """Fresh parameters in fp32."""

    def read_config(self, folder: Any, /) -> Any:
        """The sizes in a folder. Raises ValueError for a folder of another model."""

    def load_folder(self, folder: Any, /, dtype: Any = None) -> tuple[Any, Any]:
        """The config and the parameters, on the host, in `dtype` or else in the files' own."""

    def save_folder(self, folder: Any, config: Any, params: Any, /) -> None:
        """Writes what `load_folder` reads."""


class Part(NamedTuple):
    """A part of a checkpoint, which some lack where it is optional. A text encoder names its tokenizer's folder."""

    model: Model
    tokenizer: str = ""
    optional: bool = False


class Text(NamedTuple):
    """What prompts become.

    features: (params, tokens) -> cond, a dict of arrays with leading axis P.
    tokenize: (prompts, cut=False) -> tokens, a dict of ids [P, L] int32. A prompt that does not fit is cut, or raises
      ValueError.
    limits: by encoder, the tokens of a prompt that it takes.
    written: prompts -> what tokenizers read of them.
    """

    features: Callable[[Any, Any], dict[str, Array]]
    tokenize: Callable[..., dict[str, np.ndarray]]
    limits: Mapping[str, int]
    written: Callable[[Sequence[str]], list[str]] = list


@dataclass(frozen=True)
class Family:
    """Models of one architecture, of any size.

    transformer: how the part that is trained is stored.
    parts: the other parts by their folder's name. Of the text encoders, the first is the one whose tokens
      model.text_length counts.
    rules: ordered (regex, PartitionSpec): a parameter lies as the first regex says that is found in its path.
    targets: the layers that adapters are for by default, see `LoraConfig`.
    text: (parts, tokens of a prompt, dtype, negative prompt, by default "") -> Text. Raises ValueError for a negative
      prompt where the family takes none.
    make: (parts, a config's `model` section, remat) -> Policy. `remat`, if not None, overrides the config's: a rollout
      keeps no activations, so it recomputes none. Raises ValueError for parts or settings that do not fit.
    small: configs by part of a model that is trained from scratch on small pictures.
    architectures: configs by part of released models, by their name.
    fixed: a regex of the transformer's parameters that are not trained, and have no gradient.
    """

    transformer: Transformer
    parts: Mapping[str, Part]
    rules: Rules
    targets: str
    text: Callable[..., Text]
    make: Callable[..., Policy]
    small: Callable[[], dict[str, Any]]
    architectures: Mapping[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    fixed: str = ""

    @property
    def models(self) -> dict[str, Model]:
        """Of all parts."""
        return {"transformer": self.transformer} | {name: part.model for name, part in self.parts.items()}

    @property
    def encoders(self) -> dict[str, str]:
        """The folders of tokenizers by text encoder."""
        return {name: part.tokenizer for name, part in self.parts.items() if part.tokenizer}


@dataclass(frozen=True)
class Parts:
    """The architectures of the parts that a checkpoint has, and its tokenizers, by their folders' names.

    `pipeline` is what model_index.json says of them, and `scheduler` its config, where there is one.
    """

    family: Family
    configs: Mapping[str, Any]
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fixed_shift(self) -> float | None:
        """The shift that the checkpoint's own scheduler has for pictures of any size, or None."""
        return None if self.scheduler.get("use_dynamic_shifting") else self.scheduler.get("shift")

    @property
    def table(self) -> Sequence[weights.Rule]:
        """The rules of the transformer's tensors."""
        return self.family.transformer.table(self.configs["transformer"])

    def token_ids(self, encoder: str, prompts: Sequence[str], limit: int, cut: bool) -> np.ndarray:
        """A text encoder's ids of prompts, padded to `limit`: [P, limit] int32.

        Raises ValueError for a longer prompt, unless it is to be cut.
        """
        tokenizer = self.tokenizers[self.family.encoders[encoder]]
        rows = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=cut)["input_ids"]
        check_lengths(prompts, rows, limit)
        return np.asarray(rows, np.int32)


def find(folder: str | os.PathLike, *wanted: str, field: str = "model.folder") -> pathlib.Path:
    """The folder of a checkpoint; "shipped:NAME" is one of those in the package, and "" is its `signs`.

    Otherwise it is a path, or a name on the hub, of which what is `wanted` is fetched, its parts' configs by default:
    see `hub.local`. Raises ValueError, which names the field, for what is neither.
    """
    if not str(folder).startswith(SHIPS):
        return hub.local(folder, field, *(wanted or CONFIGS)) if str(folder) else SHIPPED
    name = str(folder).removeprefix(SHIPS)
    known = sorted(path.name for path in ASSETS.iterdir())
    if name not in known:
        raise ValueError(f"{field}={str(folder)!r} does not ship with the package; choose from {', '.join(known)}")
    return ASSETS / name


def is_here(folder: str | os.PathLike) -> bool:
    """Whether `find` needs no network."""
    return not str(folder) or str(folder).startswith(SHIPS) or hub.is_here(folder)


def find_transformer(name: str | os.PathLike, field: str) -> pathlib.Path:
    """Where a transformer is: that of a checkpoint's folder, or a folder or an original file of its own; see `find`."""
    place = find(name, field=field)
    if (place / "transformer").is_dir():
        return find(name, "transformer/*", field=field) / "transformer"
    return find(name, "config.json", *hub.WEIGHTS, field=field)


def of(transformer: str | os.PathLike) -> Family:
    """The family of a transformer: a folder with config.json, or an original single file, which families know by sight.

    Raises ValueError where there is nothing, or a model of no family.
    """
    path, known = Path(transformer), ", ".join(FAMILIES)
    if not path.exists():
        raise ValueError(f"there is no {path}: give a transformer's folder, or an original .safetensors file")
    if path.is_file():
        for family in _families():
            if (release := family.transformer.release) and release.recognises(path):
                return family
        raise ValueError(
            f"{path} is no original release of a known model ({known}). A file of a diffusers model is opened by the "
            "folder that holds it and config.json; adapters (LoRA) start a run by model.lora.init_from, and convert "
            "takes them with their --base"
        )
    name = weights.read_config(path, {}).get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{path / 'config.json'} has _class_name={name!r}, no known family; choose from {known}")
    return pkgutil.resolve_name(FAMILIES[name])


def of_encoders(folder: Path) -> Family:
    """The family of a checkpoint's folder. Where it has text encoders alone, the one that reads the most of them.

    Raises ValueError where no family's are.
    """
    if (folder / "transformer").is_dir():
        return of(folder / "transformer")
    lacks = [(family, _lacks(family, folder)) for family in _families()]
    if found := [family for family, absent in lacks if not absent]:
        return max(found, key=lambda family: sum(_reads(family, name, folder) for name in family.encoders))
    needs = "; ".join(f"{family.transformer.class_name} needs {', '.join(absent)}" for family, absent in lacks)
    raise ValueError(f"{str(folder)!r} has no model's text encoders ({needs}); give a folder as diffusers saves it")


def _families() -> list[Family]:
    return [pkgutil.resolve_name(path) for path in FAMILIES.values()]


def _lacks(family: Family, folder: Path) -> list[str]:
    """The folders of needed text encoders and tokenizers that are not there."""
    needed = [(name, part.tokenizer) for name, part in family.parts.items() if part.tokenizer and not part.optional]
    return [f"{name}/" for pair in needed for name in pair if not (folder / name).is_dir()]


def _reads(family: Family, part: str, folder: Path) -> bool:
    """Whether the folder has the part, and of a model that the family takes there."""
    try:
        family.parts[part].model.read_config(folder / part)
    except ValueError:
        return False
    return True


def load(
    folder: str | os.PathLike,
    *,
    transformer: str = "",
    text: bool = True,
    dtype: Any = None,
    place: Callable[[Any, Rules], Any] | None = None,
) -> tuple[Parts, dict[str, Any]]:
    """Read a checkpoint: its parts, and their parameters by part.

    Args:
        folder: the folder, see `find`. The family's optional parts are read where they are.
        transformer: where else to take the transformer from: a folder, or an original single file.
        text: whether to read the text encoders; with cached features they are not needed.
        dtype: of the transformer's parameters; the file's own by default.
        place: (shapes, the family's rules) -> shardings, for parameters that go straight onto a mesh; host arrays by
            default.

    Raises ValueError where a part is missing, or of no known family.
    """
    family, source, folder = _open(folder, transformer, text, hub.WEIGHTS)
    places = None if place is None else lambda tree: place(tree, family.rules)
    configs: dict[str, Any] = {}
    params: dict[str, Any] = {}
    configs["transformer"], params["transformer"] = family.transformer.load_folder(source, dtype, shardings=places)
    for name in _present(family, folder, text):
        configs[name], host = family.parts[name].model.load_folder(folder / name)
        params[name] = host if places is None else jax.device_put(host, places(host))
    return Parts(family, configs, read_tokenizers(family, folder, configs), *_usage(folder)), params


def read_parts(folder: str | os.PathLike, transformer: str = "") -> Parts:
    """The parts that `load` reads, from their configs and tokenizers alone. Raises ValueError as it does."""
    family, source, folder = _open(folder, transformer, text=False)
    present = _present(family, folder, text=True)
    configs = {name: family.parts[name].model.read_config(folder / name) for name in present}
    configs = {"transformer": family.transformer.read_config(source)} | configs
    return Parts(family, configs, read_tokenizers(family, folder, configs), *_usage(folder))


def _open(
    folder: str | os.PathLike, transformer: str, text: bool, stored: Sequence[str] = ()
) -> tuple[Family, Path, Path]:
    """The family of a checkpoint, and where its transformer and its other parts are, with weights in files like these.

    Without weights, all parts are there, and text encoders with them.
    """
    place = find(folder)
    wanted = ("config.json", *stored)
    source = hub.local(transformer, "model.transformer", *wanted) if transformer else place / "transformer"
    lacks = [] if source.exists() else [f"{source.name}/"]
    if not lacks and text:
        family = of(source)
        tokenizers = [family.encoders[name] for name in _present(family, place, text) if name in family.encoders]
        absent = [f"{name}/" for name in tokenizers if not (place / name).is_dir()]  # optional encoders' too
        lacks = list(dict.fromkeys([*_lacks(family, place), *absent]))
    if lacks:
        raise ValueError(
            f"model.folder={str(folder)!r} has no {', '.join(lacks)}; expected a checkpoint as diffusers saves it: "
            "fetch what it lacks"
        )
    family = of(source)
    parts = [*(() if transformer else ("transformer",)), *_present(family, place, text or not stored)]
    files = [f"{part}/{file}" for part in parts for file in wanted]
    files += [f"{family.encoders[name]}/{file}" for name in parts if name in family.encoders for file in hub.TOKENIZER]
    return family, source, find(folder, *files, PIPELINE, SCHEDULER)


def _usage(folder: Path) -> tuple[dict[str, Any], ...]:
    """What the folder says of its pipeline, and of its scheduler; of what is not there, nothing."""
    files = (folder / PIPELINE, folder / SCHEDULER)
    return tuple(weights.read_json(file) if file.is_file() else {} for file in files)


def _present(family: Family, folder: Path, text: bool) -> list[str]:
    return [name for name, part in family.parts.items() if (folder / name).is_dir() and (text or not part.tokenizer)]


def read_tokenizers(family: Family, folder: Path, encoders: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizers of those of the encoders that have one in the folder."""
    names = [name for encoder, name in family.encoders.items() if encoder in encoders and (folder / name).is_dir()]
    if not names:
        return {}
    from transformers import AutoTokenizer  # it takes seconds to import

    found = {}
    for name in names:
        try:
            found[name] = AutoTokenizer.from_pretrained(folder / name)
        except Exception as error:  # of many kinds, none of which names the folder
            raise ValueError(
                f"{folder / name} holds no tokenizer that can be read ({error}): fetch it again"
            ) from error
    return found


def save(folder: str | os.PathLike, parts: Parts, params: Mapping[str, Any]) -> None:
    """Write what `load` reads, and diffusers and transformers read too."""
    for name in params:
        parts.family.models[name].save_folder(Path(folder) / name, parts.configs[name], params[name])
    for name, tokenizer in parts.tokenizers.items():
        tokenizer.save_pretrained(Path(folder) / name)


def small_parts(folder: str | os.PathLike, tokenizer: Any) -> Parts:
    """A small model of the family of the checkpoint `folder`, to train from scratch on the prompts of a tokenizer."""
    family = of(find(folder) / "transformer")
    configs = family.small()
    return Parts(family, configs, {name: tokenizer for encoder, name in family.encoders.items() if encoder in configs})


def architectures() -> dict[str, Callable[[], Parts]]:
    """The released models of all families, without their tokenizers, by name."""

    def parts(family: Family, configs: Callable[[], dict[str, Any]]) -> Parts:
        return Parts(family, configs())

    return {
        name: functools.partial(parts, family, configs)
        for family in _families()
        for name, configs in family.architectures.items()
    }


def init(parts: Parts, key: Array) -> dict[str, Any]:
    """Fresh parameters in fp32 by part."""
    names = [name for name in parts.family.models if name in parts.configs]
    keys = jax.random.split(key, len(names))
    return {name: parts.family.models[name].init(parts.configs[name], key) for name, key in zip(names, keys)}


def shapes(parts: Parts, *, text: bool, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Shapes of the parameters by part, in bf16 as released, the transformer's in `dtype`; `text` encoders or none."""
    made = jax.eval_shape(functools.partial(init, parts), jax.random.key(0))

    def cast(name: str, tree: Any) -> Any:
        own = dtype if name == "transformer" else jnp.bfloat16
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, own), tree)

    return {name: cast(name, tree) for name, tree in made.items() if text or name not in parts.family.encoders}
