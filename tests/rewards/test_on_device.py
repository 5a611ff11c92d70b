"""Rewards with a gradient: what they are told, and the weighted sum that a program differentiates."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import ppocr
from mixgrpo_jax.rewards import ocr
from mixgrpo_jax.rewards.contract import Differentiable, Reward
from mixgrpo_jax.rewards.on_device import OnDevice, weighted
from mixgrpo_jax.rewards.scoring import build, score_all
from mixgrpo_jax.runtime.mesh import virtual_devices
from mixgrpo_jax.tasks.signs import verify
from mixgrpo_jax.tasks.signs.data import PALETTE, photograph, sample_signs
from tests.python import run_program

SIGNS = sample_signs("test", 4)
PROMPTS = [sign.prompt for sign in SIGNS]
METADATA = [
    {"number": s.number, "plate_rgb": np.uint8(PALETTE[s.plate]), "digits_rgb": np.uint8(PALETTE[s.digits])}
    for s in SIGNS
]
BRISQUE = pytest.param(
    "brisque", marks=pytest.mark.skipif(not importlib.util.find_spec("brisque"), reason="has weights")
)
MESH = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return np.stack([photograph(sign, rng)["image"] for sign in SIGNS])


@pytest.mark.parametrize("name", ["colour", "ocr_dense", BRISQUE])
def test_rewards_that_are_differentiable_say_so(name):
    (reward,) = build([name], {})
    assert reward.differentiable is reward.score and isinstance(reward.score, OnDevice)


@pytest.mark.parametrize("name", ["ocr", "strict", "geneval", "jpeg_compressibility"])
def test_rewards_that_are_not_differentiable_say_so(name):
    (reward,) = build([name], {})
    assert reward.differentiable is None


def test_a_score_of_ones_own_is_differentiable_if_it_has_what_that_takes():
    class Own:
        params, function, inputs = {}, staticmethod(lambda *_: 0), staticmethod(lambda *_: None)

        def __call__(self, images, prompts, metadata):
            return images

    own = Own()
    assert isinstance(own, Differentiable) and Reward("own", "device", own).differentiable is own


def test_scores_are_those_of_the_plain_functions(images):
    scores = score_all(build(["colour", "ocr_dense"], {}), images, PROMPTS, METADATA)
    plate, digits = (np.stack([m[key] for m in METADATA]) for key in ("plate_rgb", "digits_rgb"))
    np.testing.assert_array_equal(scores["colour"].value, verify.colour_score(images, plate, digits))
    np.testing.assert_array_equal(scores["ocr_dense"].value, ocr.dense(images, [sign.number for sign in SIGNS]))


def test_text_that_does_not_fit_into_the_picture_has_no_score(images):
    net, _ = ocr.device_network()
    fits = "12" * 9  # a position each: there are 18
    texts = [fits, fits + "1", "1" * 10, "7"]
    dense = ocr.ocr_dense()
    own = dense.differentiable
    found = np.asarray(jax.jit(own.function)(own.params, images, own.inputs(PROMPTS, [{"number": t} for t in texts])))
    assert np.isnan(found).tolist() == [False, True, True, False]
    fitting = [{"number": text} for text in (fits, "7", "7", "7")]
    np.testing.assert_array_equal(found[[0, 3]], np.asarray(dense.score(images, PROMPTS, fitting))[[0, 3]])
    for text, needed in ((texts[1], 19), (texts[2], 19), ("1" + "23" * 64, 129)):
        with pytest.raises(ValueError, match=f"target '{text}' needs {needed} positions of 18: ask for less text"):
            dense.score(images, PROMPTS, [{"number": text}] * 4)
    labels = ppocr.encode(net.alphabet, ["1", "112", "1111"], 8)
    assert ppocr.needed(labels).tolist() == [1, 4, 7]


def test_the_gradient_of_colour_is_that_of_its_values(images):
    own = verify.colour().differentiable
    score = jax.jit(lambda x: own.function(own.params, x, own.inputs(PROMPTS, METADATA)))
    x = np.float32(images)
    np.testing.assert_array_equal(score(x), score(images))
    gradient = jax.grad(lambda x: score(x).sum())(x)
    step = 0.5 * gradient / jnp.linalg.norm(gradient.reshape(len(x), -1), axis=1)[:, None, None, None]
    difference = (score(x + step) - score(x - step)) / 2
    np.testing.assert_allclose(jnp.sum(gradient * step, (1, 2, 3)), difference, rtol=0.05)


def bright(name, scale):
    def function(params, images, inputs):
        return (params["scale"] * images.mean((1, 2, 3)) * inputs["times"]).astype(jnp.bfloat16)

    def inputs(prompts, metadata):
        return {"times": np.array([len(prompt) + m.get("more", 0) for prompt, m in zip(prompts, metadata)], np.float32)}

    return Reward(name, "device", OnDevice(function, {"scale": np.float32(scale)}, inputs))


def test_the_weighted_sum_and_its_gradient():
    rewards = [bright("a", 2), bright("b", 1), bright("unused", np.nan), bright("watched", np.nan)]
    total = weighted(rewards, {"a": 0.5, "b": 3.0, "unused": 0.0}, MESH)
    assert list(total.params) == ["a", "b"]
    inputs = total.inputs(["x", "xy"], [{}, {"more": 2}])
    x = jnp.stack([jnp.full((2, 2, 3), 8.0), jnp.full((2, 2, 3), 16.0)])

    @jax.jit
    def run(params, x):
        value, scores = total.function(params, x, inputs)
        return value.sum(), (value, scores)

    (_, (value, scores)), gradient = jax.value_and_grad(run, 1, has_aux=True)(total.params, x)
    assert {name: score.tolist() for name, score in scores.items()} == {"a": [16, 128], "b": [8, 64]}
    assert value.tolist() == [0.5 * 16 + 3 * 8, 0.5 * 128 + 3 * 64]
    assert value.dtype == scores["a"].dtype == np.float32
    np.testing.assert_allclose(gradient[:, 0, 0, 0], [(0.5 * 2 + 3) / 12, (0.5 * 2 + 3) * 4 / 12], rtol=1e-2)


def test_shapes_in_place_of_parameters_stay_shapes():
    reward = Reward("a", "device", OnDevice(lambda *_: 0, {"w": jax.ShapeDtypeStruct((4, 2), jnp.bfloat16)}, None))
    shape = weighted([reward], {"a": 1.0}, MESH).params["a"]["w"]
    assert isinstance(shape, jax.ShapeDtypeStruct) and shape.sharding.mesh == MESH
    assert shape.shape == (4, 2) and shape.dtype == jnp.bfloat16


def test_a_reward_without_a_gradient_is_named():
    plain = Reward("plain", "host", lambda *_: None)
    with pytest.raises(ValueError, match=r"rewards.plain=0.5: this reward has no gradient .*only watch it"):
        weighted([bright("a", 1), plain], {"a": 1.0, "plain": 0.5}, MESH)
    with pytest.raises(ValueError, match=r"rewards=\{'plain': 0.0\}: give one a positive weight"):
        weighted([plain], {"plain": 0.0}, MESH)
    assert list(weighted([bright("a", 1), plain], {"a": 1.0, "plain": 0.0}, MESH).params) == ["a"]


def test_parameters_are_cut_over_the_mesh_and_gathered_to_score():
    code = """
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from mixgrpo_jax.rewards.contract import Reward
        from mixgrpo_jax.rewards.on_device import OnDevice, weighted

        mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        rng = np.random.default_rng(0)
        params = {"w": rng.normal(size=(48, 8)).astype(np.float32), "b": np.float32(1)}
        score = OnDevice(
            lambda params, x, told: (x.reshape(len(x), -1) @ params["w"]).sum(-1) * told + params["b"],
            params,
            lambda prompts, metadata: np.arange(len(prompts), dtype=np.float32),
        )
        total = weighted([Reward("a", "device", score)], {"a": 2.0}, mesh)
        w = total.params["a"]["w"]
        assert w.addressable_shards[0].data.shape == (48, 2) and total.params["a"]["b"].is_fully_replicated
        x = jax.device_put(rng.normal(size=(8, 4, 4, 3)).astype(np.float32), NamedSharding(mesh, P(("data", "fsdp"))))
        run = jax.jit(jax.value_and_grad(lambda params, x, told: total.function(params, x, told)[0].sum(), 1))
        value, gradient = run(total.params, x, total.inputs([""] * 8, [{}] * 8))
        assert len(gradient.sharding.device_set) == 4
        alone = 2 * np.arange(8)[:, None] * params["w"].sum(-1)
        np.testing.assert_allclose(np.asarray(gradient).reshape(8, -1), alone, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(value, (alone * np.asarray(x).reshape(8, -1)).sum() + 16, rtol=1e-4)
    """
    run_program(code, **virtual_devices(4))
