import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from mixgrpo_jax.models import ppocr
from mixgrpo_jax.models.ppocr import onnx_file
from mixgrpo_jax.models.ppocr.operators import OPERATORS

ALPHABET = ("", "A", "b", "Ｂ", " ", "a", "cm", "2", "②", "c")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def save(path, nodes, constants, shape, *, opset=12, metadata=(("character", "a\nb"),)):
    """An ONNX file in the manner of the network's: constants are nodes, and "x" goes in and "y" comes out."""
    constant_nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))
        for name, value in constants.items()
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in (("x", shape), ("y", None))
    ]
    made = helper.make_graph(constant_nodes + nodes, "test", values[:1], values[1:])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)
    return path


def node(operator, *inputs, output="z", **attributes):
    return helper.make_node(operator, list(inputs), [output], **attributes)


CONV = dict(kernel_shape=[3, 2], strides=[1, 1], pads=[0, 0, 0, 0], dilations=[1, 1], group=1)
POOL = dict(kernel_shape=[3, 2], strides=[3, 2], pads=[0, 0, 0, 0], ceil_mode=0, count_include_pad=0)
NORM = {name: np.abs(random(4, seed=i)) for i, name in enumerate(["scale", "bias", "mean", "variance"])}
GRAPHS = {
    "conv": ([node("Conv", "x", "w", "b", **CONV)], {"w": random(5, 4, 3, 2), "b": random(5)}),
    "conv strided": (
        [node("Conv", "x", "w", **CONV | dict(strides=[2, 3], pads=[1, 0, 2, 1]))],
        {"w": random(5, 4, 3, 2)},
    ),
    "pointwise": ([node("Conv", "x", "w", **CONV | dict(kernel_shape=[1, 1]))], {"w": random(5, 4, 1, 1)}),
    "pointwise strided": (
        [node("Conv", "x", "w", **CONV | dict(kernel_shape=[1, 1], strides=[2, 1]))],
        {"w": random(5, 4, 1, 1)},
    ),
    "depthwise": (
        [node("Conv", "x", "w", "b", **CONV | dict(group=4, pads=[1, 0, 2, 1]))],
        {"w": random(4, 1, 3, 2), "b": random(4)},
    ),
    "depthwise strided": (
        [node("Conv", "x", "w", **CONV | dict(group=4, strides=[2, 3], pads=[2, 2, 2, 2]))],
        {"w": random(4, 1, 3, 2)},
    ),
    "pool": ([node("AveragePool", "x", **POOL)], {}),
    "norm": ([node("BatchNormalization", "x", *NORM, epsilon=0.1, momentum=0.9)], NORM),
    "activations": (
        [
            node("HardSigmoid", "x", output="h", alpha=0.3, beta=0.4),
            node("Clip", "h", "low", "high", output="c"),
            node("Sigmoid", "c", output="s"),
            node("Div", "s", "k", output="d"),
            node("Relu", "x", output="r"),
            node("Sub", "d", "r"),
        ],
        {"low": np.float32(0.1), "high": np.float32(0.9), "k": random(1)},
    ),
    "norm of rows": (
        [
            node("ReduceMean", "x", output="m", axes=[-1]),
            node("Sub", "x", "m", output="d"),
            node("Pow", "d", "two", output="p"),
            node("Add", "p", "k", output="v"),
            node("Sqrt", "v", output="s"),
            node("Mul", "d", "s", output="w"),
            node("GlobalAveragePool", "w", output="g"),
            node("Squeeze", "g", axes=[2, 3]),
        ],
        {"two": np.float32(2), "k": random(7) ** 2},
    ),
    "shapes": (
        [
            node("Shape", "x", output="n"),
            node("Cast", "n", output="i", to=TensorProto.INT32),
            node("Slice", "i", "two", "three", "zero", "one", output="rows"),
            node("Cast", "rows", output="rows64", to=TensorProto.INT64),
            node("Concat", "zero", "minus", "rows64", output="shape", axis=0),
            node("Reshape", "x", "shape", output="flat"),
            node("Transpose", "flat", output="t", perm=[0, 2, 1]),
            node("MatMul", "t", "w", output="o"),
            node("Concat", "o", "o", output="c", axis=1),
            node("Slice", "c", "one", "three", "one", output="l"),
            node("Slice", "l", "zero", "one", "zero", output="first"),
            node("Squeeze", "first", axes=[0]),
        ],
        {name: np.array([i]) for name, i in dict(minus=-1, zero=0, one=1, two=2, three=3).items()}
        | {"w": random(28, 3)},
    ),
}


@pytest.mark.parametrize("nodes, constants", GRAPHS.values(), ids=GRAPHS)
def test_operators_are_those_of_onnxruntime(tmp_path, nodes, constants):
    x = random(2, 4, 9, 7, seed=9)
    path = save(tmp_path / "net.onnx", [*nodes, node("Softmax", "z", output="y", axis=-1)], constants, x.shape)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    network, params = onnx_file.load(path)
    found = jax.jit(functools.partial(ppocr.logits, network))(params, x)
    np.testing.assert_allclose(jax.nn.softmax(found), expected, rtol=1e-5, atol=1e-6)


def test_every_operator_is_tested():
    used = {n.op_type for nodes, _ in GRAPHS.values() for n in nodes}
    assert used | {"Softmax"} == OPERATORS.keys()


SOFTMAX = node("Softmax", "z", output="y", axis=-1)


@pytest.mark.parametrize(
    "nodes, message",
    [
        ([node("Erf", "x"), SOFTMAX], "operator Erf of 'z' is unknown"),
        ([node("Relu", "x", alpha=1.0), SOFTMAX], "operator Relu of 'z'.*'alpha'"),
        ([node("Conv", "x", "w", kernel_shape=[1, 1]), SOFTMAX], "operator Conv of 'z': missing a required.*'strides'"),
        ([node("Clip", "x"), SOFTMAX], "operator Clip of 'z': missing a required argument"),
        ([node("Relu", "x")], "ends in Relu"),
        ([node("Conv", "x", "x", **CONV), SOFTMAX], "'x' filters a Conv"),
    ],
)
def test_another_graph_is_refused(tmp_path, nodes, message):
    path = save(tmp_path / "net.onnx", nodes, {"w": random(4, 4, 1, 1)}, (1, 4, 9, 7))
    with pytest.raises(ValueError, match=rf"net\.onnx: .*{message}"):
        onnx_file.load(path)


@pytest.mark.parametrize(
    "changed, message",
    [(dict(opset=13), r"operator sets {'': 13}"), (dict(metadata=()), "lack 'character'")],
)
def test_another_file_is_refused(tmp_path, changed, message):
    path = save(tmp_path / "net.onnx", [node("Relu", "x"), SOFTMAX], {}, (1, 4), **changed)
    with pytest.raises(ValueError, match=rf"net\.onnx: .*{message}"):
        onnx_file.load(path)


@pytest.mark.parametrize(
    "operator, attributes, message",
    [
        ("Conv", CONV | dict(dilations=[2, 1]), r"dilations=\[2, 1\] is unknown: only \[1, 1\]"),
        ("Conv", CONV | dict(group=2), "group=2 is unknown: only 4"),
        ("AveragePool", POOL | dict(ceil_mode=1), "ceil_mode=1 is unknown: only 0"),
        ("Softmax", dict(axis=1), "axis=1 is unknown: only 3"),
        ("Cast", dict(to=TensorProto.FLOAT16), r"to=10 is unknown: only \[6, 7\]"),
    ],
)
def test_other_values_of_attributes_are_refused(tmp_path, operator, attributes, message):
    inputs = ["x", "w"] if operator == "Conv" else ["x"]
    path = save(
        tmp_path / "net.onnx", [node(operator, *inputs, **attributes), SOFTMAX], {"w": random(5, 4, 3, 2)}, None
    )
    network, params = onnx_file.load(path)
    with pytest.raises(ValueError, match=f"operator {operator} of 'z': {message}"):
        ppocr.logits(network, params, random(2, 4, 9, 7))


def test_the_released_network_is_that_of_onnxruntime():
    path = onnx_file.weights_file()
    network, params = onnx_file.load(path)
    assert len(network.alphabet) == 6625 and 2.6e6 < sum(p.size for p in params.values()) < 2.8e6
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 48, 144)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    found = jax.nn.softmax(jax.jit(functools.partial(ppocr.logits, network))(params, x))
    assert found.shape == (2, 18, 6625)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 48), (32, 96), (64, 40), (48, 100), (100, 77), (130, 512)])
def test_bytes_are_resized_as_by_pillow(size):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    expected = [
        Image.fromarray(i).resize((round(48 * size[1] / size[0]), 48), Image.Resampling.BILINEAR) for i in images
    ]
    found = ppocr.preprocess(images).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(np.rint((np.asarray(found) + 1) * 127.5), np.stack(expected))


def test_floats_are_resized_as_bytes_are_but_for_the_rounding():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), np.uint8)
    np.testing.assert_allclose(ppocr.preprocess(np.float32(images)), ppocr.preprocess(images), atol=1.01 / 127.5)
    gradient = jax.grad(lambda x: ppocr.preprocess(x).sum())(jnp.float32(images))
    assert (gradient > 0).all()


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((2, 16, 48), np.uint8, "give .B, H, W, 3."),
        ((2, 16, 48, 4), np.uint8, "give .B, H, W, 3."),
        ((2, 16, 48, 3), np.int32, "uint8 or float from 0 to 255"),
        ((2, 160, 14, 3), np.uint8, "160 x 14 pixels"),
    ],
)
def test_other_images_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        ppocr.preprocess(np.zeros(shape, dtype))


def test_plain_text():
    assert ppocr.plain("Ｎo. ４２\u3000②É") == "no.422é"


def straight_ctc(probabilities, text):
    """The likelihood of a text by the textbook recursion over characters with blanks between, in the linear domain."""
    extended = [""] + [c for character in text for c in (character, "")]
    alpha = [1.0] + [0.0] * (len(extended) - 1)
    reads = {c: [i for i, a in enumerate(ALPHABET) if ppocr.plain(a) == c] for c in extended}
    for t, row in enumerate(np.float64(probabilities)):
        before = alpha if t else [0.0] * len(extended)
        alpha = []
        for s, c in enumerate(extended):
            skip = s >= 2 and c and c != extended[s - 2]
            reach = before[s] + (before[s - 1] if s else 0) + (before[s - 2] if skip else 0)
            reach = float(s < 2) if t == 0 else reach
            alpha.append(reach * row[reads[c]].sum())
    return alpha[-1] + alpha[-2]


TEXTS = ["a", "ab", "aa", "b2b", "22", "CAB", "c b"]


@pytest.mark.parametrize("length", [4, 7])
def test_log_likelihood_is_the_straight_recursion(length):
    logits = 2 * random(len(TEXTS), length, len(ALPHABET))
    plain = [ppocr.plain(text) for text in TEXTS]
    expected = [np.log(straight_ctc(jax.nn.softmax(x), y)) / len(y) for x, y in zip(logits, plain)]
    np.testing.assert_allclose(ppocr.log_likelihood(logits, ALPHABET, TEXTS), expected, rtol=2e-5)


def test_likelihoods_of_all_texts_sum_to_one():
    alphabet = ("", "a", "b", "Ｂ", " ")
    logits = random(1, 3, len(alphabet))
    texts = ["a", "b", "aa", "ab", "ba", "bb", "aab", "aba", "baa", "abb", "bab", "bba", "aaa", "bbb"]
    fitting = [text for text in texts if len(text) + sum(a == b for a, b in itertools.pairwise(text)) <= 3]
    found = ppocr.log_likelihood(np.repeat(logits, len(fitting), 0), alphabet, fitting)
    nothing = np.prod(jax.nn.softmax(logits)[0][:, [0, 4]].sum(-1))
    total = sum(np.exp(len(text) * value) for text, value in zip(fitting, found))
    np.testing.assert_allclose(nothing + total, 1, rtol=1e-5)


def test_gradient_of_the_log_likelihood_is_finite_and_right():
    def total(logits):
        return ppocr.log_likelihood(logits, ALPHABET, TEXTS).sum()

    logits = 2 * random(len(TEXTS), 6, len(ALPHABET))
    direction = random(*logits.shape, seed=1)
    slope = jnp.vdot(jax.grad(total)(logits), direction)
    difference = (total(logits + 1e-2 * direction) - total(logits - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(slope, difference, rtol=2e-3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a target is empty"),
        (" ", "a target is empty"),
        ("axb!", r"target 'axb!' has \['!', 'x'\], which the network cannot read"),
        ("abaca", "target 'abaca' needs 5 positions of 4"),
        ("aab2", "target 'aab2' needs 5 positions of 4"),
    ],
)
def test_targets_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        ppocr.log_likelihood(random(1, 4, len(ALPHABET)), ALPHABET, [text])


@pytest.mark.parametrize(
    "best, text",
    [([0, 0], ""), ([1, 1, 0, 1, 2], "aab"), ([7, 8, 7], "222"), ([4, 6, 6, 0], "cm"), ([1, 4, 5], "aa")],
)
def test_greedy_decode(best, text):
    assert ppocr.greedy_decode(np.array(best), ALPHABET) == text


def same(a, b):
    kinds = ({name: (array.dtype, array.shape) for name, array in each.items()} for each in (a, b))
    return next(kinds) == next(kinds) and all(np.array_equal(a[name], b[name]) for name in a)


def test_the_shipped_network_is_the_released_one():
    (ours, params), (theirs, released) = ppocr.load(), onnx_file.load(onnx_file.weights_file())
    for field in ("nodes", "input", "output", "alphabet"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert same(params, released) and same(ours.constants, theirs.constants)
    assert "Apache License" in ppocr.SHIPPED.with_name("NOTICE").read_text()


def test_what_is_no_network_is_refused(tmp_path):
    file = tmp_path / "network.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"network.safetensors is no safetensors file"):
        ppocr.load(file)
    safetensors.numpy.save_file({"a": np.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"network.safetensors has no 'graph' in its metadata"):
        ppocr.load(file)
    network, params = ppocr.load()
    odd = dataclasses.replace(network, nodes=(dataclasses.replace(network.nodes[0], operator="Fold"),))
    ppocr.save(file, odd, params)
    with pytest.raises(ValueError, match=r"operator Fold of .* is unknown: add it to OPERATORS"):
        ppocr.load(file)
