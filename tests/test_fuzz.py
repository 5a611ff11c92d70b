"""Random configs, drawn by the dataclasses' types: each resolves, or is refused by a ConfigError that names a field."""

import collections
import dataclasses
import functools
import operator
import os
import re
import shutil
import types
import typing

import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax import train
from mixgrpo_jax.models.nn.attention import ATTENTION_BACKENDS
from mixgrpo_jax.models.nn.remat import REMAT
from mixgrpo_jax.rl import credit
from mixgrpo_jax.runtime import metrics
from tests.test_config import sections
from tests.test_train import fast, lines

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

DRAWS = int(os.environ.get("MIXGRPO_JAX_FUZZ", "200"))
RUNS = int(os.environ.get("MIXGRPO_JAX_FUZZ_RUNS", "4"))
NAMES = {
    "name": ("adamw", "adafactor"),
    "dtype": configs.DTYPES,
    "base": ("float32", "bfloat16", "int8"),
    "init": ("gaussian", "kaiming_uniform"),
    "remat": tuple(REMAT),
    "attention": tuple(ATTENTION_BACKENDS),
    "kernel": ("flow", "dance", "cps"),
    "solver": ("euler", "dpm_midpoint"),
    "average": ("ema", ""),
    "by": ("update", "iteration"),
    "reduce": ("mean", "sum"),
    "old_log_prob": ("auto", "rollout", "update"),
    "train_choice": ("first", "random"),
    "mean_scope": ("group", "batch"),
    "std_scope": ("group", "batch", "none"),
    "combine": tuple(credit.TABLES["combine"]),
    "shape": tuple(credit.TABLES["shape"]),
    "spread": tuple(credit.TABLES["spread"]),
}
ODD = st.sampled_from([None, True, "", "nothing", -1, 0, 10**12, 0.5, -0.5, float("nan"), float("inf"), (), (0,), {}])


def fitting(kind, name, default):
    """Values of a field's type that are likely to be right: near its default, or one of its names."""
    if name in NAMES:
        return st.sampled_from(NAMES[name])
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(st.none(), st.integers(1, 8))
    if origin is tuple:
        return st.just(default)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.sampled_from(sorted({default, max(default, 1) * 2, default + (default > 0), max(1, default // 2)}))
    if kind is float:
        return st.sampled_from([default, default / 2, default * 0.9])
    return st.just(default)


def fields(base):
    """{path: strategy} of every field of a config, by the dataclasses behind its sections and by its values."""
    found = {}
    chosen = {f"{section}:{base[section].name}": section for section in configs.TABLES}
    for path, kind in sections():
        section = chosen.get(path, path)
        if ":" in section:
            continue
        annotations = typing.get_type_hints(kind)
        for each in dataclasses.fields(kind):
            taken = not each.kw_only and each.name != "lora" and section != "data"
            if taken and each.default is not dataclasses.MISSING:
                path = f"{section}.{each.name}"
                default = functools.reduce(operator.getitem, path.split("."), base)
                found[path] = fitting(annotations[each.name], each.name, default)
    found |= {"seed": st.integers(0, 2**32 - 1), "iterations": st.integers(1, 8)}
    found |= {"one_step_off_policy": st.booleans(), "ratio_tolerance": st.sampled_from([0.0, 5e-5, 1e-2])}
    found |= {f"rewards.{name}": st.sampled_from([0.0, 0.5, 1.0]) for name in base.rewards}
    return found | {f"terms.{name}": st.sampled_from([0.0, 0.1]) for name in base.terms}


@st.composite
def changes(draw, known):
    """One to four fields of those known and their new values, of which one in four draws has an odd one."""
    paths = draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=4, unique=True))
    values = {path: draw(known[path]) for path in paths}
    if draw(st.integers(0, 3)) == 0:
        values[paths[0]] = draw(ODD)
    return values


def changed(config, values):
    """A config with these fields, as a recipe sets them; None where that is refused already."""
    for path, value in values.items():
        *names, last = path.split(".")
        section = config
        for name in names:
            section = section[name]
        try:
            section[last] = value
        except (TypeError, ValueError):
            return None
    return config


def check_named(error, values):
    """A refusal begins with a field, and names one of those that were changed, or what comes of them."""
    assert re.match(r"[a-z_]+(\.[a-z_0-9]+)*[ =:{]", str(error)), (values, error)
    named = set(re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)*", str(error)))
    assert named & {*values, "rewards", "objective.clip_low"}, (values, error)


def test_a_random_config_resolves_or_names_the_field():
    resolved = []

    @hypothesis.settings(max_examples=DRAWS, deadline=None, database=None, derandomize=True)
    @hypothesis.given(changes(fields(configs.base())))
    def check(values):
        config = changed(configs.base(), values)
        if config is None:
            return
        try:
            configs.resolve(config)
            resolved.append(True)
        except configs.ConfigError as error:
            resolved.append(False)
            check_named(error, values)

    check()
    assert sum(resolved) >= 0.4 * DRAWS


@pytest.mark.slow
def test_a_random_config_runs_or_is_refused_before_anything_compiles(small_policy, tmp_path_factory):
    seen, failed = collections.Counter(), []
    known = fields(fast(small_policy, 2))
    for path in ("iterations", "profile.start", "model.folder"):  # two iterations; a trace is long; it is the toy
        known.pop(path, None)
    known["ratio_tolerance"] = st.sampled_from([5e-5, 1e-2])  # 0 asks for a stop

    @hypothesis.settings(
        max_examples=RUNS, deadline=None, database=None, derandomize=True, phases=[hypothesis.Phase.generate]
    )
    @hypothesis.given(changes(known))
    def check(values):
        config = changed(fast(small_policy, 2), values)
        if config is None:
            return
        workdir, before = tmp_path_factory.mktemp("run"), metrics.compilations("draw_samples", "update_policy")
        try:
            train.train(config, workdir)
            assert [line["iteration"] for line in lines(workdir)] == [0, 1, 2]
            seen["runs"] += 1
        except configs.ConfigError as error:
            seen["refused"] += 1
            check_named(error, values)
            assert metrics.compilations("draw_samples", "update_policy") == before, (values, error)
        except Exception as error:
            failed.append(f"{values}: {type(error).__name__}: {error}")
        shutil.rmtree(workdir)

    check()
    print(dict(seen), *failed, sep="\n")
    assert not failed and seen["runs"] >= (0.4 * RUNS if RUNS >= 50 else 1)  # of a few, many may be refused
