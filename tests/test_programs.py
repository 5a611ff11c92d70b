import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.programs import drawing, fit, idle, make_optimiser, rollout_fsdp
from mixgrpo_jax.models import families, flux
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.runtime import chips
from mixgrpo_jax.runtime import mesh as meshes


def mesh_of(**sizes):
    """A mesh for what is never run: many times the same device."""
    shape = [sizes.get(axis, 1) for axis in meshes.AXES]
    return jax.sharding.Mesh(np.array(jax.devices()[:1] * math.prod(shape)).reshape(shape), meshes.AXES)


def test_samples_that_do_not_divide_over_the_devices_are_named():
    config = configs.base()  # 96 samples, 24 an update
    assert idle(configs.resolve(config), mesh_of(data=2, fsdp=4)) == []
    config.batch.updates = 8
    (note,) = idle(configs.resolve(config), mesh_of(fsdp=8))
    assert note.startswith("the 12 samples of an update do not divide over data x fsdp = 8: every device computes all")
    assert note.endswith("or mesh.context=-1 beside mesh.fsdp=-1, for data x fsdp = 4")
    assert idle(configs.resolve(config), mesh_of(fsdp=4, tensor=2)) == []
    config.evaluation.batch = 2
    (note,) = idle(configs.resolve(config), mesh_of(fsdp=4, tensor=2))
    assert note.startswith("evaluation.batch=2 does not divide over data x fsdp = 4: every device draws all of it")


def test_rollouts_cut_parameters_no_further_than_memory_asks(monkeypatch):
    config, mesh, parts = configs.base(), mesh_of(fsdp=8), Parts(FAMILY, {"transformer": flux.flux_small()})
    config.data.name = "features"

    def chosen(memory, **changes):
        monkeypatch.setattr(chips, "memory", lambda device: memory)
        config.mesh.update(changes)
        return rollout_fsdp(configs.resolve(config), parts, mesh)

    assert chosen(None) == 8  # on a CPU
    found = [chosen(memory) for memory in np.geomspace(1e6, 1e9, 40)]
    assert found == sorted(found, reverse=True) and set(found) == {8, 4, 2, 1}
    assert chosen(1e9, rollout_fsdp=4) == 4 and chosen(1e6) == 4


def test_rollouts_do_not_cut_tokens_where_their_samples_divide_over_all_devices():
    config, mesh = configs.base(), mesh_of(fsdp=4, context=2)
    config.batch.prompts, config.batch.group, config.batch.updates = 4, 6, 2  # 24 samples, 12 an update
    assert dict(drawing(configs.resolve(config), mesh).shape) == dict(data=1, fsdp=8, context=1, tensor=1)
    config.batch.prompts = 2  # 12, which 8 does not divide
    assert drawing(configs.resolve(config), mesh) is mesh


@pytest.fixture
def settled(monkeypatch):
    """(config, parts, mesh, bytes of a device) -> what an update keeps, and the samples of a device in a pass."""

    def settle(config, parts, mesh, memory):
        monkeypatch.setattr(chips, "memory", lambda device: memory)
        settings, ways = fit(configs.resolve(config), parts, mesh), meshes.batch_ways(mesh)
        assert fit(settings, parts, mesh) is settings  # and so the programs take what is printed
        words = settings.arithmetic(ways)
        each = settings.micro_batch(ways) // ways
        assert f"of {each * ways};" in words
        assert words.endswith(f"; {each} samples of a device in a pass, remat {settings.model.remat!r}")
        return settings.model.remat, each

    return settle


def test_an_update_recomputes_as_little_as_fits(settled):
    config, mesh, parts = configs.base(), mesh_of(fsdp=4), Parts(FAMILY, {"transformer": flux.flux_small()})
    config.data.name, config.batch.micro_batch = "features", 4
    assert settled(config, parts, mesh, 1e9) == ("none", 3)  # six of 24 samples an update: what is set stays
    config.model.remat = "auto"
    assert settled(config, parts, mesh, None) == ("block", 3)  # on a CPU
    found = [settled(config, parts, mesh, memory) for memory in (1e6, 25.2e6, 26.5e6, 28e6, 1e9)]
    assert found == [("block", 1), ("attention", 1), ("dots", 1), ("dots", 2), ("dots", 3)]
    config.model.lora.rank = 4  # no optimiser, and no gradient, of the base
    assert settled(config, parts, mesh, 8.5e6) == ("dots", 2)


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("v5p", dict(fsdp=32), ("dots", 3)),
        ("v6e", dict(fsdp=16), ("dots", 1)),
        ("v5e", dict(fsdp=32), ("attention", 1)),
    ],
)
def test_what_an_update_of_flux_keeps_on_slices(settled, kind, sizes, expected):
    config, parts = configs.load("flux_dev_mixgrpo", "configs/any.py"), families.architectures()["flux1-dev"]()
    config.model.attention = "splash"
    assert settled(config, parts, mesh_of(**sizes), chips.CHIPS[kind].hbm) == expected


@pytest.mark.parametrize(("warmup", "final", "expected"), [(0, 1.0, [1, 1, 1, 1]), (2, 0.0, [0.5, 1, 1, 0.5])])
def test_the_rate_warms_up_and_falls(warmup, final, expected):
    options = configs.base().optimizer
    options.learning_rate, options.weight_decay, options.warmup, options.final_rate = 0.1, 0.0, warmup, final
    optimiser = make_optimiser(options, num_updates=4)
    params, steps = jnp.zeros(()), []
    state = optimiser.init(params)
    for _ in range(4):
        update, state = optimiser.update(jnp.ones(()), state, params)  # Adam's step of a constant gradient is the rate
        steps.append(-float(update) / 0.1)
    assert steps == pytest.approx(expected, abs=1e-4)


def test_adafactor_keeps_vectors_for_matrices_and_moves_as_adamw_does():
    options = configs.base().optimizer
    options.learning_rate, options.max_grad_norm = 0.1, 1e9
    params, gradient = {"kernel": jnp.ones((256, 128))}, {"kernel": jnp.linspace(1, 2, 128) * jnp.ones((256, 1))}
    sizes, moves = {}, {}
    for options.name in ("adamw", "adafactor"):
        optimiser = make_optimiser(options, num_updates=4)
        state = optimiser.init(params)
        sizes[options.name] = sum(leaf.size for leaf in jax.tree.leaves(state))
        moves[options.name] = optimiser.update(gradient, state, params)[0]["kernel"]
    assert sizes["adamw"] > 2 * 256 * 128 and sizes["adafactor"] < 400
    # A gradient of rank one: its square is what the row and the column make, and every step is the rate.
    np.testing.assert_allclose(moves["adafactor"], moves["adamw"], rtol=1e-3)


def test_weight_decay_follows_the_rate():
    options = configs.base().optimizer
    options.learning_rate, options.weight_decay = 0.1, 0.5
    for options.name in ("adamw", "adafactor"):
        optimiser = make_optimiser(options, num_updates=4)
        update, _ = optimiser.update(jnp.zeros((2,)), optimiser.init(jnp.ones(2)), jnp.ones(2))
        np.testing.assert_allclose(optax.apply_updates(jnp.ones(2), update), 1 - 0.1 * 0.5, rtol=1e-6)
