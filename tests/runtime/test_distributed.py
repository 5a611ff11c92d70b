"""What the environment tells of the run's processes; what two real ones do is in test_two_processes.py."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mixgrpo_jax.runtime import distributed

NAMES = [
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    *("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"),
    *("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "TPU_SKIP_MDS_QUERY"),
]
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
EXPLICIT = ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
STEP = {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "gpu[1-2]"}
DETECT = {}  # JAX is called without arguments, and finds out by itself


@pytest.fixture
def initialise(monkeypatch):
    """`initialise(tpu, **environment)`: the arguments that JAX's own function gets, None if it is not called."""

    def run(tpu=False, **environment):
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "_finds_tpu", lambda: tpu)
        distributed.initialize()
        return calls[0] if calls else None

    return run


@pytest.mark.parametrize(
    ("tpu", "environment", "expected"),
    [
        (False, {}, None),
        (False, EXPLICIT, {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 2}),
        (False, {"JAX_NUM_PROCESSES": "1"}, None),
        (True, EXPLICIT | {"JAX_NUM_PROCESSES": "1"}, None),
        (False, {"SLURM_NTASKS": "1"}, None),
        (False, STEP, DETECT),
        (False, STEP | ADDRESS, DETECT),
        (False, STEP | {"JAX_NUM_PROCESSES": "1"}, None),
        (False, {"OMPI_COMM_WORLD_SIZE": "2"}, DETECT),
        (True, {}, DETECT),  # a TPU VM, which its metadata server tells the rest
        (True, {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (True, {"TPU_WORKER_HOSTNAMES": "a,b"}, DETECT),
        (True, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (True, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, DETECT),
        (False, {"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # leftovers: there is no TPU
    ],
)
def test_several_processes_are_joined_and_one_is_left_alone(initialise, tpu, environment, expected):
    silence = {"heartbeat_timeout_seconds": distributed.HEARTBEAT}
    assert initialise(tpu, **environment) == (None if expected is None else expected | silence)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ADDRESS, "JAX_COORDINATOR_ADDRESS=10.0.0.1:1234, but JAX_NUM_PROCESSES and JAX_PROCESS_ID not set: set them"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2, but JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not set"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID=0, but JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES not set"),
        (EXPLICIT | {"JAX_PROCESS_ID": ""}, "but JAX_PROCESS_ID not set"),
        (
            EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "gpu1"},
            "JAX_COORDINATOR_ADDRESS='gpu1' cannot be read.*10.0.0.1:1234",
        ),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' cannot be read"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 with JAX_NUM_PROCESSES=4: .* from 0 to 3"),
        ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS=8, but SLURM_STEP_NODELIST is not set.*srun.*JAX_NUM_PROCESSES=1"),
    ],
)
def test_half_told_is_refused_by_name(initialise, environment, message):
    with pytest.raises(ValueError, match=message):
        initialise(**environment)


def test_here_there_is_no_tpu():
    assert not distributed._finds_tpu()


def test_one_process_scores_and_gathers_as_if_there_were_none():
    chunks, seen = [np.zeros((2, 2, 2, 3), np.uint8), np.ones((1, 2, 2, 3), np.uint8)], []

    def score(items):
        for images, *columns in items:
            seen.append((images, *columns))
        return {"a": np.array([0.0, 2.0, 1.0])}

    rows = [np.array([0, 2]), np.array([1])]
    assert distributed.map_rows(score, chunks, rows, ["x", "y", "z"])["a"].tolist() == [0, 1, 2]
    assert [images is chunk for (images, _), chunk in zip(seen, chunks)] == [True, True]
    assert [column for _, column in seen] == [["x", "z"], ["y"]]
    assert distributed.gather(jax.numpy.arange(3)).tolist() == [0, 1, 2]


def test_rows_of_any_shape_are_put_in_their_places():
    chunks, rows = [np.zeros((2, 1)), np.zeros((1, 1))], [np.array([0, 2]), np.array([1])]

    def score(items):
        names = [name for _, column in items for name in column]
        assert names == ["x", "z", "y"]
        return {"b": (np.arange(3), np.arange(6).reshape(3, 2)), "a": (np.arange(3), None)}

    scores = distributed.map_rows(score, chunks, rows, ["x", "y", "z"])
    assert list(scores) == ["b", "a"]
    assert scores["a"][1] is None and scores["a"][0].tolist() == [0, 2, 1]
    assert scores["b"][1].tolist() == [[0, 1], [4, 5], [2, 3]]
    assert scores["b"][0].dtype == scores["b"][1].dtype == np.float32


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_has_all_rows_of_all_arrays(monkeypatch, processes):
    images, sent = np.arange(5), []

    def gather(own):
        sent.append(own)
        return jax.tree.map(lambda *all_: np.stack(all_), *sent)

    def score(items):
        own = np.concatenate([images for images, _ in items])
        return {"value": own, "map": own[:, None] * [1, 10]}

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    for index in range(processes):  # the last one finds what the others sent
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        scores = distributed.map_rows(score, [images], [np.array([4, 3, 2, 1, 0])], list("abcde"))
        assert np.isnan(scores["value"]).any() == (index < processes - 1)
    assert scores["value"].tolist() == [4, 3, 2, 1, 0]
    assert scores["map"].tolist() == [[4, 40], [3, 30], [2, 20], [1, 10], [0, 0]]


@pytest.mark.parametrize(("rows", "processes"), [(6, 4), (2, 3), (1, 1)])
def test_every_row_has_a_process_and_every_process_a_row(monkeypatch, rows, processes):
    images = np.arange(rows)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    taken = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        positions = distributed._own_rows(images)
        assert positions.size and (distributed._take(images, positions) == images[positions]).all()
        taken.extend(positions)
    assert set(taken) == set(range(rows))


FAILING = """
import sys
import jax
from jax.experimental import multihost_utils
from mixgrpo_jax.runtime import distributed

who, how = sys.argv[1:]
with distributed.joined():
    multihost_utils.sync_global_devices("start")
    if jax.process_index() == int(who):
        exec(how)
    if who != "2":
        multihost_utils.sync_global_devices("end")
print("left")
"""


@pytest.mark.parametrize(("who", "how"), [(2, ""), (1, "raise KeyError('tag')"), (0, "sys.exit('a line')")])
def test_a_process_that_fails_ends_the_others_which_say_why(who, how):
    command = [sys.executable, "-c", FAILING, str(who), how]
    started = [
        subprocess.Popen(command, env=os.environ | told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for told in distributed.on_loopback(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]  # JAX's own barrier takes 300 s
    finally:
        for process in started:
            process.kill()
    for index, (process, (out, err)) in enumerate(zip(started, said)):
        if who == 2:
            assert process.returncode == 0 and out.endswith("left\n")
            continue
        why = {1: "process 1 of 2 failed: KeyError: 'tag'", 0: "process 0 of 2 failed: SystemExit: a line"}[who]
        assert process.returncode == 1 and err.splitlines()[-1].endswith(why)
        assert index != who or ("Traceback" in err) == (who == 1)
