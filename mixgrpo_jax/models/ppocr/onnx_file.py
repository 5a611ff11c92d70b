"""The network from its ONNX file, as it was released: what the shipped file was made of. It needs the extra `ocr_host`.

network, params = onnx_file.load(onnx_file.weights_file())
ppocr.save(ppocr.SHIPPED, network, params)
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixgrpo_jax.models.ppocr.graph import Network, Node, Params, check, split

if TYPE_CHECKING:
    import onnx

OPSET = 12


def weights_file() -> Path | None:
    """The file in rapidocr-onnxruntime, if that is installed. It is not imported: it would bring OpenCV along."""
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0], "models", "ch_PP-OCRv4_rec_infer.onnx")


def load(path: str | os.PathLike) -> tuple[Network, Params]:
    """Reads an ONNX file: the network, up to its logits, and its parameters by their names in the file.

    Convolutions' filters become [height, width, inputs, outputs], as Flax has them; all else is as in the file.

    Raises:
        ValueError: another opset, an unknown operator, an operator with other attributes or inputs than the known ones,
            a convolution without constant filters [O, I, kh, kw], a graph that does not end in a softmax over classes,
            or a file without an alphabet; the message names it.
    """
    import onnx

    model = onnx.load(path)
    _check_opset(path, model)
    is_constant = [node.op_type == "Constant" for node in model.graph.node]
    tensors = {node.output[0]: _tensor(path, node) for node, yes in zip(model.graph.node, is_constant) if yes}
    *nodes, last = (_node(path, node) for node, yes in zip(model.graph.node, is_constant) if not yes)
    if last.operator != "Softmax":
        raise ValueError(f"{path}: the graph ends in {last.operator}: give one that ends in a Softmax over classes")
    for name in {node.inputs[1] for node in nodes if node.operator == "Conv"}:
        if name not in tensors or tensors[name].ndim != 4:
            raise ValueError(
                f"{path}: {name!r} filters a Conv, but is no constant of four axes: give a frozen 2-D network"
            )
        tensors[name] = np.ascontiguousarray(tensors[name].transpose(2, 3, 1, 0))
    constants, params = split(tensors)
    return Network(tuple(nodes), constants, model.graph.input[0].name, last.inputs[0], _alphabet(path, model)), params


def _check_opset(path: str | os.PathLike, model: "onnx.ModelProto") -> None:
    opset = {entry.domain: entry.version for entry in model.opset_import}
    if opset != {"": OPSET}:
        raise ValueError(f"{path}: operator sets {opset}, but only ONNX's own of version {OPSET} is known: convert it")


def _tensor(path: str | os.PathLike, node: "onnx.NodeProto") -> np.ndarray:
    from onnx import numpy_helper

    (attribute,) = node.attribute
    if attribute.name != "value":
        raise ValueError(f"{path}: Constant {node.output[0]!r} has attribute {attribute.name!r}: only value is known")
    return numpy_helper.to_array(attribute.t)


def _node(path: str | os.PathLike, node: "onnx.NodeProto") -> Node:
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    made = Node(node.op_type, tuple(node.input), node.output[0], attributes)
    check(path, made)
    return made


def _alphabet(path: str | os.PathLike, model: "onnx.ModelProto") -> tuple[str, ...]:
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if "character" not in metadata:
        raise ValueError(f"{path}: the metadata lack 'character', the alphabet: give a recognition network")
    return ("", *metadata["character"].splitlines(), " ")
