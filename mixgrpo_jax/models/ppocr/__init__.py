"""PP-OCRv4's recognition network: reads a line of text. Run from its ONNX file, as a pure function of the pictures."""

from mixgrpo_jax.models.ppocr.ctc import greedy_decode, log_likelihood, plain
from mixgrpo_jax.models.ppocr.graph import Network, Params, load, weights_file
from mixgrpo_jax.models.ppocr.model import logits, preprocess

__all__ = [
    "Network",
    "Params",
    "greedy_decode",
    "load",
    "log_likelihood",
    "logits",
    "plain",
    "preprocess",
    "weights_file",
]
