"""PP-OCRv4's recognition network: reads a line of text. A graph, run as a pure function of the pictures."""

from mixgrpo_jax.models.ppocr.ctc import encode, greedy_decode, label_log_likelihood, log_likelihood, needed, plain
from mixgrpo_jax.models.ppocr.graph import SHIPPED, Network, Params, load, save
from mixgrpo_jax.models.ppocr.model import logits, preprocess

__all__ = [
    "SHIPPED",
    "Network",
    "Params",
    "encode",
    "greedy_decode",
    "label_log_likelihood",
    "load",
    "log_likelihood",
    "logits",
    "needed",
    "plain",
    "preprocess",
    "save",
]
