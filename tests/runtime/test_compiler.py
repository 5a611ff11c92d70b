"""Options of compiled programs, by the kind of device."""

import jax
import pytest

from mixgrpo_jax.runtime import compiler


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
