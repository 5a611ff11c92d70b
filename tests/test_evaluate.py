import json
import pathlib

import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.held_out import table
from mixgrpo_jax.evaluate import evaluate
from mixgrpo_jax.models import families

CONFIGS = str(pathlib.Path(__file__).parents[1] / "configs" / "any.py")


def test_scores_are_shown_by_every_label_in_columns_that_line_up():
    scores = {"geneval": np.array([0.5, 1.0, 0.75]), "geneval_strict": np.array([0.0, 1.0, 0.0])}
    groups = [{"kind": "single_object"}, {"kind": "position"}, {"kind": "position"}]
    assert table(scores, groups).splitlines() == [
        "                         n   geneval  geneval_strict",
        "all                      3     0.750           0.333",
        "kind position            2     0.875           0.500",
        "kind single_object       1     0.500           0.000",
    ]


def test_before_after_and_change_stand_side_by_side_and_the_same_samples_once():
    groups = [{"length": "2", "plate": "blue"}, {"length": "2", "plate": "blue"}, {"length": "3", "plate": "pink"}]
    before = {name: np.array([0.0, 1.0, 0.5]) for name in ("ocr", "colour", "strict", "image_reward")}
    after = {name: values + [0.5, -0.5, np.nan] for name, values in before.items()} | {"ocr": np.ones(3)}
    lines = table(after, groups, before).splitlines()
    assert lines[:5] == [
        "               n                       ocr                    colour                    strict",
        "                    before   after  change    before   after  change    before   after  change",
        "all            3     0.500   1.000  +0.500     0.500   0.500  +0.000     0.500   0.500  +0.000",
        "length 2       2     0.500   1.000  +0.500     0.500   0.500  +0.000     0.500   0.500  +0.000",
        "length 3       1     0.500   1.000  +0.500     0.500     nan    +nan     0.500     nan    +nan",
    ]
    assert lines[5].split() == ["n", "image_reward"] and len(lines) == 10 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("task", ["signs", "scenes"])
def test_what_ships_is_as_good_as_its_card_says(task, tmp_path):
    config = configs.load(task, CONFIGS)
    card = json.loads((families.find(config.model.folder) / "card.json").read_text())
    assert evaluate(config, tmp_path, base=True) == pytest.approx(card["held_out"], abs=0.03)
    assert (tmp_path / "held_out.png").is_file()
