import logging
import math
import pkgutil
import typing

import jax
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.rewards import REWARDS, scoring
from mixgrpo_jax.rewards.contract import Incomplete, Missing, Reward, Score
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
    assert run_program(code) == "\n\n"


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


AWAY, WRONG = Missing("http://a: refused", passing=True), Missing("http://a: out of memory", passing=False)


def failing(*turns, maps=False):
    """A reward, the number in each prompt, that misses some of the prompts, {prompt: why}, a turn after the other."""
    turns, asked = list(turns), []

    def score(images, prompts, metadata):
        asked.append(prompts)
        assert len(images) == len(prompts) == len(metadata)
        absent = turns.pop(0) if turns else {}
        missing = {i: absent[prompt] for i, prompt in enumerate(prompts) if prompt in absent}
        value = np.array([0.0 if i in missing else float(prompt) for i, prompt in enumerate(prompts)])
        return Incomplete(value, missing, value[:, None] * [1, 2] if maps else None)

    return Reward("far", "host", score), asked


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(scoring, "PAUSE", 0.001)


CHUNKS = [(np.zeros((4, 2, 2, 3), np.uint8), [str(i) for i in range(k, k + 4)], [{}] * 4) for k in (1, 5)]


@pytest.mark.parametrize("maps", [False, True])
def test_a_share_may_be_missing_and_is_never_a_number(maps, caplog):
    reward, asked = failing({"2": AWAY}, {"7": WRONG}, maps=maps)
    score = score_chunks([reward], CHUNKS, missing_share=0.25, wait=60)["far"]
    np.testing.assert_array_equal(score.value, np.float32([1, np.nan, 3, 4, 5, 6, np.nan, 8]))
    assert len(asked) == 2  # within the share, nobody is waited for
    if maps:
        np.testing.assert_array_equal(score.map, score.value[:, None] * [1, 2])
    assert "2 images have no score of reward 'far', and are left out" in caplog.text


def test_beyond_the_share_the_run_stops_and_says_why():
    reward, _ = failing({"2": WRONG}, {"5": WRONG, "7": WRONG})
    message = "3 images have no score of reward 'far', and missing_share allows 2: http://a: out of memory.*reward_wait"
    with pytest.raises(ConnectionError, match=message):
        score_chunks([reward], CHUNKS, missing_share=0.25, wait=60)
    with pytest.raises(ConnectionError, match=r"1 images.*allows 0"):
        score_all([failing({"2": WRONG})[0]], *CHUNKS[0])


def test_servers_that_are_away_are_waited_for_as_long_as_is_set(quick, caplog):
    away = {str(i): AWAY for i in range(1, 9)}
    reward, asked = failing(away, away | {"6": WRONG}, away, away, {}, {"8": AWAY}, maps=True)
    saved = []
    score = score_chunks([reward], CHUNKS, missing_share=0.25, wait=60, waiting=lambda: saved.append(len(asked)))["far"]
    assert saved == [2, 4]  # before servers are asked again
    np.testing.assert_array_equal(score.value, np.float32([1, 2, 3, 4, 5, np.nan, 7, np.nan]))
    np.testing.assert_array_equal(score.map, score.value[:, None] * [1, 2])
    assert asked[-1] == ["5", "7", "8"]  # not what would fail again
    waits = [record for record in caplog.records if "asking for 60 s more. http://a: refused" in record.message]
    assert len(waits) == 2 and waits[0].levelno == logging.WARNING
    reward, asked = failing(*[away] * 4000)
    with pytest.raises(ConnectionError, match="8 images"):
        score_chunks([reward], CHUNKS, missing_share=0.25, wait=0.02)
    assert len(asked) > 2


def test_what_is_there_must_be_finite_beside_what_is_missing():
    def score(images, prompts, metadata):
        return Incomplete(np.array([np.nan, np.nan, 1, 1]), {0: AWAY})

    with pytest.raises(ValueError, match=r"'half' gave nan for sample 1 \('2'\), and 1 of 4"):
        score_chunks([Reward("half", "host", score)], CHUNKS[:1], missing_share=0.5)


def test_an_error_names_the_reward_that_raised_it():
    def raises(images, prompts, metadata):
        return metadata[0]["absent"]

    with pytest.raises(KeyError, match="absent") as error:
        score_all([Reward("mine", "host", raises)], *CHUNKS[0])
    assert error.value.__notes__ == ["This is of the reward 'mine'."]


def test_a_reward_that_leaves_the_program_stops_the_run_with_an_error(monkeypatch):
    def leaves(*args, **options):
        raise SystemExit(0)

    with pytest.raises(RuntimeError, match=r"reward 'mine' called sys.exit\(0\)"):
        score_all([Reward("mine", "host", leaves)], *CHUNKS[0])
    monkeypatch.setitem(REWARDS, "mine", f"{__name__}:bright")
    monkeypatch.setattr(f"{__name__}.bright", leaves)
    with pytest.raises(RuntimeError, match=r"reward 'mine' called sys.exit\(0\) as it was built"):
        build(["mine"], {})
