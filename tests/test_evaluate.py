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


@pytest.mark.parametrize("task", ["signs", "scenes"])
def test_what_ships_is_as_good_as_its_card_says(task, tmp_path):
    config = configs.load(task, CONFIGS)
    card = json.loads((families.find(config.model.folder) / "card.json").read_text())
    assert evaluate(config, tmp_path, base=True) == pytest.approx(card["held_out"], abs=0.03)
    assert (tmp_path / "held_out.png").is_file()
