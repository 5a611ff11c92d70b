"""Files and folders by their path, or by their name on Hugging Face's hub.

On the hub, "owner/model" is a repository, "owner/model/a/b" a file or a folder in it, and "owner/model@v1" its branch,
tag or commit. Its own client fetches them, with its cache (HF_HOME), token (HF_TOKEN), mirror (HF_ENDPOINT) and offline
mode (HF_HUB_OFFLINE). Every process asks: the cache is locked, so that those of a host fetch a file once.
"""

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from mixgrpo_jax.models.io.safetensors_io import PICKLED, preferred

WEIGHTS = ("*.safetensors*", *(f"*{suffix}" for suffix in PICKLED))
TOKENIZER = (
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),
)
OTHERS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf")  # weights that nothing here reads
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.*[^/]))?/?")


def local(name: str | os.PathLike, field: str, *wanted: str) -> Path:
    """Where a file or a folder is: at its path, if there is something, or else in the cache of the hub.

    Args:
      name: a path, or a name on the hub.
      field: what names it, for messages.
      wanted: patterns of what is fetched of a folder on the hub, as "vae/*"; all by default. Of weights, those alone
        that are read: safetensors, not pickles, and one variant, see `preferred`.

    Raises:
      ValueError: there is neither, or the hub does not give it; the message says what was tried.
    """
    if (path := Path(name).expanduser()).exists():
        return path
    if not (parts := _NAME.fullmatch(os.fspath(name))):
        raise ValueError(
            f"{field}={os.fspath(name)!r}: there is no such file or folder, and on the hub a model is named owner/model"
        )
    from huggingface_hub import HfApi, snapshot_download  # it takes half a second to import

    repo, within, revision = parts["repo"], parts["path"] or "", parts["revision"]
    try:
        listed = HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # of many kinds, by the client and what it stands on
        if (folder := _cached(parts)) and needed(_files(folder), within, wanted):
            return folder / within
        reason = _reason(error)
    else:
        files = [glob.escape(file) for file in needed(listed, within, wanted)]
        reason = f"it has no {within or ' or '.join(wanted)}"
        try:
            if files:
                return Path(snapshot_download(repo, revision=revision, allow_patterns=files), within)
        except Exception as error:
            reason = _reason(error)
    raise ValueError(
        f"{field}={os.fspath(name)!r}: there is no such file or folder, and the model {repo} could not be had from the "
        f"hub: {reason}"
    )


def is_here(name: str | os.PathLike) -> bool:
    """Whether something is at this path, or in the cache under this name."""
    if Path(name).expanduser().exists():
        return True
    parts = _NAME.fullmatch(os.fspath(name))
    return bool(parts and (folder := _cached(parts)) and (folder / (parts["path"] or "")).exists())


def needed(files: Iterable[str], within: str, wanted: Sequence[str] = ()) -> list[str]:
    """Which of a repository's files are fetched: the one `within`, or those in this folder that are wanted.

    >>> needed(["a.bin", "vae/model.fp16.safetensors", "vae/model.safetensors", "vae/config.json"], "", ["vae/*"])
    ['vae/config.json', 'vae/model.safetensors']
    """
    if within in (files := sorted(files)):
        return [within]
    inside = [file for file in files if not within or file.startswith(f"{within}/")]
    found = [file for file in inside if _matches(file[len(within) :].removeprefix("/"), wanted)]
    kept = []
    for _, group in itertools.groupby(sorted(found, key=os.path.dirname), os.path.dirname):
        names = {PurePosixPath(file).name: file for file in group}
        weights = [
            name for name in names if name.endswith((".safetensors", *OTHERS, *PICKLED)) or ".safetensors." in name
        ]
        read = preferred(weights) or [name for name in weights if name.endswith(PICKLED)]
        kept += [file for name, file in names.items() if name not in weights or name in read]
    return kept


def _matches(file: str, wanted: Sequence[str]) -> bool:
    """Whether a pattern is of the file, folder by folder: no * goes across one."""
    folders = file.split("/")
    patterns = [pattern.split("/") for pattern in wanted]
    return not wanted or any(
        len(folders) == len(pattern) and all(map(fnmatch.fnmatchcase, folders, pattern)) for pattern in patterns
    )


def _cached(parts: re.Match[str]) -> Path | None:
    """The snapshot of a repository that the cache has, whole or not."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(parts["repo"], revision=parts["revision"], local_files_only=True, allow_patterns=[])
    except Exception:
        return None
    return Path(folder)


def _files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its licence there, and give your token as HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{constants.ENDPOINT} has no such model, or it is private and needs your token as HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{constants.ENDPOINT} has no such branch, tag or commit of it"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and it is not in the cache {constants.HF_HUB_CACHE}"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{said}. Set HF_HOME to a folder that can be written"
    return f"{constants.ENDPOINT} says: {said}"
