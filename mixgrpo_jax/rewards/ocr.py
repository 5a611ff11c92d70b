"""Does the picture say what was asked? Text is read back by PP-OCRv4's recognition network, on the host.

Recognition only: the image is taken to be one line of text, so there is no detector to find it.
"""

import functools
import importlib.util
import unicodedata
from pathlib import Path

import jax
import numpy as np
import onnxruntime
from PIL import Image

HEIGHT = 48  # pixels; what the network was trained at


@functools.cache
def network() -> tuple[onnxruntime.InferenceSession, list[str]]:
    """The recognition network and its alphabet, whose entry 0 is CTC's blank.

    Only the weights are taken from rapidocr-onnxruntime: importing that package would bring OpenCV along.

    Raises:
        ImportError: if rapidocr-onnxruntime is not installed.
    """
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "the ocr reward reads PP-OCRv4's weights from rapidocr-onnxruntime, which is not installed: "
            "pip install rapidocr-onnxruntime"
        )
    weights = Path(package.submodule_search_locations[0], "models", "ch_PP-OCRv4_rec_infer.onnx")
    session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    return session, ["", *characters, " "]


def read(images: np.ndarray | jax.Array) -> list[str]:
    """The text in each image, uint8 [B, H, W, 3], in lower case and without spaces; "" where none is seen.

    Unicode's full-width and other compatibility forms are folded into the plain ones (NFKC): the network knows two
    glyphs for each digit, and can hardly tell them apart in a short text.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 [B, H, W, 3]")
    return list(_read(images.tobytes(), images.shape))


@functools.lru_cache(maxsize=1)  # several rewards read the same pictures
def _read(data: bytes, shape: tuple[int, ...]) -> tuple[str, ...]:
    session, alphabet = network()
    pixels = _preprocess(np.frombuffer(data, np.uint8).reshape(shape))
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: pixels})
    texts = (_greedy_decode(best, alphabet) for best in probabilities.argmax(-1))
    return tuple("".join(unicodedata.normalize("NFKC", text).lower().split()) for text in texts)


def _preprocess(images: np.ndarray) -> np.ndarray:
    """Images of height 48 at the same aspect ratio, float32 [B, 3, 48, W'] in [-1, 1]."""
    size = (round(images.shape[2] * HEIGHT / images.shape[1]), HEIGHT)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in images])
    return np.ascontiguousarray(resized.transpose(0, 3, 1, 2), np.float32) / 127.5 - 1


def _greedy_decode(best: np.ndarray, alphabet: list[str]) -> str:
    """CTC's best path: merge repeats, then drop blanks. `best` holds the likeliest class at each position."""
    is_new = np.diff(best, prepend=-1) != 0
    return "".join(alphabet[i] for i in best[is_new])


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn `a` into `b`.

    >>> edit_distance("4270", "427"), edit_distance("4270", "4720"), edit_distance("", "42")
    (1, 2, 2)
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def score(images: np.ndarray | jax.Array, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """1 - min(d, n) / n, with d the edit distance of the text read to `metadata["number"]`, of length n; float32 [B].

    The distance is exact. Text that merely contains the number is not right: 14270 is another number than 4270.
    """
    del prompts
    return np.array([accuracy(text, m["number"]) for text, m in zip(read(images), metadata, strict=True)], np.float32)


def accuracy(text: str, target: str) -> float:
    """Share of `target` that `text` gets right, 1 - min(d, n) / n.

    >>> accuracy("4271", "4270"), accuracy("14270", "4270"), accuracy("", "4270"), accuracy("12345678", "4270")
    (0.75, 0.75, 0.0, 0.0)
    """
    return 1 - min(edit_distance(text, target), len(target)) / len(target)
