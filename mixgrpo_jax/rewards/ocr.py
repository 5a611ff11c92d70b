"""Does the picture say what was asked? Text is read back by PP-OCRv4's recognition network.

Recognition only: the image is taken to be one line of text, so there is no detector to find it. The network runs
wherever JAX does (`read_on_device`, and `dense`, which has a gradient), or on the host by onnxruntime (`read`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mixgrpo_jax.models import ppocr
from mixgrpo_jax.rewards.contract import Images, Reward
from mixgrpo_jax.rewards.on_device import OnDevice

HEIGHT = 48  # pixels; what the network was trained at
REMEDY = "pip install 'mixgrpo_jax[ocr_host]', or read with JAX, where='device'"
LENGTH = 128  # characters of the longest target, with one more for each between two that are equal

Read = Callable[[Images], list[str]]  # images uint8 [B, H, W, 3] -> the text in each


@functools.cache
def network() -> tuple[Any, list[str]]:
    """The recognition network as onnxruntime's session, and its alphabet, whose entry 0 is CTC's blank.

    Raises:
        ImportError: without the extra `ocr_host`: onnxruntime, and rapidocr-onnxruntime for its weights.
    """
    try:
        import onnxruntime

        from mixgrpo_jax.models.ppocr import onnx_file
    except ImportError as error:
        raise ImportError(f"where='host' needs onnxruntime ({error}): {REMEDY}") from None
    if (file := onnx_file.weights_file()) is None:
        raise ImportError(f"where='host' reads the file in rapidocr-onnxruntime, which is not installed: {REMEDY}")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    return session, ["", *characters, " "]


@functools.cache
def device_network() -> tuple[ppocr.Network, ppocr.Params]:
    """The recognition network in JAX, and its parameters."""
    return ppocr.load()


def _once(read: Read) -> Read:
    """Several rewards read the same pictures: the last ones' text is kept."""
    last: dict[Any, tuple[Images, list[str]]] = {}

    @functools.wraps(read)
    def reading(images: Images) -> list[str]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 [B, H, W, 3]")
        # An array of JAX does not change, and need not come to the host; it is kept, so that its id stays its own.
        key = id(images) if isinstance(images, jax.Array) else (images.shape, images.tobytes())
        if key not in last:
            texts = read(images)
            last.clear()
            last[key] = images, texts
        return list(last[key][1])

    return reading


@_once
def read(images: Images) -> list[str]:
    """The text in each image, uint8 [B, H, W, 3], in its plain form (`ppocr.plain`); "" where none is seen."""
    session, alphabet = network()
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: _preprocess(np.asarray(images))})
    return [ppocr.greedy_decode(best, alphabet) for best in probabilities.argmax(-1)]


@_once
def read_on_device(images: Images) -> list[str]:
    """What `read` gives, by the network in JAX: only the likeliest class at each position comes to the host."""
    net, params = device_network()
    likeliest = np.asarray(_likeliest(net, params, images))
    return [ppocr.greedy_decode(best, net.alphabet) for best in likeliest]


def reader(where: Literal["host", "device"]) -> Read:
    """`read` or `read_on_device`, with its network loaded: a missing package stops a run before its first rollout.

    Raises:
        ImportError: as `network` does, on the host.
        ValueError: `where` is something else.
    """
    if where not in ("host", "device"):
        raise ValueError(f"where={where!r}: 'host' reads with onnxruntime, 'device' with JAX")
    network() if where == "host" else device_network()
    return read if where == "host" else read_on_device


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(net: ppocr.Network, params: ppocr.Params, images: Images) -> jax.Array:
    return jnp.argmax(_logits(net, params, images), -1)


def _preprocess(images: np.ndarray) -> np.ndarray:
    """Images of height 48 at the same aspect ratio, float32 [B, 3, 48, W'] in [-1, 1]."""
    size = (round(images.shape[2] * HEIGHT / images.shape[1]), HEIGHT)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in images])
    return np.ascontiguousarray(resized.transpose(0, 3, 1, 2), np.float32) / 127.5 - 1


@functools.partial(jax.jit, static_argnums=0)
def _logits(net: ppocr.Network, params: ppocr.Params, images: Images) -> jax.Array:
    return ppocr.logits(net, params, ppocr.preprocess(images))


def dense(images: jax.typing.ArrayLike, targets: Sequence[str]) -> jax.Array:
    """How likely the network thinks it is that each image says its target: float32 [B], at most 0.

    The log-likelihood per character, `ppocr.log_likelihood`: with y the target's n characters,

        (1 / n) log sum_pi prod_t p_t(pi_t),

    over the paths pi that CTC reads as y. It tells two misread pictures apart, and has a gradient with respect to
    images of floats, which are not rounded on the way. The compiled program is the same for any targets.

    Args:
        images: [B, H, W, 3], uint8 or float from 0 to 255.
        targets: B texts; upper case and spaces do not matter.

    Raises:
        ValueError: images of another shape or dtype, or a target that is empty, has a character that the network cannot
            read, or does not fit into the picture, which has six positions for a square and more for a wider one.
    """
    net, params = device_network()
    return ppocr.log_likelihood(_logits(net, params, images), net.alphabet, targets)


def targets(prompts: list[str], metadata: list[dict]) -> list[str]:
    """What each picture should say: `metadata["number"]`, or else what stands in the prompt's first double quotes.

    >>> targets(["a sign", 'a cat holds a sign "Hello World"'], [{"number": "42"}, {}])
    ['42', 'helloworld']

    Raises:
        ValueError: a prompt without quotes, or with nothing between them, where the metadata have no number.
    """
    return [m["number"] if "number" in m else _quoted(prompts[i]) for i, m in enumerate(metadata)]


def _quoted(prompt: str) -> str:
    parts = prompt.split('"')
    text = ppocr.plain(parts[1]) if len(parts) > 2 else ""
    if not text:
        raise ValueError(
            f"prompt {prompt!r} does not say what text to draw: put it in double quotes, or give metadata['number']"
        )
    return text


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


def score(images: Images, prompts: list[str], metadata: list[dict], read: Read = read_on_device) -> np.ndarray:
    """1 - min(d, n) / n, with d the edit distance of the text read to the target (`targets`), of length n; float32 [B].

    The distance is exact. Text that merely contains the number is not right: 14270 is another number than 4270.
    """
    texts = zip(read(images), targets(prompts, metadata), strict=True)
    return np.array([accuracy(text, target) for text, target in texts], np.float32)


# Of text that is read on the device, too, the scores are waited for: it is compared on the host.
def ocr(where: Literal["host", "device"] = "device") -> Reward:
    """Is the text right? 1 - edit distance / length, of what PP-OCRv4 reads on the host or on the device."""
    return Reward("ocr", "host", functools.partial(score, read=reader(where)))


def ocr_dense() -> Reward:
    """How likely PP-OCRv4 is to read the text, as a log-likelihood per character; differentiable.

    Its score raises ValueError as `dense` does; its function gives NaN for a target that does not fit into the picture.
    """
    net, params = device_network()

    def inputs(prompts: list[str], metadata: list[dict]) -> np.ndarray:
        return ppocr.encode(net.alphabet, targets(prompts, metadata), LENGTH)

    def function(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = _logits(net, params, images)
        positions = logits.shape[1]
        likelihood = ppocr.label_log_likelihood(logits, net.alphabet, labels[:, :positions])
        return jnp.where(ppocr.needed(labels) <= positions, likelihood, jnp.nan)

    return Reward("ocr_dense", "device", _Dense(function, params, inputs))


@dataclass(frozen=True, eq=False)
class _Dense(OnDevice):
    """Of a target that does not fit into the picture, the function can say no more than NaN."""

    def __call__(self, images: Images, prompts: list[str], metadata: list[dict]) -> jax.Array:
        net, _ = device_network()
        ppocr.encode(net.alphabet, targets(prompts, metadata), _positions(*images.shape[1:3]))
        return super().__call__(images, prompts, metadata)


@functools.cache
def _positions(height: int, width: int) -> int:
    """At how many positions the network looks for a character in such a picture."""
    net, params = device_network()
    picture = jax.ShapeDtypeStruct((1, height, width, 3), np.uint8)
    return jax.eval_shape(functools.partial(_logits, net), params, picture).shape[1]


def accuracy(text: str, target: str) -> float:
    """Share of `target` that `text` gets right, 1 - min(d, n) / n.

    >>> accuracy("4271", "4270"), accuracy("14270", "4270"), accuracy("", "4270"), accuracy("12345678", "4270")
    (0.75, 0.75, 0.0, 0.0)
    """
    return 1 - min(edit_distance(text, target), len(target)) / len(target)
