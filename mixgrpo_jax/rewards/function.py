"""A reward of the user's own: a Python function, named by where it is."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from mixgrpo_jax.rewards.contract import Images, Reward, Score

SIGNATURE = "(images uint8 [B, H, W, 3], prompts, metadata) -> scores [B]"


def function_reward(path: str, where: Literal["device", "host"] = "host") -> Reward:
    """The reward that a Python function computes, under the name `path`.

    Args:
        path: "module:function", or "folder/file.py:function". The function keeps the contract of `Reward.score`. Its
            module is imported, and so runs.
        where: "host" for a function that computes on the CPU: it is given its images as a NumPy array, and may return
            any sequence of numbers, or a `Score`. "device" for one that only enqueues work on the accelerator: it is
            given them as they are, and returns a jax.Array, or a `Score` of such.

    Raises:
        ValueError: there is no such module, file or function, or it does not take three arguments. `score` raises it
            for scores that are not [B] numbers.
    """
    function = find(path)

    def score(images: Images, prompts: list[str], metadata: list[dict]) -> Images | Score:
        images = np.asarray(images) if where == "host" else images
        return _checked(path, function(images, prompts, metadata), len(prompts))

    return Reward(path, where, score)


def find(path: str) -> Callable:
    """The function at "module:function" or "file.py:function".

    Raises ValueError if there is none, or it does not take three arguments.
    """
    source, colon, name = path.rpartition(":")
    if not (source and colon and name):
        raise ValueError(f'reward {path!r} names no function: write "module:function" or "file.py:function"')
    module = _from_file(Path(source)) if source.endswith(".py") else _from_module(source, path)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {path!r}: {source} has no function {name!r}; {_functions(module)}")
    _check_signature(function, path)
    return function


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"there is no {file.absolute()}: give the path of a Python file with the reward's function")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"reward {path!r}: there is no module {error.name!r}; install it, or give its file as "
                '"path/to/file.py:function"'
            ) from None
        raise  # the module is there, and one that it imports is not


def _functions(module: ModuleType) -> str:
    own = [name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    return f"it has {', '.join(sorted(own))}" if own else "it defines none"


def _check_signature(function: Callable, path: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some that are written in C have none to look at
        return
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise ValueError(f"reward {path!r} takes {signature}: write it as {SIGNATURE}") from None


def _checked(path: str, scores: Any, batch: int) -> Images | Score:
    if isinstance(scores, Score):
        return scores
    try:
        array = scores if isinstance(scores, jax.Array) else np.asarray(scores, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"reward {path!r} gave {scores!r:.100}, which are no numbers: return scores [B]") from None
    if array.shape != (batch,):
        raise ValueError(f"reward {path!r} gave scores of shape {array.shape} for {batch} images: return [B]")
    return array
