"""Every objective with every plan, selection, kind of training and age of samples: it runs, or is refused by name."""

import itertools
import os

import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.rl.objectives import OBJECTIVES
from tests.test_train import fast, lines

RECIPES = {"grpo": "mixgrpo"}  # of an objective whose recipe has another name
PLANS = {
    "window": dict(num_steps=3, length=1),
    "per_prompt": dict(num_steps=3, length=1),
    "tree": dict(num_steps=3, splits=(0, 1), factors=(2, 2)),
    "ode": dict(num_steps=3, train_fraction=0.6),
    "tail": dict(num_steps=3, last=2),
}
SELECTIONS = {"all": {}, "extremes": dict(count=1), "band": {}, "replay": dict(capacity=2, groups=1)}
AXES = (tuple(OBJECTIVES), tuple(PLANS), tuple(SELECTIONS), (0, 2), (False, True))


def combined(folder, objective, plan, select, rank, stale):
    config = fast(folder, 2, RECIPES.get(objective, objective), one_step_off_policy=stale)
    if "reward_grad" in configs.find("objective", objective).needs:
        config.rewards, config.reward_options = dict(colour=1.0), {}
    same = config.plan.name == plan  # the recipe's own, as it is
    config.plan = configs.choose("plan", plan, **PLANS[plan]) if not same or plan in ("window", "tree") else config.plan
    config.batch.shared_noise = plan not in ("ode", "tail")
    config.select = configs.choose("select", select, **SELECTIONS[select])
    config.model.lora.rank = rank
    return config


def resolves(*chosen):
    """Whether a combination is one; if it is not, the error names a field."""
    try:
        configs.resolve(combined("", *chosen))
    except configs.ConfigError as error:
        assert str(error).split("=")[0].split(".")[0] in (*configs.base(), "plan", "select"), (chosen, error)
        return False
    return True


def covering(rows):
    """Some of the rows, in which every pair of values of two columns that any row has is once."""
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    left, chosen = set().union(*pairs.values()), []
    while left:
        chosen.append(max(pairs, key=lambda row: len(pairs[row] & left)))
        left -= pairs[chosen[-1]]
    return chosen


ROWS = [row for row in itertools.product(*AXES) if resolves(*row)]


def test_most_combinations_are_one_and_every_value_is_in_some():
    assert len(ROWS) > 0.3 * len(list(itertools.product(*AXES)))
    for axis, values in enumerate(AXES):
        assert {row[axis] for row in ROWS} == set(values)


RUN = covering(ROWS)[: None if os.environ.get("MIXGRPO_JAX_PAIRS") == "all" else 3]  # the richest in pairs come first


@pytest.mark.slow
@pytest.mark.parametrize("row", RUN, ids=lambda row: "-".join(map(str, row)))
def test_every_pair_runs_two_iterations(small_policy, tmp_path, row):
    train.train(combined(small_policy, *row), tmp_path)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2]
