"""How rewards are built by name, and asked."""

import dataclasses
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from mixgrpo_jax.rewards import REWARDS
from mixgrpo_jax.rewards.contract import Array, Images, Reward, Score, as_score
from mixgrpo_jax.rewards.on_device import OnDevice

FILES = {"weights", "tokenizer", "head"}  # options that name files of a model on the device


def build(names: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> list[Reward]:
    """The rewards of these names, each with its options as keywords.

    A reward is that of REWARDS by its name, or by its option `kind`: several of one kind may stand side by side. A kind
    may also be the "module:function" of a builder that is not in the table. Raises ValueError for an unknown kind, an
    option it does not take, or one that it lacks.
    """
    return [_build(name, dict(options.get(name, {}))) for name in names]


def _build(name: str, options: dict[str, Any]) -> Reward:
    kind = options.pop("kind", name)
    builder = _builder(name, kind)
    signature = inspect.signature(builder)
    if "name" in signature.parameters:  # what a server calls it
        options = {"name": name} | options
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"reward_options.{name}={options}: {error}; {kind} takes {signature}") from None
    return dataclasses.replace(builder(**options), name=name)


def _builder(name: str, kind: str) -> Callable[..., Reward]:
    if kind not in REWARDS and ":" not in kind:
        raise ValueError(
            f"reward {name!r} is unknown: choose from {', '.join(sorted(REWARDS))}, or set kind to one, or to the "
            '"module:function" of a builder'
        )
    try:
        return pkgutil.resolve_name(REWARDS.get(kind, kind))
    except (ImportError, AttributeError, ValueError) as error:
        if kind in REWARDS:  # a package is missing, and the error says which
            raise
        raise ValueError(f"reward {name!r}: there is no builder {kind!r}: {error}") from error


def sketch(names: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, OnDevice]:
    """Of the rewards of these names, those that load a model's weights onto the device, with shapes in their place."""
    found = {}
    for name in names:
        own = dict(options.get(name, {}))
        files = inspect.signature(_builder(name, own.get("kind", name))).parameters.keys() & FILES
        if "weights" in files:
            found[name] = cast(OnDevice, _build(name, own | dict.fromkeys(files) | {"probe": None}).score)
    return found


def score_all(rewards: Sequence[Reward], images: Images, prompts: list[str], metadata: list[dict]) -> dict[str, Score]:
    """Scores of every reward by name: NumPy arrays in float32, value [B], and map [B, S] or None.

    Raises:
        ValueError: if a reward's values are not of shape [B], its map not of shape [B, S], or either is not finite; the
            message names it and the sample.
    """
    return score_chunks(rewards, [(images, prompts, metadata)])


def score_chunks(rewards: Sequence[Reward], chunks: Iterable[tuple[Images, list[str], list[dict]]]) -> dict[str, Score]:
    """`score_all` of images that come in chunks, one chunk behind the other.

    While the host scores a chunk, devices are free to make the next one: nothing waits for a device's scores before
    the host's of the last chunk are there.
    """
    # Device rewards first: they return at once, and compute while the host is busy with the others.
    queue = sorted(rewards, key=lambda reward: reward.where != "device")
    given: dict[str, list[Score]] = {reward.name: [] for reward in rewards}
    asked: list[list[str]] = []
    for images, prompts, metadata in chunks:
        asked.append(prompts)
        for reward in queue:
            given[reward.name].append(as_score(reward.score(images, prompts, metadata)))
    return {name: _joined(name, scores, asked) for name, scores in given.items()}


def _joined(name: str, scores: Sequence[Score], asked: Sequence[list[str]]) -> Score:
    """A reward's scores of all chunks, checked."""
    values = [_value(name, score.value, prompts) for score, prompts in zip(scores, asked)]
    maps = [_map(name, score.map, prompts) for score, prompts in zip(scores, asked) if score.map is not None]
    positions = {each.shape[1] for each in maps}
    if len(maps) not in (0, len(values)) or len(positions) > 1:
        raise ValueError(
            f"reward {name!r} gave {len(maps)} maps for {len(values)} chunks of images, of {sorted(positions)} "
            "positions: return a map for all images, or for none, of as many positions each time"
        )
    everything = [prompt for prompts in asked for prompt in prompts]
    return Score(
        _finite(name, np.concatenate(values), everything),
        _finite(name, np.concatenate(maps), everything) if maps else None,
    )


def _value(name: str, value: Array, prompts: list[str]) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if value.shape != (len(prompts),):
        raise ValueError(f"reward {name!r} gave scores of shape {value.shape} for {len(prompts)} images: return [B]")
    return value


def _map(name: str, array: Array, prompts: list[str]) -> np.ndarray:
    array = np.asarray(array, np.float32)
    if array.ndim != 2 or len(array) != len(prompts):
        raise ValueError(
            f"reward {name!r} gave a map of shape {array.shape} for {len(prompts)} images: return [B, S], a number for "
            "each latent position"
        )
    return array


def _finite(name: str, array: np.ndarray, prompts: list[str]) -> np.ndarray:
    """A value [B] or a map [B, S], unless a number in it is not finite."""
    wrong = ~np.isfinite(array)
    bad = np.flatnonzero(wrong.reshape(len(array), -1).any(1))
    if bad.size:
        i = bad[0]
        raise ValueError(
            f"reward {name!r} gave {array[wrong][0]} for sample {i} ({prompts[i]!r}), and {bad.size} of {len(array)} "
            "scores are not finite: look at that image, or drop the reward from the config"
        )
    return array
