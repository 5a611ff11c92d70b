import io
import sys

import jax
import numpy as np
import pytest

from mixgrpo_jax.runtime import metrics, progress
from tests.python import run_program


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """A screen whose signs are given by hand, to the standard output of the test."""
    made = progress._Screen()
    monkeypatch.setattr(made, "speaks", True)
    monkeypatch.setattr(made, "watch", lambda: None)
    monkeypatch.setattr(progress, "_screen", made)
    return made


def test_a_log_gets_a_line_once_nothing_was_said_for_a_while(screen, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    def after(seconds):
        clock[0] += seconds
        screen.sign()
        return capsys.readouterr().out

    progress.say("begun")
    assert after(50) == "begun\n", "nothing is being done"
    for iteration in progress.over(range(2, 5), "iteration", 5, start=2):
        with progress.doing("updating the policy") as task:
            task.begun = clock[0]
            progress.say(f"{iteration} is done")
            assert after(progress.SILENCE - 1) == f"{iteration} is done\n"
            assert after(1.5) == f"  iteration {iteration + 1}/5: updating the policy, 4 s\n"
            progress.compiling("update_policy")
            assert after(5) == f"  iteration {iteration + 1}/5: updating the policy: compiling update_policy, 5 s\n"
            progress.compiling(None)
            assert after(progress.SLOW - 10).endswith(", 179 s\n")
            assert after(progress.LONG - 1) == "" and after(1).endswith(", 209 s\n")
    assert screen.tasks == []


def test_a_terminal_has_one_line_that_is_written_over(screen, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with progress.doing("drawing " + 500 * "."):
        screen.sign()
        status = sys.stdout.getvalue()
        assert status.startswith(progress.ERASE + "drawing ...") and status.endswith(".\r") and len(status) < 200
        progress.say("a line that stays")
        assert sys.stdout.getvalue() == status + progress.ERASE + "a line that stays\n"
        screen.sign()
    assert sys.stdout.getvalue().endswith(progress.ERASE)


def test_process_0_alone_speaks_and_what_fails_leaves_nothing_behind(screen, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    with pytest.raises(KeyError):
        for _ in progress.over("ab", "reading", 2):
            with progress.doing("more"):
                raise KeyError
    assert screen.tasks == []
    progress.speaks(False)
    with progress.doing("drawing"):
        progress.say("line")
        screen.sign()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert not progress._Screen().speaks


def test_what_is_compiled_has_its_name(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "compiling", said.append)

    def twice_and_one(x):
        return 2 * x + 1

    jax.jit(twice_and_one)(np.float32(3))
    assert said == ["twice_and_one", None] and metrics.compilations("twice_and_one") == 1


def test_a_program_ends_while_a_sign_of_life_is_given():
    """Its loop was left by an error whose frames hold each other, so that Python closes it after its threads."""
    run_program("""
        import time
        from mixgrpo_jax.runtime import progress
        def sign():
            with progress._screen.lock:
                time.sleep(1.5)
        progress._screen.sign = sign
        iterations = progress.over(range(3), "iteration", 3)
        next(iterations)
        cycle = [iterations]
        cycle.append(cycle)
        del iterations, cycle
        time.sleep(0.7)
    """)
