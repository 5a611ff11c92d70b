"""Two real processes of four devices each, on loopback, train as one process of eight devices does."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.kills import arrays
from mixgrpo_jax.runtime import distributed
from mixgrpo_jax.runtime.checkpoint import Checkpoints
from mixgrpo_jax.runtime.mesh import virtual_devices

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys
from mixgrpo_jax import config as configs, evaluate, sample, train
from mixgrpo_jax.runtime import distributed

distributed.initialize()
workdir, folder, rank, off_policy = sys.argv[1:]
config = configs.load("mixgrpo", "configs/any.py")
config.model.folder, config.model.lora.rank = folder, int(rank)
config.one_step_off_policy = bool(int(off_policy))
config.iterations, config.checkpoint.every = 3, 2
config.mesh.data, config.mesh.fsdp = 2, -1
config.batch.prompts, config.batch.group, config.batch.updates, config.batch.micro_batch = 4, 4, 2, 1
config.batch.decode = 1
config.plan.num_steps, config.plan.length, config.plan.iterations_per_window = 3, 1, 1
config.evaluation.prompts, config.evaluation.batch, config.evaluation.num_steps = 6, 4, 2
config.rewards, config.watched = dict(colour=1.0), ("ocr",)
train.train(config, workdir)
if config.model.lora.rank:
    scores = evaluate.evaluate(config, workdir, against="base", samples=2)
    assert 0 < scores["colour"] < 1 and scores["diversity/latents"] > 0
    assert sample.sample(config, workdir, ["a red sign that says 1 in blue"] * 3).shape == (3, 16, 48, 3)
"""

RESAVE = """
import sys
import jax
from mixgrpo_jax import config as configs, train
from mixgrpo_jax.engine.loading import host_state, mesh_of, restore_run
from mixgrpo_jax.runtime import distributed
from mixgrpo_jax.runtime.checkpoint import Checkpoints, finished

distributed.initialize()
workdir, target, folder = sys.argv[1:]
config = configs.load("mixgrpo", "configs/any.py")
config.model.folder, config.mesh.data, config.mesh.fsdp = folder, 1, -1
settings = configs.resolve(config)
mesh = mesh_of(settings)
with jax.set_mesh(mesh):
    parts, collector, held_out, state = train._set_up(settings, mesh)
    source = Checkpoints(workdir)
    found, planned = restore_run(source, state, settings.planner.initial(), parts.table)
    host = host_state(planned) | {"monitors": source.restore_host()["monitors"]}
    assert jax.tree.leaves(found.params)[0].sharding.num_devices == jax.device_count()
    checkpoints = Checkpoints(target, every=1)
    checkpoints.save(finished(planned.iteration, found, host), force=True)
    checkpoints.close()
"""

SCORING = """
import jax, numpy as np
from mixgrpo_jax.rewards.contract import Reward, Score
from mixgrpo_jax.rewards.scoring import score_chunks
from mixgrpo_jax.runtime import distributed, mesh as meshes

distributed.initialize()
mesh = meshes.make_mesh({"data": -1})
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (16, 4, 4, 3)).astype(np.uint8)
spread = jax.make_array_from_callback(images[:8].shape, meshes.batch_sharding(mesh, 8), lambda at: images[:8][at])
seen = []

def score(images, prompts, metadata):
    seen.extend(prompts)
    x = np.asarray(images, np.float32)
    return Score(x.mean((1, 2, 3)), x.mean((2, 3)))

rewards = [Reward("spots", "host", score), Reward("plain", "device", lambda images, *_: images[:, 0, 0, 0])]
rows = np.arange(8), np.arange(15, 7, -1)
texts, nothing = [str(i) for i in range(16)], [{}] * 16
held = distributed.map_rows(lambda items: score_chunks(rewards, items), [spread, images[8:]], rows, texts, nothing)
images = np.concatenate([images[:8], images[:7:-1]]).astype(np.float32)
np.testing.assert_array_equal(held["spots"].value, images.mean((1, 2, 3)))
np.testing.assert_array_equal(held["spots"].map, images.mean((2, 3)))
np.testing.assert_array_equal(held["plain"].value, images[:, 0, 0, 0])
assert list(held) == ["spots", "plain"] and held["plain"].map is None
print(len(seen), "scored here")
"""


def run(workdir, folder, processes, rank=0, off_policy=False):
    """Train in `workdir` by so many processes of eight devices together; returns its metrics but what a clock says."""
    said = start(PROGRAM, workdir, processes, str(workdir), str(folder), str(rank), str(int(off_policy)))
    return lines(workdir), said


def start(program, workdir, processes, *arguments, devices=8):
    """What each of so many processes of some devices together says of a program; their logs are beside `workdir`."""
    command = [sys.executable, "-c", program, *arguments]
    started = []
    try:
        for index, told in enumerate(distributed.on_loopback(processes)):
            env = os.environ | virtual_devices(devices // processes) | told
            log = (pathlib.Path(workdir).parent / f"{pathlib.Path(workdir).name}-{index}.log").open("w")
            started.append((subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log), log.name))
        for process, log in started:
            assert process.wait() == 0, pathlib.Path(log).read_text()[-4000:]
    finally:
        for process, _ in started:
            process.send_signal(signal.SIGKILL)  # JAX takes SIGTERM for a notice of preemption
    return [pathlib.Path(log).read_text() for _, log in started]


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in text]


def assert_close(ours, theirs):
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for a, b in zip(ours, theirs):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), (name, a["iteration"])


@pytest.fixture(scope="module")
def straight(small_policy, tmp_path_factory):
    """{processes: workdir} of uninterrupted runs, and what the processes said."""
    workdirs = {processes: tmp_path_factory.mktemp("straight") / str(processes) for processes in (1, 2)}
    return workdirs, {processes: run(workdir, small_policy, processes)[1] for processes, workdir in workdirs.items()}


def test_two_processes_train_as_one(straight):
    workdirs, said = straight
    two = lines(workdirs[2])
    assert [line["iteration"] for line in two] == [0, 1, 2, 3]
    assert two[-1]["compilations"] == 2
    assert 0 < two[1]["reward/colour/mean"] < 1 and two[1]["reward/colour/std"] > 0
    assert_close(two, lines(workdirs[1]))
    with np.load(workdirs[1] / "before.npz") as one, np.load(workdirs[2] / "before.npz") as both:
        assert np.abs(one["images"].astype(int) - both["images"]).max() <= 1
    assert "before_after.png" in {path.name for path in workdirs[2].iterdir()}
    assert "held-out" in said[2][0] and "samples an iteration" in said[2][0]
    assert "held-out" not in said[2][1] and "samples an iteration" not in said[2][1]  # the second says nothing


@pytest.mark.parametrize("processes", [1, 2])
def test_each_process_scores_its_rows_and_all_have_values_and_maps(tmp_path, processes):
    said = start(SCORING, tmp_path / "scores", processes)
    assert [text.splitlines()[-1] for text in said] == [f"{16 // processes} scored here"] * processes


def test_a_run_goes_on_by_another_number_of_processes(straight, small_policy, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(straight[0][2], workdir)
    shutil.rmtree(workdir / "checkpoints" / "3")
    resumed, _ = run(workdir, small_policy, 1)
    assert_close(resumed, lines(straight[0][2]))


def test_a_state_is_the_same_bits_on_one_device_on_eight_on_two_processes_and_on_one_again(
    straight, small_policy, tmp_path
):
    chain = [straight[0][2]]
    for devices, processes in ((1, 1), (8, 1), (8, 2), (1, 1)):
        chain.append(tmp_path / f"{len(chain)}")
        start(RESAVE, chain[-1], processes, *map(str, (*chain[-2:], small_policy)), devices=devices)
    first, *others = [arrays(workdir / "checkpoints" / "3" / "state") for workdir in chain]
    assert len(first) > 100
    for state in others:
        assert state.keys() == first.keys()
        assert all(array.tobytes() == first[path].tobytes() for path, array in state.items())
    hosts = [Checkpoints(workdir).restore_host() for workdir in chain]
    assert all(host == hosts[0] for host in hosts)


def test_two_processes_train_adapters_evaluate_and_sample(small_policy, tmp_path):
    log, _ = run(tmp_path / "lora", small_policy, 2, rank=2)
    assert [line["iteration"] for line in log] == [0, 1, 2, 3]
    assert len((tmp_path / "lora" / "evaluation" / "scores.csv").read_text().splitlines()) == 1 + 6 * 2
    assert len(list((tmp_path / "lora" / "samples").glob("00?.png"))) == 3


def test_off_policy_two_processes_go_on_where_they_stopped(small_policy, tmp_path):
    log, _ = run(tmp_path / "off", small_policy, 2, off_policy=True)
    assert [line["iteration"] for line in log] == [0, 1, 2, 3]
    assert log[-1]["ratio/max_deviation"] > log[1]["ratio/max_deviation"]
    shutil.rmtree(tmp_path / "off" / "checkpoints" / "3")
    resumed, _ = run(tmp_path / "off", small_policy, 2, off_policy=True)
    assert resumed[-1].pop("compilations") == 1  # its rollout was in the checkpoint, and only the update is left
    assert log[-1].pop("compilations") == 2
    assert resumed == log
