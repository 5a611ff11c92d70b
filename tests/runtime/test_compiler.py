"""Options of compiled programs, by the kind of device."""

import jax
import pytest

from mixgrpo_jax.runtime import compiler
from tests.python import run_program


@pytest.fixture
def known(monkeypatch):
    compiler._known.cache_clear()
    yield lambda options: monkeypatch.setitem(compiler.KINDS, "cpu", options)
    compiler._known.cache_clear()


def test_a_cpu_has_the_compilers_defaults():
    assert compiler.options(jax.devices()) == {}
    assert compiler.describe(jax.devices()) == "compiler options for cpu: its defaults"


def test_what_the_compiler_does_not_take_is_left_out_aloud(known):
    known({"xla_no_such": "1", "xla_gpu_enable_pipelined_all_gather": True, "xla_cpu_use_fusion_emitters": "maybe"})
    with pytest.warns() as warned:
        assert compiler.options(jax.devices()) == {"xla_gpu_enable_pipelined_all_gather": True}
    assert sorted(str(warning.message) for warning in warned) == [
        "cpu's compiler does not take xla_cpu_use_fusion_emitters=maybe",
        "cpu's compiler does not take xla_no_such=1",
    ]


def test_a_gpus_options_are_known(known):
    known(compiler.GPU)  # one table of options for both
    assert compiler.options(jax.devices()) == compiler.GPU


KEPT = """
import collections, sys
import jax
import jax.numpy as jnp
from mixgrpo_jax.runtime import compiler
from tests.python import run_program
compiler.KEPT_FROM = 0.0
compiler.keep_beside(sys.argv[1])
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **about: seen.update([event.split("/")[-1]]))
print(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((4, 4))), seen["cache_hits"], seen["cache_misses"])
"""


def test_programs_are_kept_beside_the_workdir_and_whole(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    first = run_program(KEPT, "runs/a", cwd=tmp_path).split()
    kept = {path.name for path in (tmp_path / "runs" / "jax_cache").iterdir()}
    assert first[1] == "0" and len(kept) == int(first[2]) > 0 and all(name.endswith("-cache") for name in kept)
    again = run_program(KEPT, "runs/b", cwd=tmp_path).split()
    assert again == [first[0], first[2], "0"]
    run_program(KEPT, "runs/c", cwd=tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "there"))
    assert (tmp_path / "there").is_dir() and kept == {path.name for path in (tmp_path / "runs/jax_cache").iterdir()}
