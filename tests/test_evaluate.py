import numpy as np

from mixgrpo_jax.evaluate import table


def test_scores_are_shown_by_every_label_in_columns_that_line_up():
    scores = {"geneval": np.array([0.5, 1.0, 0.75]), "geneval_strict": np.array([0.0, 1.0, 0.0])}
    groups = [{"kind": "single_object"}, {"kind": "position"}, {"kind": "position"}]
    assert table(scores, groups).splitlines() == [
        "                         n   geneval  geneval_strict",
        "all                      3     0.750           0.333",
        "kind position            2     0.875           0.500",
        "kind single_object       1     0.500           0.000",
    ]
