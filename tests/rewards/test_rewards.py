import math

import jax
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax import rewards
from mixgrpo_jax.rewards import REWARDS, Reward, build
from mixgrpo_jax.rewards.on_device import OnDevice


def bright(*, limit):
    return Reward("bright", "host", lambda images, prompts, metadata: images.mean((1, 2, 3)) > limit)


def test_rewards_are_built_with_their_options(monkeypatch):
    monkeypatch.setitem(REWARDS, "bright", bright)
    options = {"bright": {"limit": 3}, "mine": {"kind": "bright", "limit": 4}, "unused": {}}
    assert [reward.name for reward in build(["mine", "bright", "colour"], options)] == ["mine", "bright", "colour"]


def test_models_on_the_device_are_sketched_without_their_files():
    config = configs.load("flux_dev", "configs/any.py")
    models = rewards.sketch([*config.rewards, "colour", "ocr"], config.reward_options)
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
    monkeypatch.setitem(rewards.REWARDS, "bright", bright)
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


def test_models_that_take_turns_are_compiled_and_placed_once_each(monkeypatch):
    traced, placed, device_put = [], [], jax.device_put

    def brightness(name):
        def function(params, images, tokens):
            traced.append(name)
            return params["scale"] * images.mean((1, 2, 3))

        return OnDevice(function, {"scale": np.float32(2)}, lambda prompts: None)

    def put(tree, *rest):
        placed.extend([tree] if isinstance(tree, dict) else [])
        return device_put(tree, *rest)

    monkeypatch.setattr(jax, "device_put", put)
    models, images = [brightness("a"), brightness("b")], np.full((2, 4, 4, 3), 3, np.uint8)
    for _ in range(3):
        for model in models:
            assert model(images, ["", ""], []).tolist() == [6, 6]
    assert traced == ["a", "b"] and len(placed) == 2
