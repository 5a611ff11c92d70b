import itertools
import json

import numpy as np
import pytest

from mixgrpo_jax.data import prompts
from mixgrpo_jax.rewards import geneval, remote
from mixgrpo_jax.rewards.geneval import MAX_OBJECTS, RELATIONS, TAGS, Detection, judge, relations
from mixgrpo_jax.rewards.scoring import build
from mixgrpo_jax.rewards.serving import wire
from mixgrpo_jax.tasks.scenes.data import KINDS, lay_out, sample_scenes
from mixgrpo_jax.tasks.scenes.shapes import render

# One prompt of every kind, as GenEval's own file has them.
SINGLE = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
TWO = {
    "tag": "two_object",
    "include": [{"class": "cat", "count": 1}, {"class": "bus", "count": 1}],
    "prompt": "a photo of a cat and a bus",
}
COUNTING = {
    "tag": "counting",
    "include": [{"class": "clock", "count": 3}],
    "exclude": [{"class": "clock", "count": 4}],
    "prompt": "a photo of three clocks",
}
COLORS = {
    "tag": "colors",
    "include": [{"class": "car", "count": 1, "color": "pink"}],
    "prompt": "a photo of a pink car",
}
POSITION = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "position": ["right of", 0]}],
    "prompt": "a photo of a tie right of a dog",
}
COLOR_ATTR = {
    "tag": "color_attr",
    "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "book", "count": 1, "color": "blue"}],
    "prompt": "a photo of a red cup and a blue book",
}


def seen(name, colour="", at=(0, 0), score=0.95, size=10):
    return Detection(name, score, (at[0], at[1], at[0] + size, at[1] + size), colour)


@pytest.mark.parametrize(
    ("metadata", "detections", "strict", "graded"),
    [
        (SINGLE, [seen("bench")], True, 1.0),
        (SINGLE, [seen("bench"), seen("dog")], True, 1.0),  # what is not spoken of does not matter
        (SINGLE, [], False, 0.0),
        (SINGLE, [seen("dog")], False, 0.0),
        (SINGLE, [seen("bench"), seen("bench")], False, 0.0),
        (SINGLE, [seen("bench")] * 4, False, -2.0),
        (SINGLE, [seen("bench", score=0.3)], False, 0.0),  # not above the threshold
        (TWO, [seen("cat"), seen("bus")], True, 1.0),
        (TWO, [seen("cat")], False, 0.5),
        (TWO, [seen("cat"), seen("bus"), seen("bus")], False, 0.5),
        (COUNTING, [seen("clock")] * 3, True, 1.0),
        (COUNTING, [seen("clock")] * 2, False, 2 / 3),
        (COUNTING, [seen("clock")] * 4, False, 2 / 3),
        (COUNTING, [seen("clock"), seen("clock"), seen("clock", score=0.9)], False, 2 / 3),
        (COLORS, [seen("car", "pink")], True, 1.0),
        (COLORS, [seen("car", "red")], False, 0.5),
        (COLORS, [seen("car", "pink"), seen("car", "pink")], False, 0.0),
        (POSITION, [seen("dog"), seen("tie", at=(30, 0))], True, 1.0),
        (POSITION, [seen("dog"), seen("tie", at=(-30, 0))], False, 2 / 3),
        (POSITION, [seen("tie", at=(30, 0))], False, 1 / 3),
        (POSITION, [seen("dog"), seen("tie", at=(30, 0)), seen("tie", at=(40, 0))], False, 1 / 3),
        (COLOR_ATTR, [seen("cup", "red"), seen("book", "blue")], True, 1.0),
        (COLOR_ATTR, [seen("cup", "blue"), seen("book", "red")], False, 0.5),
        (COLOR_ATTR, [seen("cup", "red")], False, 0.5),
    ],
)
def test_each_kind_is_judged_by_its_rule(metadata, detections, strict, graded):
    verdict = judge(detections, metadata)
    assert verdict.strict is strict and verdict.graded == pytest.approx(graded)
    assert bool(verdict.reasons) != strict


def test_several_must_all_have_the_colour_and_the_place():
    chairs = {"class": "chair", "count": 2, "color": "red", "position": ["above", 0]}
    metadata = {"tag": "position", "include": [{"class": "dog", "count": 1}, chairs]}
    dog = seen("dog", at=(0, 40))
    both = [seen("chair", "red"), seen("chair", "red", at=(3, 0))]
    assert judge([dog, *both], metadata).strict
    assert judge([dog, both[0], seen("chair", "blue")], metadata).graded == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert judge([dog, both[0], seen("chair", "red", at=(0, 80))], metadata).graded == pytest.approx(3 / 4)


def test_too_many_of_an_excluded_class_is_not_strictly_right():
    metadata = SINGLE | {"exclude": [{"class": "dog", "count": 2}]}
    assert judge([seen("bench"), seen("dog")], metadata).strict
    verdict = judge([seen("bench"), seen("dog"), seen("dog")], metadata)
    assert (verdict.strict, verdict.graded) == (False, 1.0) and "2 of dog" in verdict.reasons[0]


def test_at_most_sixteen_of_a_class_count_and_these_are_the_surest():
    many = [seen("dog", score=0.31 + i / 100) for i in range(20)]
    kept = geneval.counted(many, "colors")["dog"]
    assert [d.score for d in kept] == sorted([d.score for d in many], reverse=True)[:MAX_OBJECTS]
    assert geneval.counted(many, "counting") == {"dog": []}


def test_verdict_does_not_depend_on_the_order_or_the_scale_of_detections():
    rng = np.random.default_rng(0)
    for metadata in (SINGLE, TWO, COUNTING, COLORS, POSITION, COLOR_ATTR):
        names = [clause["class"] for clause in metadata["include"]]
        for _ in range(30):
            boxes = [
                seen(str(rng.choice(names)), str(rng.choice(["red", "blue", "pink"])), rng.integers(0, 40, 2))
                for _ in range(rng.integers(0, 5))
            ]
            once = judge(boxes, metadata)
            assert judge(boxes[::-1], metadata)[:2] == once[:2]
            assert judge([d._replace(box=tuple(7 * x for x in d.box)) for d in boxes], metadata)[:2] == once[:2]
            assert once.graded <= 1 and (once.graded == 1 or not once.strict)


def test_the_classifier_is_asked_only_where_a_colour_matters():
    def ask():
        pytest.fail("asked")

    assert judge([seen("bench", ask)], SINGLE).strict
    assert judge([seen("car", ask)] * 2, COLORS).graded == 0.0
    assert judge([seen("car", lambda: "pink")], COLORS).strict


def box(x, y, width=10, height=10):
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def test_relations_are_those_of_the_directions():
    here = box(0, 0)
    assert relations(box(-30, 0), here) == {"left of"} and relations(box(30, 0), here) == {"right of"}
    assert relations(box(0, -30), here) == {"above"} and relations(box(0, 30), here) == {"below"}
    assert relations(box(30, 30), here) == {"right of", "below"}
    assert relations(here, here) == set()


def test_relations_need_a_tenth_of_the_extents():
    # max(|o| - 0.1 (10 + 10), 0) / |o| > 1/2 along one axis is |o| > 4.
    assert relations(box(3.99, 0), box(0, 0)) == set() and relations(box(4.01, 0), box(0, 0)) == {"right of"}
    assert relations(box(4.01, 0, width=30), box(0, 0)) == set()


def test_relations_are_opposite_from_the_other_side():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for x, y in itertools.product(range(-12, 13, 3), repeat=2):
        a, b = box(x, y, 8, 12), box(0, 0)
        assert {opposite[name] for name in relations(a, b)} == relations(b, a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "colours"}, r"metadata.tag='colours' .*use one of single_object, .*color_attr"),
        ({"include": None}, r"metadata.include=None .*give a list"),
        ({"include": []}, r"metadata.include=\[\] .*at least one object"),
        ({"include": ["dog"]}, r"metadata.include\[0\]='dog' .*class"),
        ({"include": [{"count": 1}]}, r"metadata.include\[0\].class=None .*name of a class"),
        ({"include": [{"class": "dog"}]}, r"metadata.include\[0\].count=None .*at least 1"),
        ({"include": [{"class": "dog", "count": 0}]}, r"metadata.include\[0\].count=0 .*at least 1"),
        ({"include": [{"class": "dog", "count": 1.5}]}, r"include\[0\].count=1.5 .*whole number"),
        ({"include": [{"class": "dog", "count": 1, "color": 3}]}, r"include\[0\].color=3 .*name of a colour"),
        ({"exclude": [{"class": "dog", "count": True}]}, r"metadata.exclude\[0\].count=True"),
        ({"exclude": "dog"}, r"metadata.exclude='dog' .*give a list"),
    ],
)
def test_bad_metadata_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        geneval.scores([[]], [SINGLE | change])


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("left of", r"metadata.include\[1\].position='left of' .*index of an earlier"),
        (["near", 0], r"metadata.include\[1\].position\[0\]='near' .*left of, right of, above, below"),
        (["above", 1], r"metadata.include\[1\].position\[1\]=1 .*below 1"),
        (["above", -1], r"metadata.include\[1\].position\[1\]=-1"),
    ],
)
def test_bad_positions_are_named(position, message):
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": position}]
    with pytest.raises(ValueError, match=message):
        judge([], {"tag": "position", "include": include})


def test_a_file_of_genevals_reaches_the_rule_through_the_wire(tmp_path):
    rows = [SINGLE, TWO, COUNTING, COLORS, POSITION, COLOR_ATTR]
    assert [row["tag"] for row in rows] == list(TAGS) and POSITION["include"][1]["position"][0] in RELATIONS
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = prompts.read(str(tmp_path / "test.jsonl"))
    sent = wire.Request("one", (), np.zeros((6, 2, 2, 3), np.uint8), [p.text for p in read], [p.metadata for p in read])
    received = wire.decode(wire.encode(sent), wire.ARCHIVE, wire.Limits(images=8, bytes=10_000))
    assert received.metadata == [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    assert [geneval.parse(m) for m in received.metadata] == [geneval.parse(row) for row in rows]


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    scenes = sample_scenes("test", 60)
    return np.stack([render(lay_out(scene, rng)) for scene in scenes]), scenes


@pytest.mark.parametrize("name", ["geneval", "geneval_strict"])
def test_rewards_of_scenes(drawn, name):
    images, scenes = drawn
    (reward,) = build([name], {})
    assert reward.where == "host" and reward.name == name
    texts, metadata = [scene.prompt for scene in scenes], [scene.metadata for scene in scenes]
    right = reward.score(images, texts, metadata)
    assert right.dtype == np.float32 and (right == 1).all()
    others = reward.score(images[::-1], texts, metadata)
    assert others.mean() < 0.5 and (name == "geneval" or set(others) <= {0, 1})
    assert {scene.kind for scene in scenes} == set(KINDS)


def test_a_server_gives_the_same_scores(drawn, serve):
    images, scenes = drawn
    texts, metadata = [scene.prompt for scene in scenes], [scene.metadata for scene in scenes]
    (near,) = build(["geneval"], {})
    url = serve(near.score)
    far = remote.remote("bright", urls=[url]).score(images[::-1], texts, metadata)
    np.testing.assert_array_equal(far, near.score(images[::-1], texts, metadata))
