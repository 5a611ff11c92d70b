"""A reward of the user's own: a Python function, named by where it is."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from mixgrpo_jax.rewards.contract import Images, Incomplete, Reward, Score

SIGNATURE = "(images uint8 [B, H, W, 3], prompts, metadata) -> scores [B]"


def function_reward(path: str, where: Literal["device", "host"] = "host") -> Reward:
    """The reward that a Python function computes, under the name `path`.

    Args:
        path: "module:function", or "folder/file.py:function". The function keeps the contract of `Reward.score`. Its
            module is imported, once, and so runs; a file finds the files beside it, as when it is run by itself.
        where: "host" for a function that computes on the CPU: it is given its images as a NumPy array of its own, and
            may return any sequence of numbers, a PyTorch tensor, or a `Score` of such. "device" for one that only
            enqueues work on the accelerator: it is given them as they are, and returns a jax.Array, or a `Score` of
            such.

    Raises:
        ValueError: there is no such module, file or function, or it does not take three arguments. `score` raises it
            for scores that are not [B] numbers.
        RuntimeError: the module calls sys.exit.
    """
    function = find(path)

    def score(images: Images, prompts: list[str], metadata: list[dict]) -> Images | Score | Incomplete:
        images = np.array(images) if where == "host" else images  # a copy: PyTorch wants arrays that can be written
        return _checked(path, function(images, prompts, metadata), len(prompts))

    return Reward(path, where, score)


def find(path: str) -> Callable:
    """The function at "module:function" or "file.py:function".

    Raises ValueError if there is none, or it does not take three arguments.
    """
    source, colon, name = path.rpartition(":")
    if not (source and colon and name):
        raise ValueError(f'reward {path!r} names no function: write "module:function" or "file.py:function"')
    try:
        module = _from_file(Path(source)) if source.endswith(".py") else _from_module(source, path)
    except SystemExit as error:  # a run that ends so looks finished
        raise RuntimeError(f"reward {path!r}: {source} called sys.exit({error.code!r}) when it was imported") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {path!r}: {source} has no function {name!r}; {_functions(module)}")
    _check_signature(function, path)
    return function


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"there is no {file.absolute()}: give the path of a Python file with the reward's function")
    file, name = file.resolve(), file.stem
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
        importlib.invalidate_caches()
    if "." not in name and name not in sys.modules and _place(importlib.util.find_spec(name)) == file:
        return importlib.import_module(name)  # by this name, worker processes find it too
    own = f"{name}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"  # where another module has its name
    for loaded in (sys.modules.get(name), sys.modules.get(own)):
        if loaded and _place(loaded.__spec__) == file:
            return loaded
    spec = importlib.util.spec_from_file_location(own, file)
    assert spec and spec.loader
    module = sys.modules[own] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[own]
        raise
    return module


def _place(spec: Any) -> Path | None:
    """The file of a module."""
    return Path(spec.origin).resolve() if spec and spec.has_location else None


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


def _checked(path: str, scores: Any, batch: int) -> Images | Score | Incomplete:
    if isinstance(scores, Score | Incomplete):
        return scores._replace(value=_numbers(scores.value), map=None if scores.map is None else _numbers(scores.map))
    if isinstance(scores, tuple) and any(isinstance(each, Mapping) or np.ndim(each) for each in scores):
        kinds = ", ".join(type(each).__name__ for each in scores)
        raise ValueError(f"reward {path!r} gave a tuple ({kinds}): return its scores [B] alone")
    try:
        array = _numbers(scores)
    except (TypeError, ValueError):
        raise ValueError(f"reward {path!r} gave {scores!r:.100}, which are no numbers: return scores [B]") from None
    if array.shape != (batch,):
        raise ValueError(f"reward {path!r} gave scores of shape {array.shape} for {batch} images: return [B]")
    return array


def _numbers(scores: Any) -> Images:
    """What stays where it is of JAX, all else as fp32 on the host, PyTorch's tensors out of their graph."""
    if isinstance(scores, jax.Array):
        return scores
    if isinstance(scores, list | tuple):
        scores = [_detached(score) for score in scores]
    return np.asarray(_detached(scores), np.float32)


def _detached(value: Any) -> Any:
    """Of a PyTorch tensor, its numbers, whatever its dtype, its device and its gradient are; all else as it is."""
    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else value
