"""How rewards are built by name, and asked."""

import collections
import dataclasses
import inspect
import logging
import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from mixgrpo_jax.rewards import REWARDS
from mixgrpo_jax.rewards.contract import Array, Images, Incomplete, Missing, Reward, Score, as_incomplete
from mixgrpo_jax.rewards.on_device import OnDevice

Chunk = tuple[Images, list[str], list[dict]]

PAUSE = 1.0  # seconds before missing scores are asked for again, beside what a reward itself waits
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
    try:
        return dataclasses.replace(builder(**options), name=name)
    except SystemExit as error:
        raise RuntimeError(f"reward {name!r} called sys.exit({error.code!r}) as it was built") from error


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
        ConnectionError: if a sample has no score.
    """
    return score_chunks(rewards, [(images, prompts, metadata)])


def score_chunks(
    rewards: Sequence[Reward],
    chunks: Iterable[Chunk],
    missing_share: float = 0.0,
    wait: float = 0.0,
    waiting: Callable[[], None] = lambda: None,
) -> dict[str, Score]:
    """`score_all` of images that come in chunks, one chunk behind the other.

    While the host scores a chunk, devices are free to make the next one: nothing waits for a device's scores before
    the host's of the last chunk are there.

    Where more than `missing_share` of the images have no score of a reward, those that may have one later are asked for
    again, for `wait` seconds, after a call of `waiting`. What is missing then is NaN in value and map, and nothing else
    is; more of it than `missing_share` is a ConnectionError.
    """
    # Device rewards first: they return at once, and compute while the host is busy with the others.
    queue = sorted(rewards, key=lambda reward: reward.where != "device")
    given: dict[str, list[Incomplete]] = {reward.name: [] for reward in rewards}
    asked: list[list[str]] = []
    incomplete: dict[str, list[tuple[int, Chunk]]] = {}
    for i, chunk in enumerate(chunks):
        asked.append(chunk[1])
        for reward in queue:
            given[reward.name].append(_ask(reward, *chunk))
            if given[reward.name][i].missing:
                incomplete.setdefault(reward.name, []).append((i, chunk))
    for reward in queue:
        if reward.name in incomplete:
            allowed = missing_share * sum(map(len, asked))
            _ask_again(reward, given[reward.name], incomplete[reward.name], allowed, wait, waiting)
    return {name: _joined(name, scores, asked) for name, scores in given.items()}


def _ask(reward: Reward, images: Images, prompts: list[str], metadata: list[dict]) -> Incomplete:
    try:
        return as_incomplete(reward.score(images, prompts, metadata))
    except SystemExit as error:  # a run that ends so looks finished
        raise RuntimeError(f"reward {reward.name!r} called sys.exit({error.code!r}): raise an exception") from error
    except Exception as error:
        error.add_note(f"This is of the reward {reward.name!r}.")
        raise


def _ask_again(
    reward: Reward,
    given: list[Incomplete],
    incomplete: Sequence[tuple[int, Chunk]],
    allowed: float,
    wait: float,
    waiting: Callable[[], None],
) -> None:
    """Ask for what is missing of the chunks `incomplete` until no more than `allowed` is, and fill it in."""
    end = time.monotonic() + wait
    while True:
        missing = [why for i, _ in incomplete for why in given[i].missing.values()]
        count = f"{len(missing)} images have no score of reward {reward.name!r}"
        left = end - time.monotonic()
        if len(missing) <= allowed:
            break
        if left <= 0 or not any(why.passing for why in missing):
            raise ConnectionError(
                f"{count}, and missing_share allows {allowed:g}: {_reason(missing)}. Mend the servers and start "
                "the run again, which goes on where it was saved, or raise reward_wait or missing_share"
            )
        logging.getLogger(__name__).warning("%s; asking for %.0f s more. %s", count, left, _reason(missing))
        waiting()
        time.sleep(min(PAUSE, left))
        for i, chunk in incomplete:
            if time.monotonic() < end:
                given[i] = _completed(reward, given[i], *chunk)
    if missing:
        logging.getLogger(__name__).warning("%s, and are left out: %s", count, _reason(missing))


def _reason(missing: Sequence[Missing]) -> str:
    return collections.Counter(why.why for why in missing).most_common(1)[0][0]


def _completed(
    reward: Reward, score: Incomplete, images: Images, prompts: list[str], metadata: list[dict]
) -> Incomplete:
    """A score, with what was missing for the time being asked for again."""
    missing = dict(score.missing)
    rows = [row for row, why in missing.items() if why.passing]
    if not rows:
        return score
    chosen = np.asarray(images)[rows], [prompts[row] for row in rows], [metadata[row] for row in rows]
    again = _ask(reward, *chosen)
    for i, row in enumerate(rows):
        if i in again.missing:
            missing[row] = again.missing[i]
        else:
            del missing[row]

    def filled(old: Any, new: Any) -> Any:
        array = np.array(old, np.float32)
        array[rows] = new
        return array

    rest = (None if old is None else filled(old, new) for old, new in zip(score[2:], again[2:]))
    return Incomplete(filled(score.value, again.value), missing, *rest)


def _joined(name: str, scores: Sequence[Incomplete], asked: Sequence[list[str]]) -> Score:
    """A reward's scores of all chunks, checked."""
    values = [_value(name, score.value, prompts) for score, prompts in zip(scores, asked)]
    rows = [_rows(name, what, scores, asked) for what in ("map", "features")]
    everything = [prompt for prompts in asked for prompt in prompts]
    there = np.array([i not in score.missing for score, prompts in zip(scores, asked) for i in range(len(prompts))])
    return Score(
        _finite(name, np.concatenate(values), everything, there),
        *(_finite(name, np.concatenate(each), everything, there) if each else None for each in rows),
    )


def _rows(name: str, what: str, scores: Sequence[Incomplete], asked: Sequence[list[str]]) -> list[np.ndarray]:
    """The maps, or the features, of all chunks, or of none."""
    given = [(getattr(score, what), prompts) for score, prompts in zip(scores, asked)]
    arrays = [_map(name, array, prompts) for array, prompts in given if array is not None]
    sizes = {each.shape[1] for each in arrays}
    if len(arrays) not in (0, len(scores)) or len(sizes) > 1:
        raise ValueError(
            f"reward {name!r} gave {len(arrays)} {what.removesuffix('s')}s for {len(scores)} chunks of images, of "
            f"{sorted(sizes)} positions: return a {what.removesuffix('s')} for all images, or for none, of as many "
            "positions each time"
        )
    return arrays


def of_groups(rewards: Sequence[Reward], scores: Mapping[str, Score], group: np.ndarray) -> dict[str, Score]:
    """Scores of the samples [B] of whole groups, where rewards that compare them have done so; NaN stays."""
    compared = {reward.name: reward.of_group for reward in rewards if reward.of_group is not None}
    result = dict(scores)
    for name, function in compared.items():
        there = ~np.isnan(scores[name].value)
        value = np.full(len(there), np.nan, np.float32)
        value[there] = function(np.asarray(scores[name].features)[there], np.asarray(group)[there])
        result[name] = scores[name]._replace(value=value)
    return result


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


def _finite(name: str, array: np.ndarray, prompts: list[str], there: np.ndarray) -> np.ndarray:
    """A value [B] or a map [B, S], unless a number that is there, [B], is not finite; NaN of the others."""
    wrong = ~np.isfinite(array) & there.reshape(-1, *[1] * (array.ndim - 1))
    bad = np.flatnonzero(wrong.reshape(len(array), -1).any(1))
    if bad.size:
        i = bad[0]
        raise ValueError(
            f"reward {name!r} gave {array[wrong][0]} for sample {i} ({prompts[i]!r}), and {bad.size} of {len(array)} "
            "scores are not finite: look at that image, or drop the reward from the config"
        )
    if not there.all():
        array = array.copy()
        array[~there] = np.nan
    return array
