import itertools
import re
import sys

import numpy as np
import pytest

from mixgrpo_jax.rewards import geneval
from mixgrpo_jax.tasks import rendered
from mixgrpo_jax.tasks.scenes import data as scenes
from mixgrpo_jax.tasks.scenes import shapes
from mixgrpo_jax.tasks.scenes.data import KINDS, Scene
from mixgrpo_jax.tasks.scenes.detector import detect
from mixgrpo_jax.tasks.scenes.shapes import GROUND, PALETTE, SHAPES, SIZE, Shape

SMALL = rendered.Sizes(name="small", train=48, test=8)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    imported = "tensorflow" in sys.modules  # by some other test
    dataset = scenes.load("train", tmp_path_factory.mktemp("scenes"), SMALL)
    assert dataset[0] and ("tensorflow" in sys.modules) == imported
    return dataset


def test_splits_share_no_prompt_but_those_for_a_single_shape():
    for kind in KINDS:
        train, test = ({scene.prompt for scene in scenes.scenes(split, kind)} for split in ("train", "test"))
        assert train == test if kind == "single_object" else train and test and train.isdisjoint(test)


def test_training_shows_every_shape_in_every_kind_and_every_colour_of_each():
    for kind in KINDS:
        drawn = scenes.scenes("train", kind)
        assert {name for scene in drawn for name, _ in scene.shapes} == set(SHAPES)
    coloured = scenes.scenes("train", "colors") + scenes.scenes("train", "color_attr")
    assert {shape for scene in coloured for shape in scene.shapes} == set(itertools.product(SHAPES, PALETTE))
    assert {len(scene.shapes) for scene in scenes.scenes("test", "counting")} == set(scenes.COUNTS)


@pytest.mark.parametrize(
    ("scene", "prompt", "include"),
    [
        (Scene("single_object", (("square", ""),)), "a photo of a square", [{"class": "square", "count": 1}]),
        (
            Scene("two_object", (("circle", ""), ("cross", ""))),
            "a photo of a circle and a cross",
            [{"class": "circle", "count": 1}, {"class": "cross", "count": 1}],
        ),
        (
            Scene("counting", (("cross", ""),) * 3),
            "a photo of three crosses",
            [{"class": "cross", "count": 3}],
        ),
        (
            Scene("colors", (("circle", "red"),)),
            "a photo of a red circle",
            [{"class": "circle", "count": 1, "color": "red"}],
        ),
        (
            Scene("position", (("circle", ""), ("square", "")), "left of"),
            "a photo of a circle left of a square",
            [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
        ),
        (
            Scene("position", (("circle", ""), ("square", "red")), "above"),
            "a photo of a circle above a red square",
            [
                {"class": "square", "count": 1, "color": "red"},
                {"class": "circle", "count": 1, "position": ["above", 0]},
            ],
        ),
        (
            Scene("color_attr", (("circle", "red"), ("square", "blue"))),
            "a photo of a red circle and a blue square",
            [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}],
        ),
    ],
)
def test_prompts_and_metadata_are_genevals(scene, prompt, include):
    exclude = {"exclude": [{"class": "cross", "count": 4}]} if scene.kind == "counting" else {}
    assert scene.prompt == prompt
    assert scene.metadata == {"tag": scene.kind, "include": include, "prompt": prompt, **exclude}


def test_samples_keep_to_their_split_and_the_weights_of_kinds():
    drawn = scenes.sample_scenes("train", 2000)
    assert drawn == scenes.sample_scenes("train", 2000) != scenes.sample_scenes("train", 2000, seed=1)
    assert all(scene in scenes.scenes("train", scene.kind) for scene in drawn[:200])
    shares = [np.mean([scene.kind == kind for scene in drawn]) for kind in KINDS]
    np.testing.assert_allclose(shares, list(KINDS.values()), atol=0.03)
    with pytest.raises(ValueError, match="split='valid'"):
        scenes.sample_scenes("valid", 1)


def test_shapes_lie_apart_inside_the_picture_and_as_they_are_asked_for():
    rng = np.random.default_rng(0)
    for scene in scenes.sample_scenes("test", 300):
        laid = scenes.lay_out(scene, rng)
        assert [shape.name for shape in laid] == [name for name, _ in scene.shapes]
        assert all(colour in ("", shape.colour) for shape, (_, colour) in zip(laid, scene.shapes))
        assert all(0 <= shape.left <= 24 - SIZE and 0 <= shape.top <= 24 - SIZE for shape in laid)
        for a, b in itertools.combinations(laid, 2):
            assert max(abs(a.left - b.left), abs(a.top - b.top)) >= SIZE + 2
        if len({name for name, _ in scene.shapes}) == 2:
            x, y = scenes.RELATIONS[scene.relation or "left of"]
            assert x * (laid[0].left - laid[1].left) + y * (laid[0].top - laid[1].top) >= SIZE + 2


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_fills_its_box_and_has_its_area(name):
    areas = {"circle": np.pi / 4, "square": 1, "triangle": 1 / 2, "cross": 5 / 9}
    covered = shapes.coverage(name)
    np.testing.assert_allclose(covered.mean(), areas[name], atol=0.02)
    np.testing.assert_allclose(covered, covered[:, ::-1], atol=1e-6)
    image = shapes.render([Shape(name, "blue", 2, 10)])
    assert image.shape == (24, 24, 3) and image.dtype == np.uint8
    drawn = (image != GROUND).any(-1)
    assert not drawn[:10].any() and not drawn[18:].any() and not drawn[:, :2].any() and not drawn[:, 10:].any()
    assert drawn[10:18].any(1).all() and drawn[:, 2:10].any(0).all()
    assert (image == PALETTE["blue"]).all(-1).sum() >= 4


def test_data_set_holds_what_was_drawn(train):
    assert len(train) == 48
    drawn = {scene.prompt: scene.metadata for scene in scenes.sample_scenes("train", 48)}
    assert {element["prompt"] for element in train} == set(drawn)
    for element in train:
        assert element["metadata"] == drawn[element["prompt"]]
        assert scenes.groups(element["metadata"]) == {"kind": element["metadata"]["tag"]}


def test_photographs_are_addressed_by_their_generator_and_differ_in_noise():
    scene = Scene("single_object", (("square", ""),))
    one, same, other = (scenes.photograph(scene, np.random.default_rng(seed))["image"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.5
    pictures = [scenes.photograph(scene, np.random.default_rng(s))["image"] for s in range(20)]
    spread = [np.quantile(np.abs(picture - 235.0), 0.7) for picture in pictures]
    assert min(spread) < 15 < 50 < max(spread)  # some are clean, some are bad


def test_a_clean_picture_is_its_photograph_with_less_noise(train):
    clean, images = (np.stack([element[name] for element in train]) for name in ("clean", "image"))
    metadata = [element["metadata"] for element in train]
    scores = [geneval.scores(detect(pictures), metadata, strict=True).mean() for pictures in (images, clean)]
    assert 0.3 < scores[0] < 0.6 < 0.75 < scores[1]
    noise, less = (np.abs(pictures[:, 10:14] - 235.0) for pictures in (images, clean))  # where no shape lies
    inside = (images[:, 10:14] > 0) & (images[:, 10:14] < 255)
    np.testing.assert_allclose(less[inside], rendered.CLEAN * noise[inside], atol=1)


def test_batches_hold_pictures_prompts_and_metadata(train):
    batch = scenes.batches(train, 0, 8)[5]
    assert batch["image"].shape == batch["clean"].shape == (8, 24, 24, 3)
    assert [metadata["prompt"] for metadata in batch["metadata"]] == batch["prompt"]


def test_every_prompt_fits_ends_with_eos_and_has_no_unknown_word():
    tokenizer = scenes.build_tokenizer()
    for split, kind in itertools.product(("train", "test"), KINDS):
        for scene in scenes.scenes(split, kind):
            ids = tokenizer(scene.prompt)["input_ids"]
            assert len(ids) == len(re.findall(r"\w+", scene.prompt)) + 1 <= scenes.PROMPT_LENGTH
            assert ids[-1] == 1 and 2 not in ids
    assert len(tokenizer) <= 64
