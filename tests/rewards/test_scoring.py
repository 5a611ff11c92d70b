import math
import pkgutil
import typing

import jax
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.rewards import REWARDS
from mixgrpo_jax.rewards.contract import Reward, Score
from mixgrpo_jax.rewards.on_device import OnDevice
from mixgrpo_jax.rewards.scoring import build, score_all, score_chunks, sketch
from tests.python import run_program


def bright(*, limit):
    return Reward("bright", "host", lambda images, prompts, metadata: images.mean((1, 2, 3)) > limit)


def test_what_a_reward_needs_is_imported_when_it_is_named():
    code = """
        import sys
        import mixgrpo_jax.rewards, mixgrpo_jax.tasks
        from mixgrpo_jax.rewards.scoring import build
        heavy = "onnx", "onnxruntime", "transformers", "tensorflow_datasets", "grain", "matplotlib", "PIL.ImageDraw"
        heavy += "mixgrpo_jax.models", "mixgrpo_jax.data", "mixgrpo_jax.tasks.signs"
        print(*(name for name in heavy if name in sys.modules))
        build(["colour"], {})
        print(*(name for name in ("onnx", "transformers", *heavy[3:7], "mixgrpo_jax.data") if name in sys.modules))
    """
    assert run_program(code) == "\nonnx\n"


@pytest.mark.parametrize("name", REWARDS)
def test_the_table_names_builders(name):
    builder = pkgutil.resolve_name(REWARDS[name])
    assert typing.get_type_hints(builder)["return"] is Reward and builder.__doc__


def test_rewards_are_built_with_their_options(monkeypatch):
    monkeypatch.setitem(REWARDS, "bright", f"{__name__}:bright")
    options = {"bright": {"limit": 3}, "mine": {"kind": "bright", "limit": 4}, "unused": {}}
    assert [reward.name for reward in build(["mine", "bright", "colour"], options)] == ["mine", "bright", "colour"]


def test_a_builder_need_not_be_in_the_table():
    kind = f"{__name__}:bright"
    (reward,) = build(["mine"], {"mine": {"kind": kind, "limit": 4}})
    assert reward.name == "mine"
    assert reward.score(np.full((1, 2, 2, 3), 5), [""], [{}]).tolist() == [True]
    with pytest.raises(ValueError, match=f"reward_options.mine=.*missing a required argument: 'limit'; {kind} takes"):
        build(["mine"], {"mine": {"kind": kind}})


@pytest.mark.parametrize("kind", ["nowhere:bright", f"{__name__}:absent", f"{__name__}:not a name"])
def test_a_builder_that_is_not_there_is_named(kind):
    with pytest.raises(ValueError, match=f"reward 'mine': there is no builder '{kind}': "):
        build(["mine"], {"mine": {"kind": kind}})


def test_models_on_the_device_are_sketched_without_their_files():
    config = configs.load("flux_dev", "configs/any.py")
    models = sketch([*config.rewards, "colour", "ocr"], config.reward_options)
    sizes = {name: sum(math.prod(a.shape) for a in jax.tree.leaves(model.params)) for name, model in models.items()}
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "hps": 986,
        "image_reward": 445,
        "pickscore": 986,
    }
    device = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for model in models.values():
        program, _ = model.lower(2, (64, 48), device)
        assert program.out_info.shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mine": {"kind": "bright"}}, r"reward_options.mine=.*missing a required argument: 'limit'; bright takes"),
        ({"colour": {"size": 3}}, r"reward_options.colour=.*unexpected keyword argument 'size'"),
        ({"nice": {}}, "reward 'nice' is unknown: choose from .*bright, .*chat, .*colour,"),
    ],
)
def test_options_must_fit(monkeypatch, options, message):
    monkeypatch.setitem(REWARDS, "bright", f"{__name__}:bright")
    with pytest.raises(ValueError, match=message):
        build(options, options)


def test_a_config_may_name_a_reward_of_its_own():
    config = configs.base()
    config.lock()
    config.rewards = {"mine": 1.0}
    with pytest.raises(configs.ConfigError, match=r"rewards.mine='mine' is unknown"):
        configs.resolve(config)
    config.reward_options = {"mine": {"kind": "colour"}}
    assert configs.resolve(config).config.reward_options.mine.kind == "colour"
    config.reward_options = {"mine": {"kind": "package.module:builder"}}
    assert configs.resolve(config).config.reward_options.mine.kind == "package.module:builder"


def test_models_that_take_turns_are_compiled_and_placed_once_each(monkeypatch):
    traced, placed, device_put = [], [], jax.device_put

    def brightness(name):
        def function(params, images, tokens):
            traced.append(name)
            return params["scale"] * images.mean((1, 2, 3))

        return OnDevice(function, {"scale": np.float32(2)}, lambda prompts, metadata: None)

    def put(tree, *rest):
        placed.extend([tree] if isinstance(tree, dict) else [])
        return device_put(tree, *rest)

    monkeypatch.setattr(jax, "device_put", put)
    models, images = [brightness("a"), brightness("b")], np.full((2, 4, 4, 3), 3, np.uint8)
    for _ in range(3):
        for model in models:
            assert model(images, ["", ""], []).tolist() == [6, 6]
    assert traced == ["a", "b"] and len(placed) == 2


IMAGES = np.zeros((4, 2, 2, 3), np.uint8)
PROMPTS = ["a", "b", "c", "d"]


def mapped(*maps):
    """A reward that gives the values 0, 1, ... and these maps, one a call."""
    left = list(maps)
    return Reward("spots", "host", lambda images, prompts, _: Score(list(range(len(prompts))), left.pop(0)))


def test_a_map_comes_with_the_values_over_all_chunks():
    maps = np.arange(12.0).reshape(4, 3)
    chunks = [(IMAGES[:3], PROMPTS[:3], [{}] * 3), (IMAGES[3:], PROMPTS[3:], [{}])]
    plain = Reward("plain", "device", lambda images, prompts, _: jax.numpy.ones(len(images), jax.numpy.bfloat16))
    scores = score_chunks([mapped(maps[:3].tolist(), jax.numpy.array(maps[3:])), plain], chunks)
    assert list(scores) == ["spots", "plain"]
    assert scores["spots"].value.tolist() == [0, 1, 2, 0] and scores["plain"].map is None
    np.testing.assert_array_equal(scores["spots"].map, maps)
    arrays = [scores["spots"].value, scores["spots"].map, scores["plain"].value]
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in arrays)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([np.zeros(2), np.zeros(2)], r"'spots' gave a map of shape \(2,\) for 2 images: return \[B, S\]"),
        ([np.zeros((3, 5)), np.zeros((2, 5))], r"'spots' gave a map of shape \(3, 5\) for 2 images"),
        ([np.zeros((2, 5)), np.zeros((2, 4))], r"'spots' gave 2 maps for 2 chunks of images, of \[4, 5\] positions"),
        ([np.zeros((2, 5)), None], "'spots' gave 1 maps for 2 chunks of images, .*for all images, or for none"),
        ([np.zeros((2, 2)), np.diag([np.inf, 1])], r"'spots' gave inf for sample 2 \('c'\), and 1 of 4"),
    ],
)
def test_maps_that_cannot_be_are_refused(maps, message):
    chunks = [(IMAGES[:2], PROMPTS[:2], [{}] * 2), (IMAGES[2:], PROMPTS[2:], [{}] * 2)]
    with pytest.raises(ValueError, match=message):
        score_chunks([mapped(*maps)], chunks)


def test_values_beside_a_map_are_checked_as_ever():
    bad = Reward("bad", "host", lambda *_: Score([1, np.nan, 0, 0], np.zeros((4, 2))))
    with pytest.raises(ValueError, match=r"'bad' gave nan for sample 1 \('b'\), and 1 of 4 scores are not finite"):
        score_all([bad], IMAGES, PROMPTS, [{}] * 4)
