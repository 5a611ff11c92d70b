"""What is good: rewards by name, and how they are built and asked."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np

from mixgrpo_jax.rewards import (
    aesthetic,
    brisque,
    chat,
    clip,
    colour,
    function,
    geneval,
    image_reward,
    jpeg,
    ocr,
    remote,
)
from mixgrpo_jax.rewards.contract import Images as Images
from mixgrpo_jax.rewards.contract import Reward as Reward
from mixgrpo_jax.rewards.on_device import OnDevice


def _reader(where: str) -> ocr.Read:
    if where not in ("host", "device"):
        raise ValueError(f"where={where!r}: 'host' reads with onnxruntime, 'device' with JAX")
    # A missing package should stop a run at its start, not after the first rollout.
    ocr.network() if where == "host" else ocr.device_network()
    return ocr.read if where == "host" else ocr.read_on_device


# Of text that is read on the device, too, the scores are waited for: it is compared on the host.
def _ocr(where: Literal["host", "device"] = "host") -> Reward:
    return Reward("ocr", "host", functools.partial(ocr.score, read=_reader(where)))


def _ocr_dense() -> Reward:
    ocr.device_network()
    return Reward("ocr_dense", "device", ocr.dense_score)


def _colour() -> Reward:
    return Reward("colour", "device", colour.score)


def _strict(where: Literal["host", "device"] = "host") -> Reward:
    return Reward("strict", "host", functools.partial(strict_score, read=_reader(where)))


def _brisque() -> Reward:
    brisque.regression()
    return Reward("brisque", "device", brisque.score)


def _geneval(strict: bool = False) -> Reward:
    """GenEval's score, of the task `scenes`: its pictures' shapes are detected by segmentation."""
    from mixgrpo_jax.tasks import detector as shapes  # not before: it brings the packages of data along

    def score(images: Images, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        del prompts
        return geneval.scores(shapes.detect(images), metadata, strict)

    return Reward("geneval_strict" if strict else "geneval", "host", score)


REWARDS: dict[str, Callable[..., Reward]] = {
    "ocr": _ocr,
    "ocr_dense": _ocr_dense,
    "colour": _colour,
    "strict": _strict,
    "geneval": _geneval,
    "geneval_strict": lambda: _geneval(strict=True),
    "hps": clip.hps,
    "pickscore": clip.pickscore,
    "clipscore": clip.clipscore,
    "aesthetic": aesthetic.aesthetic,
    "image_reward": image_reward.image_reward,
    "brisque": _brisque,
    "jpeg_compressibility": lambda: Reward("jpeg_compressibility", "host", jpeg.compressibility),
    "jpeg_incompressibility": lambda: Reward("jpeg_incompressibility", "host", jpeg.incompressibility),
    "function": function.function_reward,
    "remote": remote.remote,
    "chat": chat.chat,
}

FILES = {"weights", "tokenizer", "head"}  # options that name files of a model on the device


def build(names: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> list[Reward]:
    """The rewards of these names, each with its options as keywords.

    A reward is that of REWARDS by its name, or by its option `kind`: several of one kind may stand side by side. Raises
    ValueError for an unknown kind, an option it does not take, or one that it lacks.
    """
    return [_build(name, dict(options.get(name, {}))) for name in names]


def _build(name: str, options: dict[str, Any]) -> Reward:
    kind = options.pop("kind", name)
    if kind not in REWARDS:
        raise ValueError(f"reward {name!r} is unknown: choose from {', '.join(sorted(REWARDS))}, or set kind to one")
    signature = inspect.signature(REWARDS[kind])
    if "name" in signature.parameters:  # what a server calls it
        options = {"name": name} | options
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"reward_options.{name}={options}: {error}; {kind} takes {signature}") from None
    return dataclasses.replace(REWARDS[kind](**options), name=name)


def sketch(names: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, OnDevice]:
    """Of the rewards of these names, those that load a model's weights onto the device, with shapes in their place."""
    found = {}
    for name in names:
        own = dict(options.get(name, {}))
        files = inspect.signature(REWARDS.get(own.get("kind", name), dict)).parameters.keys() & FILES
        if "weights" in files:
            found[name] = cast(OnDevice, _build(name, own | dict.fromkeys(files) | {"probe": None}).score)
    return found


def strict_score(images: Images, prompts: list[str], metadata: list[dict], read: ocr.Read = ocr.read) -> np.ndarray:
    """1 where the number is read exactly and both colours are the ones asked for, else 0; float32 [B].

    Too sparse to learn from, and therefore the fair measure on held-out prompts.
    """
    del prompts
    read_right = [text == m["number"] for text, m in zip(read(images), metadata, strict=True)]
    return (colour.named_right(images, metadata) & np.array(read_right)).astype(np.float32)


def score_all(
    rewards: Sequence[Reward], images: Images, prompts: list[str], metadata: list[dict]
) -> dict[str, np.ndarray]:
    """Scores of every reward, {name: float32 [B]}.

    Raises:
        ValueError: if a reward's scores are not of shape [B], or not finite; the message names it and the sample.
    """
    return score_chunks(rewards, [(images, prompts, metadata)])


def score_chunks(
    rewards: Sequence[Reward], chunks: Iterable[tuple[Images, list[str], list[dict]]]
) -> dict[str, np.ndarray]:
    """`score_all` of images that come in chunks, {name: float32 [B]}, one chunk behind the other.

    While the host scores a chunk, devices are free to make the next one: nothing waits for a device's scores before
    the host's of the last chunk are there.
    """
    # Device rewards first: they return at once, and compute while the host is busy with the others.
    queue = sorted(rewards, key=lambda reward: reward.where != "device")
    given: dict[str, list[Images]] = {reward.name: [] for reward in rewards}
    asked: list[list[str]] = []
    for images, prompts, metadata in chunks:
        asked.append(prompts)
        for reward in queue:
            given[reward.name].append(reward.score(images, prompts, metadata))
    everything = [prompt for prompts in asked for prompt in prompts]
    return {
        name: _finite(name, np.concatenate([_shaped(name, *chunk) for chunk in zip(scores, asked)]), everything)
        for name, scores in given.items()
    }


def _shaped(name: str, scores: Images, prompts: list[str]) -> np.ndarray:
    scores = np.asarray(scores, np.float32)
    if scores.shape != (len(prompts),):
        raise ValueError(f"reward {name!r} gave scores of shape {scores.shape} for {len(prompts)} images: return [B]")
    return scores


def _finite(name: str, scores: np.ndarray, prompts: list[str]) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        i = bad[0]
        raise ValueError(
            f"reward {name!r} gave {scores[i]} for sample {i} ({prompts[i]!r}), and {bad.size} of {len(scores)} scores "
            "are not finite: look at that image, or drop the reward from the config"
        )
    return scores
