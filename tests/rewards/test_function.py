import pickle
import sys
import textwrap

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


def imported(tmp_path, name, source, function="score"):
    """The reward of a file, which is gone from the imported modules when the test is over."""
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    return function_reward(f"{tmp_path / name}.py:{function}")


@pytest.fixture(autouse=True)
def modules_as_before(monkeypatch):
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if "tmp" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_file_is_a_module_like_any_other(tmp_path):
    (tmp_path / "beside_it.py").write_text("def double(x): return 2 * x")
    reward = imported(
        tmp_path,
        "as_module",
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from beside_it import double

        @dataclass
        class Box:
            x: float = 1.0

        def score(images, prompts, metadata):
            return [double(Box().x)] * len(prompts)
        """,
    )
    assert reward.score(IMAGES, PROMPTS, METADATA).tolist() == [2, 2, 2]
    module = sys.modules["as_module"]
    assert module.__file__ == str(tmp_path / "as_module.py")
    assert pickle.loads(pickle.dumps(module.Box(3.0))).x == 3


def test_worker_processes_find_a_file_s_functions(tmp_path):
    source = """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    def one(image):
        return float(image.mean())

    def score(images, prompts, metadata):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(one, images))
    """
    scores = imported(tmp_path, "with_workers", source).score(IMAGES, PROMPTS, METADATA)
    np.testing.assert_allclose(scores, IMAGES.mean((1, 2, 3)), rtol=1e-6)


def test_a_file_is_imported_once_and_namesakes_are_told_apart(tmp_path, capsys):
    source = "print('loading', __file__)\ndef score(*_): return [{}] * 3\nother = score"
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        for function in ("score", "other"):
            reward = imported(tmp_path / folder, "namesake", source.format(value), function)
            assert reward.score(IMAGES, PROMPTS, METADATA).tolist() == [value] * 3
    assert capsys.readouterr().out.count("loading") == 2
    standard = imported(tmp_path, "json", "def score(*_): return [3, 3, 3]")
    assert standard.score(IMAGES, PROMPTS, METADATA).tolist() == [3] * 3
    assert not sys.modules["json"].__file__.startswith(str(tmp_path))


def test_a_file_that_fails_or_leaves_says_so(tmp_path):
    with pytest.raises(ZeroDivisionError):
        imported(tmp_path, "that_fails", "1 / 0")
    assert not [name for name in sys.modules if name.startswith("that_fails")]
    with pytest.raises(RuntimeError, match=r"that_leaves.py called sys.exit\(0\) when it was imported"):
        imported(tmp_path, "that_leaves", "import sys; sys.exit(0)")
    leaves = imported(tmp_path, "leaves_later", "import sys\ndef score(*_): sys.exit()")
    with pytest.raises(RuntimeError, match=r"leaves_later.py:score' called sys.exit\(None\)"):
        score_all([leaves], IMAGES, PROMPTS, METADATA)


TENSORS = """
import torch
from mixgrpo_jax.rewards.contract import Score

net = torch.nn.Linear(1, 1)
with torch.no_grad():
    net.weight.fill_(2)
    net.bias.fill_(1)

def pixels(images):
    return torch.from_numpy(images).float().mean((1, 2, 3))

def graph(images, prompts, metadata):
    return net(pixels(images)[:, None])[:, 0]

def half(images, prompts, metadata):
    return graph(images, prompts, metadata).bfloat16()

def listed(images, prompts, metadata):
    return list(graph(images, prompts, metadata))

def mapped(images, prompts, metadata):
    return Score(graph(images, prompts, metadata), graph(images, prompts, metadata)[:, None].repeat(1, 2))

def in_place(images, prompts, metadata):
    images[:] = 0
    return pixels(images)

def column(images, prompts, metadata):
    return graph(images, prompts, metadata)[:, None]

def pair(images, prompts, metadata):
    return graph(images, prompts, metadata), {}
"""


def test_tensors_of_pytorch_are_numbers(tmp_path):
    pytest.importorskip("torch")
    expected = 2 * IMAGES.mean((1, 2, 3)) + 1
    for name in ("graph", "half", "listed", "mapped"):
        score = score_all([imported(tmp_path, "tensors", TENSORS, name)], IMAGES, PROMPTS, METADATA).popitem()[1]
        np.testing.assert_allclose(score.value, expected, rtol=1e-2 if name == "half" else 1e-6)
    np.testing.assert_allclose(score.map, expected[:, None] * [1, 1], rtol=1e-6)
    given = jnp.asarray(IMAGES)
    assert not imported(tmp_path, "tensors", TENSORS, "in_place").score(given, PROMPTS, METADATA).any()
    np.testing.assert_array_equal(given, IMAGES)  # the next reward's are as they were
    for name, message in (("column", r"shape \(3, 1\)"), ("pair", r"a tuple \(Tensor, dict\): return its scores")):
        with pytest.raises(ValueError, match=message):
            imported(tmp_path, "tensors", TENSORS, name).score(IMAGES, PROMPTS, METADATA)


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
