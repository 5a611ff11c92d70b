"""The network's graph of known operators, its parameters, and the alphabet that it reads, in one safetensors file."""

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixgrpo_jax.models.ppocr.operators import OPERATORS

SHIPPED = Path(__file__).parents[2] / "assets" / "ppocr" / "recognition.safetensors"  # PP-OCRv4's, see NOTICE there
GRAPH = "graph"  # the metadata that hold all but the tensors
Params = dict[str, np.ndarray]


@dataclass(frozen=True)
class Node:
    """One operation of a graph, `output = operator(*inputs, **attributes)`; inputs and output are names of values."""

    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Network:
    """What is known of a network before its parameters and its input are.

    Attributes:
        nodes: in the order in which they run.
        constants: scalars, and the integers that shapes are made of, by name.
        input: name of the pictures.
        output: name of the logits.
        alphabet: what each class reads; class 0 is CTC's blank, and reads "".
    """

    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]
    input: str
    output: str
    alphabet: tuple[str, ...]


def load(path: str | os.PathLike = SHIPPED) -> tuple[Network, Params]:
    """The network, up to its logits, and its parameters by name, as `save` wrote them.

    Raises:
        ValueError: a file that is no such network, or one with an unknown operator; the message names it.
    """
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if GRAPH not in metadata:
        raise ValueError(
            f"{path} has no {GRAPH!r} in its metadata: convert the network with `onnx_file.load` and `save`"
        )
    graph = json.loads(metadata[GRAPH])
    nodes = tuple(Node(n["operator"], tuple(n["inputs"]), n["output"], n["attributes"]) for n in graph["nodes"])
    for node in nodes:
        check(path, node)
    constants, params = split(tensors)
    return Network(nodes, constants, graph["input"], graph["output"], tuple(graph["alphabet"])), params


def save(path: str | os.PathLike, network: Network, params: Params) -> None:
    """Write a network for `load`."""
    graph: dict[str, Any] = {"nodes": [dataclasses.asdict(node) for node in network.nodes]}
    graph |= {"input": network.input, "output": network.output, "alphabet": network.alphabet}
    tensors = {name: np.array(tensor, order="C") for name, tensor in {**network.constants, **params}.items()}
    save_file(tensors, path, {GRAPH: json.dumps(graph, ensure_ascii=False)})


def split(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Params]:
    """A network's constants and its parameters: fp32 arrays of more than one number."""
    params = {name: tensor for name, tensor in tensors.items() if tensor.dtype == np.float32 and tensor.size > 1}
    return {name: tensor for name, tensor in tensors.items() if name not in params}, params


def check(path: str | os.PathLike, node: Node) -> None:
    """Raise ValueError, which names it, for an operator that is unknown, or has unknown attributes or inputs."""
    if node.operator not in OPERATORS:
        raise ValueError(f"{path}: operator {node.operator} of {node.output!r} is unknown: add it to OPERATORS")
    try:
        inspect.signature(OPERATORS[node.operator]).bind(*node.inputs, **node.attributes)
    except TypeError as error:
        raise ValueError(
            f"{path}: operator {node.operator} of {node.output!r}: {error}: extend it in OPERATORS"
        ) from error
