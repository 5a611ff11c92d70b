import csv
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax import config as configs
from mixgrpo_jax.convert import convert
from mixgrpo_jax.engine.held_out import diversity, table
from mixgrpo_jax.engine.loading import VERSION
from mixgrpo_jax.engine.workdir import record
from mixgrpo_jax.evaluate import evaluate
from mixgrpo_jax.models import families, lora, lora_files
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.rl.update import TrainState
from mixgrpo_jax.runtime.checkpoint import Checkpoints, finished
from mixgrpo_jax.runtime.intervals import bootstrap, paired
from mixgrpo_jax.runtime.mesh import virtual_devices
from tests.test_train import CONFIGS, fast

PROMPTS = ["a blue sign that says 4270 in white", "a pink sign that says 8 in black", "a red sign that says 31 in blue"]


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
    assert evaluate(config, tmp_path, policy="base") == pytest.approx(card["held_out"], abs=0.03)
    assert (tmp_path / "held_out.png").is_file()


@pytest.fixture(scope="module")
def run(small_policy, tmp_path_factory):
    """A config, its workdir with checkpoints of iterations 1 and 2, and a file of prompts."""
    config, folder = fast(small_policy, 2), tmp_path_factory.mktemp("evaluated")
    config.checkpoint.every, config.evaluation.average, config.evaluation.batch = 1, "", 2
    params = families.load(config.model.folder)[1]["transformer"]
    checkpoints, rng = Checkpoints(folder / "run", 1), np.random.default_rng(0)
    for iteration in (1, 2):
        params = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape, scale=0.2).astype(leaf.dtype), params)
        state = TrainState(jax.tree.map(jnp.asarray, params), {}, {}, jnp.asarray(iteration))
        checkpoints.save(finished(iteration, state, {"version": VERSION}), force=True)
    checkpoints.close()
    record(config, folder / "run")
    kinds = ["one", "two", "one"]
    lines = [json.dumps({"prompt": prompt, "category": kind}) for prompt, kind in zip(PROMPTS, kinds)]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return config, folder / "run", str(folder / "mine.jsonl")


def read(workdir):
    """scores.csv as columns, and scores.json."""
    with (workdir / "evaluation" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return columns, json.loads((workdir / "evaluation" / "scores.json").read_text())


def test_a_comparison_is_of_the_same_prompts_and_noise_and_leaves_every_score(run, capsys):
    config, workdir, prompts = run
    options = dict(prompts=prompts, samples=2, rewards=["config", "jpeg_compressibility"])
    means = evaluate(config, workdir, policy="2", against="base", pictures=4, **options)
    columns, about = read(workdir)
    assert columns["id"].tolist() == list("012345") and columns["sample"].tolist() == list("010101")
    assert columns["prompt"].tolist() == [prompt for prompt in PROMPTS for _ in range(2)]
    names = ["slow", "jpeg_compressibility", "diversity/latents", "diversity/pixels"]
    assert list(means) == names == list(about["scores"]) == list(about["change"])
    for name in names:
        after, before = (columns[key].astype(float).reshape(3, 2).mean(1) for key in (name, f"before/{name}"))
        assert means[name] == pytest.approx(after.mean(), rel=1e-5)
        assert about["scores"][name] == pytest.approx({"n": 3, **bootstrap(after)._asdict()}, rel=1e-4)
        found = paired(before, after)
        expected = dict(n=3, before=found.before, after=found.after, change=found.change.mean, low=found.change.low)
        expected |= dict(high=found.change.high, improved=found.improved, worsened=found.worsened)
        if name == "jpeg_compressibility":  # sizes that are equal may round apart in the file
            expected |= {share: about["change"][name][share] for share in ("improved", "worsened")}
        assert about["change"][name] == pytest.approx(expected, abs=2e-4)
    assert about["policy"] == "iteration 2 (params)" and about["against"] == config.model.folder
    assert about["evaluation"]["num_steps"] == 1 and about["prompts"] == prompts
    assert [row["groups"]["category"] for row in about["pictures"]] == ["one", "one", "two", "two", "one", "one"]
    said = capsys.readouterr().out
    assert "before   after  change" in said and "category two" in said

    pictures = {path.name: np.asarray(Image.open(path)) for path in (workdir / "evaluation").glob("*.png")}
    assert sorted(pictures) == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert float(columns["slow"][2]) == pytest.approx(pictures["0002.png"].mean() / 255, abs=1e-6)
    assert len(list((workdir / "evaluation" / "before").iterdir())) == 4
    apart = pictures["0002.png"].astype(float) - pictures["0003.png"]
    assert float(columns["diversity/pixels"][2]) == pytest.approx(np.sqrt((apart**2).mean()) / 255, rel=1e-4)

    config = config.copy_and_resolve_references()
    config.evaluation.batch = 3  # a prompt's picture does not depend on the batch, nor on how many samples there are
    evaluate(config, workdir, prompts=prompts, pictures=1)
    alone, about = read(workdir)
    np.testing.assert_allclose(alone["slow"].astype(float), columns["slow"][::2].astype(float), atol=1e-5)
    assert about["against"] is None and about["change"] == {} and "before/slow" not in alone
    assert [path.name for path in (workdir / "evaluation").rglob("*.png")] == ["0000.png"]


@pytest.mark.slow
def test_checkpoints_and_what_lies_elsewhere_are_named_alike(run, tmp_path):
    config, workdir, prompts = run

    def scores(policy, config=config, workdir=workdir):
        evaluate(config, workdir, policy=policy, prompts=prompts, pictures=0)
        return read(workdir)[0]["slow"].tolist()

    newest = scores("newest")
    assert newest == scores("2") != scores("1") != scores("base")
    convert(workdir, tmp_path / "trained", "diffusers", which="raw")
    assert scores(str(tmp_path / "trained")) == newest
    assert scores(str(config.model.folder), workdir=tmp_path / "elsewhere") == scores("base")

    parts, params = families.load(config.model.folder)
    adapters = lora.init(LoraConfig(rank=2, targets=".*/(q|v)"), params["transformer"], jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: np.random.default_rng(leaf.shape[-1]).normal(size=leaf.shape), adapters)
    lora_files.save(tmp_path / "adapters", parts.table, jax.tree.map(np.float32, adapters), 1.0)
    adapted = config.copy_and_resolve_references()
    adapted.model.lora.rank, adapted.model.lora.targets = 2, ".*/(q|v)"
    adapted.model.lora.init_from = str(tmp_path / "adapters")
    expected = scores("base", adapted, tmp_path / "adapted")
    assert scores(str(tmp_path / "adapters"), workdir=tmp_path / "lora") == expected != scores("base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(policy="7"), r"checkpoints has no checkpoint of iteration 7: it holds those of 1, 2"),
        (dict(against="7"), r"checkpoints has no checkpoint of iteration 7: it holds those of 1, 2"),
        (dict(policy="newset"), r"policy='newset': there is no such file or folder, and on the hub"),
        (dict(rewards=["config", "beauty"]), r"reward 'beauty' is unknown: choose from aesthetic, "),
        (dict(prompts="{folder}/none.txt"), r"prompts='.*none.txt' is not there; give a .txt or .jsonl file"),
        (dict(prompts="{folder}/empty.txt"), r"prompts='.*empty.txt' holds no prompt"),
        (dict(prompts="{folder}/latin.txt"), r"latin.txt, line 1 is not UTF-8: it has the byte 0xe9"),
        (
            dict(rewards=["colour"]),
            r"prompts='.*mine.jsonl': a prompt has no '\w+'. This is of the reward 'colour'. Give",
        ),
        (dict(samples=0), r"samples=0: it must be at least 1"),
        (dict(pictures=-1), r"pictures=-1: it must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(run, tmp_path, options, message):
    config, workdir, prompts = run
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("a café".encode("latin-1"))
    options = dict(prompts=prompts) | options
    options["prompts"] = options["prompts"].format(folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluate(config, workdir, **options)


def test_diversity_is_the_mean_distance_of_two_samples():
    samples = np.array([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    np.testing.assert_allclose(diversity(samples), [2 / 3 * np.sqrt(12.5), 0], rtol=1e-6)
    independent = np.random.default_rng(0).normal(size=(4, 3, 1000))
    np.testing.assert_allclose(diversity(independent), np.sqrt(2), rtol=0.05)


PROGRAM = """
import sys
import numpy as np
from mixgrpo_jax import config as configs
from mixgrpo_jax.evaluate import evaluate

config = configs.load("signs", sys.argv[2])
config.evaluation.prompts, config.evaluation.batch, config.rewards, config.watched = 16, 16, dict(colour=1.0), ()
config.mesh.fsdp, config.mesh.tensor = int(sys.argv[3]), int(sys.argv[3])
evaluate(config, sys.argv[1], policy="base")
"""


@pytest.mark.slow
def test_pictures_are_those_of_one_device_on_eight(tmp_path):
    """They differ by at most 1/255, in at most 0.1 % of values, spread by samples and with cut parameters."""
    pictures = {}
    for devices, cut in ((1, 1), (8, 1), (8, 2)):
        workdir = tmp_path / f"{devices}-{cut}"
        arguments = [sys.executable, "-c", PROGRAM, str(workdir), CONFIGS, str(cut)]
        env = os.environ | virtual_devices(devices)
        subprocess.run(arguments, env=env, check=True, cwd=pathlib.Path(CONFIGS).parents[1])
        files = sorted((workdir / "evaluation").glob("*.png"))
        pictures[devices, cut] = np.stack([np.asarray(Image.open(file)).astype(int) for file in files])
    one = pictures.pop((1, 1))
    assert len(one) == 16 and one.std() > 20
    for others in pictures.values():
        apart = np.abs(others - one)
        assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3
