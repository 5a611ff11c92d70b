"""Runs, features and exports in a bucket, as in a folder; the bucket is on loopback."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mixgrpo_jax import evaluate, train
from mixgrpo_jax.convert import convert
from mixgrpo_jax.data import features
from mixgrpo_jax.engine import workdir as workdirs
from mixgrpo_jax.engine.held_out import Assessment
from mixgrpo_jax.models import flux
from mixgrpo_jax.models.lora_config import LoraConfig
from mixgrpo_jax.runtime import files, metrics
from mixgrpo_jax.runtime.checkpoint import Checkpoints, Damaged, finished
from tests import bucket as buckets
from tests import test_convert
from tests.data import test_features
from tests.python import ROOT
from tests.test_interrupted import rare, tree_of
from tests.test_train import fast, lines

pytestmark = buckets.needs_clients
URL = "gs://bucket"


@pytest.fixture(scope="module")
def bucket():
    with buckets.served() as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield bucket


def test_paths_and_files(bucket, tmp_path):
    folder = files.place(f"{URL}/files")
    assert str(folder / "a" / "x.json") == f"{URL}/files/a/x.json" == str(files.place(str(folder / "a/x.json")))
    assert files.in_bucket(folder) and not files.in_bucket(files.place(tmp_path))
    assert not folder.exists()
    for place in (folder, files.place(tmp_path)):
        with files.replaced(place / "x.json") as draft:
            draft.write_text("whole")
        with pytest.raises(KeyboardInterrupt), files.replaced(place / "x.json") as draft:
            draft.write_text("a part")
            raise KeyboardInterrupt
        for line in ("one", "two"):
            files.append(place / "log", line)
        assert (place / "x.json").read_text() == "whole" and files.size(place / "x.json") == 5
        assert (place / "log").read_text() == "one\ntwo\n"
        assert sorted(path.name for path in place.iterdir()) == ["log", "x.json"]
    files.upload(tmp_path, folder / "copy", last="log")
    assert bucket.requests[-1] == ("POST", "files/copy/log") or bucket.objects["files/copy/log"][0] == b"one\ntwo\n"
    assert bucket.objects["files/copy/x.json"][1] < bucket.objects["files/copy/log"][1]


def test_urls_of_other_kinds_and_clients_that_lack_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"'ftp://a/b' is no URL that is known here: give a folder, or .*gs://"):
        files.place("ftp://a/b")
    monkeypatch.setitem(files.CLIENTS, "gs", ("no_such_client",))
    with pytest.raises(ImportError, match=r"'gs://a/b' needs the extra gcs .*no_such_client.*mixgrpo_jax\[gcs\]"):
        files.place("gs://a/b")


def test_a_lock_in_a_bucket_is_a_lease(bucket, monkeypatch, capfd):
    monkeypatch.setattr(files, "LEASE", 2.0)
    workdir, name = f"{URL}/locked", "locked/.lock"
    with files.locked(workdir) as check:
        holder = f"process {os.getpid()} on "
        with pytest.raises(BlockingIOError, match=rf"'{workdir}' is in use by {holder}.*whose lease now lasts to"):
            files.locked(workdir).__enter__()
        assert f"waiting for the end of {holder}" in capfd.readouterr().err
        check()
    assert name not in bucket.objects  # at the end it is given back

    dead = {"holder": "process 1 on a host that is gone", "until": time.time() + 0.5, "id": "dead"}
    bucket.write(name, json.dumps(dead).encode(), {})
    with files.locked(workdir) as check:
        assert time.time() > dead["until"] and b"is gone" not in bucket.objects[name][0]
        time.sleep(2.5)
        check()  # it has been renewed
        bucket.write(name, json.dumps(dead | {"holder": "another run"}).encode(), {})
        time.sleep(1.0)
        with pytest.raises(RuntimeError, match="the lock was lost to another run, and nothing more is written"):
            check()
    assert b"another run" in bucket.objects[name][0]

    with files.locked(f"{URL}/away") as check:
        monkeypatch.setattr(bucket, "refuses", buckets.re.compile("away"))
        time.sleep(2.5)
        with pytest.raises(RuntimeError, match="as it could not be renewed"):
            check()
    with pytest.raises(OSError, match=r"workdir='gs://bucket/away' cannot be locked: PERMISSION_DENIED"):
        files.locked(f"{URL}/away").__enter__()


def test_metrics_are_whole_before_a_commit_and_after_a_while(bucket, monkeypatch):
    checks, path = [], "metrics/metrics.jsonl"
    writer = metrics.MetricWriter(f"{URL}/metrics", check=lambda: checks.append(0))

    def written():
        return [line["iteration"] for line in metrics.read(writer.path)]

    for iteration in range(3):
        writer.write(iteration, {"a": 0.5})
    before = bucket.objects[path][1]
    assert written() == []
    writer.flush()
    assert written() == [0, 1, 2] and bucket.objects[path][1] != before
    writer.flush()  # nothing waits
    assert len(checks) == 2
    monkeypatch.setattr(metrics, "UPLOADS", 0.0)
    writer.write(3, {"a": np.nan})
    assert written() == [0, 1, 2, 3]
    again = metrics.MetricWriter(f"{URL}/metrics", resume_at=1)
    assert written() == [0, 1]
    again.write(2, {})
    again.close()
    assert written() == [0, 1, 2]


def test_pictures_and_scores(bucket):
    path = files.place(f"{URL}/scores/before.npz")
    Assessment(np.ones((1, 2, 2, 3), np.uint8), {"ocr": np.array([0.5, np.nan])}).save(path)
    np.testing.assert_array_equal(Assessment.load(path).scores["ocr"], [0.5, np.nan])
    assert Assessment.load(path.parent / "none.npz") is None


def test_checkpoints_and_one_that_is_damaged(bucket, capfd):
    workdir, tree = f"{URL}/saved", {"a": jax.numpy.arange(6.0)}
    assert Checkpoints(workdir).latest is None
    checkpoints, order = Checkpoints(workdir, 1, keep=2), []
    checkpoints.before.append(lambda: order.append(checkpoints.latest))
    for iteration in (1, 2, 3):
        checkpoints.save(finished(iteration, {"a": iteration * tree["a"]}, {"at": iteration}))
    checkpoints.close()
    assert order == [None, 1, 2]
    host = next(name for name in bucket.objects if name.startswith("saved/checkpoints/3/host/metadata"))
    bucket.write(host, bucket.objects[host][0].replace(b'"at"', b'"to"'), {})
    again = Checkpoints(workdir, 1, keep=2)
    with pytest.raises(Damaged, match="checkpoints/3 is damaged: its host state") as damaged:
        again.restore_host()
    again.set_aside(str(damaged.value))
    assert "set aside as 3.damaged, and the run goes on from iteration 2" in capfd.readouterr().err
    assert again.restore_host() == {"at": 2}
    np.testing.assert_array_equal(again.restore(tree)["a"], 2 * tree["a"])
    folders = {name.split("/")[2] for name in bucket.objects if name.startswith("saved/checkpoints/")}
    assert folders == {"2", "3.damaged"}
    again.close()


def test_features_are_written_and_read(bucket):
    folder = files.place(f"{URL}/features")
    split = test_features.write(folder)
    assert split.missing() == [] and features.splits(folder) == [split]
    dataset = features.load("train", f"{URL}/features")
    assert len(dataset) == 10
    for i, expected in enumerate(test_features.elements()):
        test_features.assert_same(dataset[i], expected)


@pytest.mark.slow
def test_a_run_goes_on_and_is_evaluated(bucket, small_policy, capfd):
    workdir = f"{URL}/run"
    train.train(fast(small_policy, 1), workdir)
    config = fast(small_policy, 2)
    config.evaluation.batch = 1
    train.train(config, workdir)
    assert f"Resumed at iteration 1, from {workdir}/checkpoints/1" in capfd.readouterr().out
    assert [line["iteration"] for line in lines(workdir)] == [0, 1, 2]
    assert [json.loads(line)["iteration"] for line in bucket.objects["run/history.jsonl"][0].splitlines()] == [1]
    pictures = {name.removeprefix("run/") for name in bucket.objects if name.endswith(".png")}
    assert pictures == {"before_after.png", "rewards.png"} and "run/.lock" not in bucket.objects
    assert {"run/report.html", "run/held_out/0.npz", "run/held_out/2.npz"} <= bucket.objects.keys()
    assert b'"iteration":2,"pictures":{"0"' in bucket.objects["run/report.html"][0]
    scores = evaluate.evaluate(workdirs.recorded(workdir), workdir)
    assert scores["slow"] == pytest.approx(lines(workdir)[-1]["held_out/slow/mean"], abs=1e-5)
    assert bucket.objects["run/held_out.png"][0].startswith(b"\x89PNG")


RUN = """
import sys
import jax
jax.config.update("jax_threefry_partitionable", True)
from mixgrpo_jax import train
from mixgrpo_jax.runtime import files
from tests.test_interrupted import rare
files.LEASE = 15.0
config = rare(sys.argv[2])
config.checkpoint.every = 2
train.train(config, sys.argv[1])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(bucket, small_policy, tmp_path):
    """Once as a save is under way, once behind it; what was uploaded then is whole."""
    workdir = f"{URL}/killed"
    command = [sys.executable, "-c", RUN, workdir, str(small_policy)]

    def run(until=None):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while until and process.poll() is None and until not in bucket.objects:
            time.sleep(0.01)
        if until:
            process.send_signal(signal.SIGKILL)
        said = process.communicate()[0]
        assert process.returncode == (-signal.SIGKILL if until else 0), said[-4000:]
        return said

    run("killed/checkpoints/2/host/metadata")
    assert "killed/.lock" in bucket.objects
    run("killed/checkpoints/2/commit_success.txt")
    said = run()
    assert "Resumed at iteration 2" in said and "WARNING" not in said
    train.train(rare(small_policy), tmp_path)
    assert lines(workdir) == lines(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, tree_of(workdir), tree_of(tmp_path))


def test_runs_and_models_are_converted_from_it_and_to_it(bucket, tmp_path):
    base = test_convert.save_transformer(tmp_path / "base" / "transformer")
    trained = test_convert.random_params(1)
    run = test_convert.save_run(tmp_path / "run", base, LoraConfig(), trained, {})
    files.upload(run, files.place(f"{URL}/runs/full"))
    convert(f"{URL}/runs/full", f"{URL}/exports/full", "diffusers")
    names = {name.removeprefix("exports/full/") for name in bucket.objects if name.startswith("exports/full/")}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    convert(f"{URL}/exports/full", tmp_path / "back", "orbax")
    _, params = flux.TRANSFORMER.load_folder(tmp_path / "back")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, trained)
    with pytest.raises(ValueError, match="there is nothing at gs://bucket/exports/none"):
        convert(f"{URL}/exports/none", tmp_path / "none", "orbax")
    with files.fetched(f"{URL}/exports/full/config.json") as file:
        assert json.loads(file.read_text())["_class_name"] == "FluxTransformer2DModel"
    with pytest.raises(ValueError, match=r"--target='gs://bucket/exports/full' is there already"):
        convert(f"{URL}/runs/full", f"{URL}/exports/full", "diffusers")
