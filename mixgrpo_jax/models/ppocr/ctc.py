"""From a CTC network's logits to text, and back: how likely a given text is.

A text is read in its plain form: lower case, without spaces, and with Unicode's full-width and other compatibility
forms folded into the plain ones (NFKC). The network knows two glyphs for each digit, and can hardly tell them apart in
a short text.
"""

import functools
import itertools
import unicodedata
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

LOG_ZERO = -1e5  # optax's own stand-in for log(0): an infinity would become NaN in its products


def plain(text: str) -> str:
    """The plain form of a text.

    >>> plain("Ｎo. ４２７0")
    'no.4270'
    """
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def greedy_decode(best: np.ndarray, alphabet: Sequence[str]) -> str:
    """CTC's best path, as plain text: merge repeats, then drop blanks. `best` [T]: each position's likeliest class.

    >>> greedy_decode(np.array([0, 1, 1, 0, 1, 2]), ["", "A", "b"])
    'aab'
    """
    is_new = np.diff(best, prepend=-1) != 0
    return plain("".join(alphabet[i] for i in best[is_new]))


def log_likelihood(logits: jax.Array, alphabet: tuple[str, ...], texts: Sequence[str]) -> jax.Array:
    """Log-likelihood of a text per character, fp32 [B], at most 0; differentiable with respect to the logits.

    With y the plain text of n characters, and pi ranging over the T-long paths of classes that read y once repeats are
    merged and blanks dropped,

        (1 / n) log sum_pi prod_t p_t(pi_t),    p_t(c) = sum of softmax(logits_t) over the classes that read c,

    where blanks and spaces both read "". So a text is as likely as all its ways to be written, save by glyphs that read
    several characters at once.

    Args:
        logits: [B, T, classes].
        alphabet: what each class reads; class 0 is the blank.
        texts: B targets.

    Raises:
        ValueError: a text that is empty, has a character that the network does not know, or needs more than T positions
            (one a character, and one between two that are equal); the message names it.
    """
    return label_log_likelihood(logits, alphabet, encode(alphabet, texts, logits.shape[1]))


@functools.partial(jax.jit, static_argnums=1)
def label_log_likelihood(logits: jax.Array, alphabet: tuple[str, ...], labels: jax.typing.ArrayLike) -> jax.Array:
    """`log_likelihood` of texts that `encode` made labels [B, N] of; what they need is not checked, see `needed`."""
    labels = jnp.asarray(labels)
    is_padding, nothing = (labels == 0).astype(jnp.float32), jnp.zeros(logits.shape[:2])
    with jax.default_matmul_precision("float32"):
        loss = optax.ctc_loss(_merge(logits, alphabet), nothing, labels, is_padding, log_epsilon=LOG_ZERO)
    return -loss / jnp.sum(labels > 0, -1)


def _merge(logits: jax.Array, alphabet: tuple[str, ...]) -> jax.Array:
    """Logits in which the first of the classes that read the same has the probability of all, and the others none."""
    logits = logits.astype(jnp.float32)
    padded = jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=LOG_ZERO)
    groups = _groups(alphabet)
    merged = jax.nn.logsumexp(padded[..., groups], axis=-1)
    return padded.at[..., groups].set(LOG_ZERO).at[..., groups[:, 0]].set(merged)[..., :-1]


@functools.cache
def _classes(alphabet: tuple[str, ...]) -> dict[str, list[int]]:
    classes: dict[str, list[int]] = {}
    for index, text in enumerate(alphabet):
        classes.setdefault(plain(text), []).append(index)
    return classes


@functools.cache
def _groups(alphabet: tuple[str, ...]) -> np.ndarray:
    """Classes that read the same, int [groups, most members]; short groups end in the number of classes."""
    groups = [members for members in _classes(alphabet).values() if len(members) > 1]
    most = max(map(len, groups), default=1)
    return np.array([members + [len(alphabet)] * (most - len(members)) for members in groups], int).reshape(-1, most)


def encode(alphabet: tuple[str, ...], texts: Sequence[str], length: int) -> np.ndarray:
    """The first class that reads each character of the texts, int32 [B, length], padded with the blank's 0.

    All `length` positions are kept, whatever the texts' lengths, so that other texts need no other program.

    Raises ValueError as `log_likelihood` does, for `length` positions.
    """
    classes, labels = _classes(alphabet), np.zeros((len(texts), length), np.int32)
    for row, text in zip(labels, map(plain, texts)):
        _check(text, classes, length)
        row[: len(text)] = [classes[character][0] for character in text]
    return labels


def needed(labels: jax.typing.ArrayLike) -> jax.Array:
    """How many positions the labels [B, N] of a text need: one a character, and one between two that are equal; [B]."""
    labels = jnp.asarray(labels)
    repeated = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] > 0)
    return jnp.sum(labels > 0, -1) + jnp.sum(repeated, -1)


def _check(text: str, classes: Collection[str], length: int) -> None:
    if not text:
        raise ValueError("a target is empty: ask for some text")
    unknown = sorted(set(text) - set(classes))
    if unknown:
        raise ValueError(f"target {text!r} has {unknown}, which the network cannot read: ask for other text")
    needed = len(text) + sum(a == b for a, b in itertools.pairwise(text))
    if needed > length:
        raise ValueError(
            f"target {text!r} needs {needed} positions of {length}: ask for less text, or widen the picture"
        )
