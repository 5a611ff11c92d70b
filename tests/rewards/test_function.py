import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.rewards.function import function_reward
from mixgrpo_jax.rewards.scoring import score_all

SOURCE = """
import numpy as np

BATCH = 3

def brightness(images, prompts, metadata):
    assert isinstance(images, np.ndarray)
    return [image.mean() * data["gain"] + len(prompt) for image, prompt, data in zip(images, prompts, metadata)]

def on_device(images, prompts, metadata):
    return images.astype(float).mean((1, 2, 3))

class Scorer:
    def __call__(self, images, prompts, metadata):
        return np.ones(len(images))

scorer = Scorer()

def images_only(images):
    return images

def scalar(images, prompts, metadata):
    return 1.0

def columns(images, prompts, metadata):
    return np.ones((len(images), 2))

def too_many(images, prompts, metadata):
    return [1.0] * (len(images) + 1)

def nothing(images, prompts, metadata):
    return None

def words(images, prompts, metadata):
    return prompts

def ragged(images, prompts, metadata):
    return [[1.0], [1.0, 2.0], [3.0]]

def undefined(images, prompts, metadata):
    return [np.nan] * len(images)
"""

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
PROMPTS = ["a", "bb", "ccc"]
METADATA = [{"gain": 1.0}, {"gain": 2.0}, {"gain": 3.0}]
EXPECTED = IMAGES.mean((1, 2, 3)) * [1, 2, 3] + [1, 2, 3]


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(SOURCE)
    return file


def test_a_function_in_a_file(file):
    reward = function_reward(f"{file}:brightness")
    assert reward.where == "host" and reward.name == f"{file}:brightness"
    for images in (IMAGES, jnp.asarray(IMAGES)):
        np.testing.assert_allclose(reward.score(images, PROMPTS, METADATA), EXPECTED, rtol=1e-6)
    assert "my_rewards" not in sys.modules


def test_a_function_in_a_module(file, monkeypatch):
    (file.parent / "rewards_package").mkdir()
    file.rename(file.parent / "rewards_package" / "mine.py")
    monkeypatch.syspath_prepend(file.parent)
    reward = function_reward("rewards_package.mine:brightness")
    scores = score_all([reward], IMAGES, PROMPTS, METADATA)
    np.testing.assert_allclose(scores["rewards_package.mine:brightness"].value, EXPECTED, rtol=1e-6)


def test_a_function_on_the_device_is_given_what_is_there(file):
    reward = function_reward(f"{file}:on_device", where="device")
    scores = reward.score(jnp.asarray(IMAGES), PROMPTS, METADATA)
    assert reward.where == "device" and isinstance(scores, jax.Array)
    np.testing.assert_allclose(scores, IMAGES.mean((1, 2, 3)), rtol=1e-5)


def test_anything_that_can_be_called_will_do(file):
    np.testing.assert_array_equal(function_reward(f"{file}:scorer").score(IMAGES, PROMPTS, METADATA), np.ones(3))


@pytest.mark.parametrize(
    "path, message",
    [
        ("brightness", '"module:function" or "file.py:function"'),
        (":brightness", '"module:function" or "file.py:function"'),
        ("{file}:", '"module:function" or "file.py:function"'),
        ("{file}:darkness", "has no function 'darkness'; it has brightness, columns"),
        ("{file}:BATCH", "has no function 'BATCH'"),
        ("{folder}/absent.py:brightness", "there is no .*absent.py"),
        ("absent_module:brightness", "there is no module 'absent_module'"),
        ("json.absent:brightness", "there is no module 'json.absent'"),
        ("{file}:images_only", r"images_only' takes \(images\): write it as \(images uint8"),
    ],
)
def test_what_is_not_there_is_named(file, path, message):
    with pytest.raises(ValueError, match=message):
        function_reward(path.format(file=file, folder=file.parent))


def test_a_module_that_lacks_another_says_which(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        function_reward("needs_more:score")


@pytest.mark.parametrize(
    "name, message",
    [
        ("scalar", r"gave scores of shape \(\) for 3 images"),
        ("columns", r"gave scores of shape \(3, 2\) for 3 images"),
        ("too_many", r"gave scores of shape \(4,\) for 3 images"),
        ("nothing", r"gave .*return (scores )?\[B\]"),
        ("words", r"gave \['a', 'bb', 'ccc'\], which are no numbers"),
        ("ragged", r"gave .*, which are no numbers"),
    ],
)
def test_wrong_scores_are_refused_by_name(file, name, message):
    with pytest.raises(ValueError, match=f"{name}' {message}"):
        function_reward(f"{file}:{name}").score(IMAGES, PROMPTS, METADATA)


def test_scores_that_are_not_finite_are_refused_where_rewards_meet(file):
    with pytest.raises(ValueError, match=r"undefined' gave nan for sample 0"):
        score_all([function_reward(f"{file}:undefined")], IMAGES, PROMPTS, METADATA)


def test_a_function_may_give_a_map(tmp_path):
    file = tmp_path / "spots.py"
    file.write_text(
        "from mixgrpo_jax.rewards.contract import Score\n"
        "def spots(images, prompts, metadata):\n"
        "    return Score([1] * len(images), [[1, 2]] * len(images))\n"
    )
    reward = function_reward(f"{file}:spots")
    score = score_all([reward], IMAGES, PROMPTS, METADATA)[reward.name]
    assert score.map.tolist() == [[1, 2]] * len(IMAGES) and score.value.tolist() == [1] * len(IMAGES)
