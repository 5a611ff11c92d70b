"""Checkpoints of an earlier version go on, and those of a later one are refused."""

import json
import re
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from mixgrpo_jax import config as configs
from mixgrpo_jax import evaluate, train
from mixgrpo_jax.config import Optimizer
from mixgrpo_jax.convert import convert
from mixgrpo_jax.engine import loading
from mixgrpo_jax.engine.programs import make_optimiser
from mixgrpo_jax.flow.plans.window import WindowState
from mixgrpo_jax.models import flux
from mixgrpo_jax.models.io import orbax_io
from mixgrpo_jax.rl.update import Average, TrainState, init_state
from mixgrpo_jax.runtime.checkpoint import Checkpoints, finished
from mixgrpo_jax.sample import sample
from tests.test_train import fast, lines, stopped


class FirstState(NamedTuple):
    """The train state of version 1."""

    params: Any
    opt_state: Any
    ema: Any
    step: Any


# What rotary positions turn: its channels were in the order of released files, of neighbours.
TURNED = re.compile(r"attention/([qk]/(kernel|bias|b)|[qk]_norm/scale)$")
HEAD = 32


def in_neighbours(tree):
    """Channels (x_j, x_j+d/2) of each head as neighbours (x_2j, x_2j+1)."""

    def convert(path, leaf):
        if not TURNED.search(jax.tree_util.keystr(path, simple=True, separator="/")):
            return leaf
        first = np.asarray(leaf).reshape(*leaf.shape[:-1], -1, 2, HEAD // 2)
        return np.stack([first[..., 0, :], first[..., 1, :]], axis=-1).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(convert, tree)


def as_earlier(workdir, version=1, kept=True, samples=None):
    """Write the newest checkpoint anew, as version 2 had it, the channels of heads in another order; or as version 1,
    where the average was a field as well, and the planner's state a window."""
    checkpoints = Checkpoints(workdir)
    latest, host = checkpoints.latest, checkpoints.restore_host()
    tree = in_neighbours(checkpoints._manager.restore(latest)["state"])
    checkpoints.close()
    shutil.rmtree(workdir / "checkpoints" / str(latest))
    state, host = TrainState(**tree), host | {"version": 2}
    ema = tree["averages"].get("ema") if kept else None
    if version == 1:
        state, host = FirstState(tree["params"], tree["opt_state"], ema, tree["step"]), {"window": host["planned"]}
    checkpoints = Checkpoints(workdir, 1)
    checkpoints.save(finished(latest, state, host, samples)._replace(sums={}))
    checkpoints.close()


def run(folder, rank=0, average=True, **changes):
    config = fast(folder, 4, **changes)
    config.model.lora.rank = rank
    if not average:
        config.averages.ema.decay, config.evaluation.average = 0.0, ""
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "rank", "average"),
    [(1, 2, True), (1, 0, False), (2, 0, True)],
)
def test_a_run_of_an_earlier_version_goes_on_as_if_it_were_of_this(small_policy, tmp_path, version, rank, average):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train.train(run(small_policy, rank, average), straight)
    stopped(run(small_policy, rank, average), resumed, 4)
    as_earlier(resumed, version, average)
    evaluate.evaluate(run(small_policy, rank, average), resumed)  # reads a part of it
    train.train(run(small_policy, rank, average), resumed)
    assert lines(resumed) == lines(straight)
    for part in [("params",), ("averages", "ema")][: 1 + average]:
        ends = [orbax_io.lazy_restore(path / "checkpoints" / "4" / "state", part) for path in (straight, resumed)]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[()], b[()]), *ends)
    host = json.loads(next((resumed / "checkpoints" / "4" / "host").glob("*")).read_text())
    assert host["version"] == loading.VERSION == 3 and host["planned"]["iteration"] == 4


SHAPES = {  # a square, wide and tall matrix in blocks, of which Adafactor takes means; and what it keeps whole
    "double_blocks/image/attention/q/kernel": (2, 128, 128),
    "double_blocks/image/attention/k/kernel": (2, 128, 160),
    "double_blocks/text/attention/q/kernel": (2, 160, 128),
    "double_blocks/text/attention/v/kernel": (2, 128, 128),
    "double_blocks/text/attention/q/bias": (2, 128),
    "single_blocks/attention/k_norm/scale": (2, HEAD),
    "single_blocks/attention/q/a": (2, 160, 4),
    "single_blocks/attention/q/b": (2, 4, 128),
}


def parameters(seed):
    rng = np.random.default_rng(seed)
    leaves = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


def trained_state(name, order):
    """A state after two updates, of parameters and gradients in an order of channels."""
    optimiser = make_optimiser(Optimizer(name=name, learning_rate=0.1), 4)
    state = init_state(jax.tree.map(jnp.asarray, order(parameters(0))), optimiser, {"ema": Average(0.5)})
    update = jax.jit(optimiser.update)
    for seed in (1, 2):
        updates, opt_state = update(order(parameters(seed)), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(params, opt_state, {"ema": jax.tree.map(jnp.subtract, params, updates)}, state.step + 1)
    return state


def restored(workdir, state, like):
    checkpoints = Checkpoints(workdir, 1)
    checkpoints.save(finished(1, state, {"version": 2, "planned": WindowState(0, 0, 1)._asdict()}))
    table = flux.TRANSFORMER.table(flux.flux_small(attention_head_dim=HEAD))
    try:
        return loading.restore_run(checkpoints, like, WindowState(0, 0, 0), table)[0]
    finally:
        checkpoints.close()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_optimiser_goes_on_in_the_order_of_channels_of_this_version(tmp_path, name):
    fresh = trained_state(name, lambda tree: tree)
    found = restored(tmp_path, trained_state(name, in_neighbours), fresh)
    assert jax.tree.structure(found) == jax.tree.structure(fresh)
    for (path, leaf), expected in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(fresh)):
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_an_optimisers_state_of_an_unknown_shape_is_refused(tmp_path):
    fresh = trained_state("adamw", lambda tree: tree)
    state = fresh._replace(opt_state={"sketch": jax.tree.map(lambda leaf: leaf[..., :3], fresh.params)})
    message = (
        r"checkpoints/1 is of an earlier .* optimiser's sketch/double_blocks/.* of shape .*3\) is not known: finish"
    )
    with pytest.raises(ValueError, match=message):
        restored(tmp_path, state, state)


@pytest.mark.slow
def test_samples_of_the_first_version_are_drawn_anew_where_they_are_removed(small_policy, tmp_path):
    config = run(small_policy, one_step_off_policy=True)
    stopped(config, tmp_path, 4)
    as_earlier(tmp_path, samples={"x": np.zeros(3)})
    with pytest.raises(ValueError, match=r"checkpoints/2: version 1 .*samples.*Remove its folder samples/"):
        train.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "samples")
    train.train(config, tmp_path)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_what_the_first_version_had_not_is_asked_for_in_vain(small_policy, tmp_path):
    config = run(small_policy)
    stopped(config, tmp_path, 4)
    as_earlier(tmp_path)
    config.averages.old = configs.average("old")
    with pytest.raises(ValueError, match=r"version 1 .* has no averages.old: begin the run anew"):
        train.train(config, tmp_path)


def test_a_later_version_is_refused_by_name(small_policy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loading, "VERSION", 99)
        stopped(run(small_policy), tmp_path, 4)
    for command in (train.train, evaluate.evaluate):
        with pytest.raises(ValueError, match=r"2 is version 99 of mixgrpo_jax's checkpoints, and this is 3: install"):
            command(run(small_policy), tmp_path)


def test_parameters_that_are_not_finite_are_refused_wherever_they_are_read(small_policy, tmp_path):
    config = run(small_policy)
    config.iterations, config.checkpoint.every = 2, 1
    train.train(config, tmp_path)
    checkpoints = Checkpoints(tmp_path)
    tree, host = checkpoints._manager.restore(2)["state"], checkpoints.restore_host()
    checkpoints.close()
    for part in (tree["params"], tree["averages"]["ema"]):
        part["final_out"]["bias"] = np.full_like(part["final_out"]["bias"], np.nan)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(finished(2, TrainState(**tree), host))
    checkpoints.close()
    message = r"checkpoints/2 holds parameters that are not finite: remove it"
    for read in (
        lambda: train.train(config, tmp_path),
        lambda: evaluate.evaluate(config, tmp_path),
        lambda: sample(config, tmp_path, ["a blue sign that says 4270 in white"]),
        lambda: convert(tmp_path, tmp_path / "out", "diffusers"),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    train.train(config, tmp_path)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2]
