"""A workdir and a config that do not belong together are told apart."""

import json
import re

import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.config import ConfigError
from mixgrpo_jax.engine import workdir as workdirs
from mixgrpo_jax.engine.loading import restore_trained
from mixgrpo_jax.runtime.checkpoint import Checkpoints, finished


def changed(**fields):
    config = configs.base()
    config.reward_options = dict(ocr=dict(where="device"))
    for path, value in fields.items():
        section, _, name = path.rpartition("__")
        (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    ("field", "was", "now", "reads"),
    [
        ("seed", 714, 3, False),
        ("model__image_size", [16, 48], (32, 48), False),
        ("data__name", "signs", "scenes", False),
        ("optimizer__name", "adamw", "adafactor", False),
        ("evaluation__prompts", 256, 64, False),
        ("model__folder", "", "shipped:scenes", True),
    ],
)
def test_what_makes_another_run_is_refused_with_both_values(tmp_path, field, was, now, reads):
    workdirs.record(changed(), tmp_path)
    name = field.replace("__", ".")
    message = rf"{name}=.*: the run in .* has {re.escape(repr(was))}\. To go on, "
    with pytest.raises(ConfigError, match=message + f"set {name} back, or begin anew in another workdir"):
        workdirs.check(changed(**{field: now}), tmp_path)
    if reads:
        with pytest.raises(ConfigError, match=message + "leave --config away"):
            workdirs.check(changed(**{field: now}), tmp_path, reads=True)
    else:
        assert list(workdirs.check(changed(**{field: now}), tmp_path, reads=True)) == [name]


def test_adapters_of_another_scale_are_refused(tmp_path):
    config = changed()
    config.model.lora.rank, config.model.lora.alpha = 4, 8.0
    workdirs.record(config, tmp_path)
    config.model.lora.alpha = 16.0
    with pytest.raises(ConfigError, match=r"model.lora.alpha=16.0: the run in .* has 8.0"):
        workdirs.check(config, tmp_path, reads=True)


def test_what_may_change_is_said_and_recorded(tmp_path, capsys):
    assert workdirs.check(changed(), tmp_path) == {}  # nothing is there
    workdirs.record(changed(), tmp_path)
    assert workdirs.check(changed(), tmp_path) == {} and not capsys.readouterr().err
    config = changed(iterations=400, rewards=dict(ocr=1.0))
    found = workdirs.check(config, tmp_path)
    assert found == {"iterations": [300, 400], "rewards.colour": [1.0, None]}
    assert "iterations 300 -> 400, rewards.colour 1.0 -> None" in capsys.readouterr().err
    workdirs.record(config, tmp_path, found, 300)
    workdirs.record(config, tmp_path, workdirs.check(config, tmp_path), 400)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert history == [{"iteration": 300, "changed": found}]


def test_a_models_folder_that_has_moved_is_the_same_model(tmp_path):
    workdirs.record(changed(model__folder=str(tmp_path / "gone")), tmp_path)
    assert list(workdirs.check(changed(model__folder=str(tmp_path)), tmp_path, reads=True)) == []


def test_a_run_keeps_the_adapters_that_it_began_with_until_they_are_gone(tmp_path):
    def beginning(file):
        config = changed()
        config.model.lora.rank, config.model.lora.init_from = 4, str(file)
        return config

    workdirs.record(beginning(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match=r"model.lora.init_from='': the run in .* has '/.*'. To go on, "):
        workdirs.check(beginning(""), tmp_path)
    workdirs.record(beginning(tmp_path / "gone"), tmp_path)
    assert workdirs.check(beginning(""), tmp_path) == {}
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["model"]["lora"]["init_from"]  # of a run from before the field was there
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert workdirs.check(beginning(""), tmp_path) == {}


@pytest.mark.parametrize("recipe", ["quickstart", "nft", "dancegrpo"])
def test_a_runs_own_config_is_read_as_it_was(tmp_path, recipe):
    config = configs.load(recipe, str(workdirs.RECIPE.parents[2] / "configs" / "any.py"))
    config.reward_options = dict(ocr=dict(where="device"))
    workdirs.record(config, tmp_path)
    found = workdirs.recorded(tmp_path)
    assert found.to_json_best_effort() == config.to_json_best_effort()
    assert configs.resolve(found).planner == configs.resolve(config).planner
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is broken"):
        workdirs.recorded(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no config.json, and no run"):
        workdirs.recorded(tmp_path / "none")


def test_a_command_takes_the_runs_own_config_where_it_is_given_none():
    own = f"--config={workdirs.RECIPE}:runs/a"
    assert workdirs.with_own_config(["sample", "--workdir=runs/a", "--config.seed=3"]) == [
        *("sample", own, "--workdir=runs/a", "--config.seed=3")
    ]
    assert workdirs.with_own_config(["sample", "--workdir", "runs/a"])[1] == own
    for argv in (["sample", "--config=c.py", "--workdir=runs/a"], ["sample", "--help"]):
        assert workdirs.with_own_config(argv) == argv


def test_a_workdir_without_a_checkpoint_is_an_error_and_stays_as_it_is(tmp_path):
    settings = configs.resolve(configs.base())
    with pytest.raises(ValueError, match=r"workdir='.*' holds no checkpoint: let the run save one, or .* --base"):
        restore_trained(settings, None, tmp_path, None)
    assert not any(tmp_path.iterdir())
    assert restore_trained(settings, None, tmp_path, "as it was", base=True)[0] == "as it was"


def test_a_part_that_is_not_stored_as_it_is_asked_for_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    checkpoints.save(finished(1, {"params": {"a": a, "b": a}}, {}))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    found = checkpoints.restore_part(("params",), {"a": a.astype(np.float16), "b": a})
    np.testing.assert_array_equal(found["a"], a)
    assert found["a"].dtype == np.float16
    for like, message in (
        ({"a": a, "b": a[:2]}, r"its state/params/b is float32 \(3, 4\), and this config's float32 \(2, 4\)"),
        ({"a": a}, r"it has state/params/b \(1 such\)"),
        ({"a": a, "b": a, "c": a}, r"it lacks state/params/c \(1 such\)"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.restore_part(("params",), like)
