"""Runs that are told to stop, or find their files damaged: nothing is lost, and nothing goes wrong in silence."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

from mixgrpo_jax import train
from mixgrpo_jax.runtime.checkpoint import Checkpoints, Damaged, finished, host_sum, sums
from mixgrpo_jax.runtime.files import locked
from mixgrpo_jax.runtime.preemption import Stopped
from tests import test_train
from tests.python import run_program
from tests.test_train import brightness, fast, lines

TOLD = 3  # the iteration in which a run is told to stop


@pytest.fixture(scope="module")
def straight(small_policy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    train.train(rare(small_policy), workdir)
    return workdir


def rare(folder):
    """A run that is saved at its first iteration and its last, and always has samples drawn ahead."""
    config = fast(folder, 4, one_step_off_policy=True)
    config.checkpoint.every = 25
    return config


def stop_in(phase, number, patch):
    """Tell this process to stop in a phase of an iteration, once."""
    calls = []

    def told(program):
        def call(*args):
            calls.append(0)
            result = program(*args)
            if len(calls) == TOLD:
                os.kill(os.getpid(), number)
            return result

        return call

    if phase == "reward":
        patch.setattr(train.Collector, "learn", told(train.Collector.learn))
    else:
        make = train.make_programs

        def made(*args):
            programs = make(*args)
            return programs._replace(**{phase: told(getattr(programs, phase))})

        patch.setattr(train, "make_programs", made)


@pytest.mark.parametrize(
    ("phase", "number", "saved"),
    [
        ("reward", signal.SIGTERM, TOLD - 1),
        pytest.param("update", signal.SIGINT, TOLD, marks=pytest.mark.slow),
        pytest.param("rollout", signal.SIGTERM, TOLD - 2, marks=pytest.mark.slow),  # which is one ahead
    ],
)
def test_a_run_that_is_told_to_stop_saves_what_is_finished_and_goes_on(
    small_policy, straight, tmp_path, monkeypatch, capfd, phase, number, saved
):
    config = rare(small_policy)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        stop_in(phase, number, patch)
        train.train(config, tmp_path)
    assert stopped.value.code == 128 + number and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    said = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: stopped after " in said and f"iteration {saved} is saved" in said
    assert [line["iteration"] for line in lines(tmp_path)] == list(range(saved + 1))
    train.train(config, tmp_path)
    assert f"Resumed at iteration {saved}" in capfd.readouterr().out
    assert uncounted(tmp_path) == uncounted(straight)
    jax.tree.map(np.testing.assert_array_equal, tree_of(tmp_path), tree_of(straight))


def uncounted(workdir):
    """The log without compilations: a run that finds its samples in the checkpoint may have no rollout to compile."""
    return [{name: value for name, value in line.items() if name != "compilations"} for line in lines(workdir)]


def tree_of(workdir):
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints._manager.restore(checkpoints.latest)["state"]
    finally:
        checkpoints.close()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(small_policy, straight, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    biggest = max((workdir / "checkpoints" / "4" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    flip(biggest, biggest.stat().st_size * 4)
    (workdir / "before.npz").write_bytes(b"PK")
    train.train(rare(small_policy), workdir)
    said = capfd.readouterr()
    assert (
        "checkpoints/4 is damaged" in said.err
        and "set aside as 4.damaged, and the run goes on from iteration 1" in (said.err)
    )
    assert "Resumed at iteration 1" in said.out and "before.npz cannot be read" in said.err
    assert lines(workdir) == lines(straight)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "4", "4.damaged"}


def test_a_checkpoint_that_lacks_something_is_incomplete_and_the_last_one_is_not_passed_over(tmp_path):
    tree = {"a": np.ones(3, np.float32)}
    checkpoints = Checkpoints(tmp_path, 1)
    for iteration in (1, 2):
        checkpoints.save(finished(iteration, tree, {}))
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "host")
    for read in (lambda: checkpoints.restore(tree), checkpoints.restore_host):
        with pytest.raises(Damaged, match=r"checkpoints/\d is damaged or incomplete: ") as damaged:
            read()
        if checkpoints.latest == 2:
            checkpoints.set_aside(str(damaged.value))
    with pytest.raises(Damaged, match=r"set aside as 1.damaged, and there is none before it: put a copy in its place"):
        checkpoints.set_aside(str(damaged.value))
    checkpoints.close()


def flip(path, bit):
    """Turn one bit of a file round."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_one_bit_is_noticed_or_does_no_harm(tmp_path):
    noticed = flips(tmp_path, 25)
    assert noticed > 5


def flips(folder, count):
    """Of so many checkpoints with one bit turned round, those that are refused; the others are what was saved."""
    rng = np.random.default_rng(0)
    tree = {"params": {"a": rng.normal(size=(60, 70)).astype(np.float32)}, "step": np.array(7, np.int32)}
    host, refused = {"version": 3, "planned": {"iteration": 1}}, 0
    checkpoints = Checkpoints(folder, 1)
    checkpoints.save(finished(1, tree, host))
    checkpoints.close()
    files = [path for path in (folder / "checkpoints" / "1").rglob("*") if path.is_file()]
    sizes = np.array([path.stat().st_size for path in files])
    for turn in range(count):
        path = files[turn % len(files) if turn % 2 else int(rng.choice(len(files), p=sizes / sizes.sum()))]
        if not path.stat().st_size:
            continue
        whole = path.read_bytes()
        flip(path, int(rng.integers(8 * len(whole))))
        checkpoints = Checkpoints(folder)
        try:
            assert checkpoints.restore_host() == host
            jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(tree), tree)
        except ValueError as error:
            assert str(folder) in str(error)
            refused += 1
        finally:
            checkpoints.close()
        path.write_bytes(whole)
    return refused


def test_a_sum_tells_changes_and_swaps_and_is_the_same_on_the_host():
    x = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    for array in (x, x.astype(jax.numpy.bfloat16), np.arange(6)):
        assert host_sum(np.asarray(array)) == int(sums(array)[""])
    swapped, changed = x.copy(), x.copy()
    swapped[0, 0, :2] = x[0, 0, 1::-1]
    changed.view(np.uint32)[6, 4, 2] ^= 1
    assert len({host_sum(array) for array in (x, swapped, changed, x.reshape(-1))}) == 3


def test_a_save_that_fails_stops_the_run_at_the_next_iteration_in_one_line(small_policy, tmp_path, monkeypatch):
    failing = []

    def check(self):
        if failing:
            raise ValueError("OUT_OF_RANGE: Failed to write 9 bytes: No space left on device\nmore\nand more")

    def score(images, prompts, metadata):
        if len(images) == 8:
            failing.append(0)
        return brightness(images, prompts, metadata)

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.wait_until_finished", check)
    monkeypatch.setattr(test_train, "during", [score])
    config = fast(small_policy, 4)
    config.checkpoint.every = 25
    message = (
        r"the checkpoint of iteration \d could not be written to .*checkpoints, which keeps .*No space left on .*e$"
    )
    with pytest.raises(OSError, match=message):
        train.train(config, tmp_path)
    assert lines(tmp_path)[-1]["iteration"] < 3


def test_a_file_system_that_is_full_is_told_before_the_next_save_is_due(tmp_path):
    program = """
    import resource, signal, sys, time
    import numpy as np
    from mixgrpo_jax.runtime.checkpoint import Checkpoints, finished

    tree = {str(i): np.random.default_rng(i).normal(size=2**16).astype(np.float32) for i in range(20)}
    checkpoints = Checkpoints(sys.argv[1], 1000)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    checkpoints.save(finished(1, tree, {}))
    sys.stderr.close()
    sys.stderr = sys.stdout
    for iteration in range(2, 600):
        time.sleep(0.1)
        try:
            checkpoints.save(finished(iteration, tree, {}))
        except OSError as error:
            print(error)
            break
    """
    said = run_program(program, tmp_path).splitlines()
    assert len(said) == 1 and "the checkpoint of iteration 1 could not be written to" in said[0], said[:9]
    assert "which keeps none: " in said[0] and "File too large" in said[0]


def test_a_second_run_in_a_workdir_is_refused_until_the_first_is_gone(tmp_path):
    program = """
    import os, sys
    from mixgrpo_jax.runtime.files import locked
    try:
        with locked(sys.argv[1]):
            print("mine")
            os._exit(0)
    except BlockingIOError as error:
        print(error)
    """
    with locked(tmp_path):
        said = run_program(program, tmp_path)
        assert f"in use by process {os.getpid()} on " in said and "wait for its end" in said
    assert run_program(program, tmp_path) in ("mine\n", "")
    with locked(tmp_path):
        pass


def test_checkpoints_that_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, keep=1, keep_every=6, best="held_out/strict/mean")
    for iteration, score in enumerate([0.1, 0.2, 0.9, 0.8, 0.3, 0.1, 0.2, 0.5, 0.1, 0.4], 1):
        metrics = {"held_out/strict/mean": score} if iteration % 4 == 0 else {}
        checkpoints.save(finished(iteration, {"a": np.ones(2)}, {}, metrics=metrics))
    checkpoints.close()
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {4, 6, 10}  # the best, each sixth, the last
