"""Gradients of rewards through the decoder: against finite differences, in chunks, and on several processes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax.engine.collect import Collector
from mixgrpo_jax.engine.programs import decode_chunks
from mixgrpo_jax.engine.reward_grad import RewardGrad
from mixgrpo_jax.models import vae
from mixgrpo_jax.models.codec import PixelCodec, VAECodec
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.on_device import OnDevice
from mixgrpo_jax.rewards.scoring import build
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.mesh import virtual_devices
from mixgrpo_jax.tasks.signs.data import PALETTE, photograph, sample_signs
from tests.python import ROOT, run_program

SIGNS = sample_signs("test", 8)
PROMPTS = [sign.prompt for sign in SIGNS]
METADATA = [{"plate_rgb": np.uint8(PALETTE[s.plate]), "digits_rgb": np.uint8(PALETTE[s.digits])} for s in SIGNS]


def make(codec):
    """A policy that only decodes, its parameters, and clean samples [8, S, C] of noisy signs."""
    images = np.stack([photograph(sign, np.random.default_rng(0))["image"] for sign in SIGNS])
    if codec == "pixels":
        made, params = PixelCodec(images.shape[1:3]), None
    else:
        config = vae.vae_tiny(block_out_channels=(4, 8), latent_channels=3, norm_num_groups=2)
        made = VAECodec(config, images.shape[1:3], jnp.dtype(jnp.float32))
        params = jax.jit(vae.init, static_argnums=0)(config, jax.random.key(0))
        params["decoder"]["conv_out"]["kernel"] *= 3
    policy = Policy(*[None] * 5, codec=made, flops=0.0)
    frozen = {"transformer": None, "base": None} | ({} if params is None else {"vae": params})
    x0 = made.encode(params, jnp.asarray(images))
    return policy, frozen, x0 + 0.1 * jax.random.normal(jax.random.key(1), x0.shape)


def program(policy, at_most=8, weights=None, mesh=None):
    mesh = meshes.make_mesh({}) if mesh is None else mesh
    weights = {"colour": 2.0} if weights is None else weights
    chunks = decode_chunks(8, at_most, meshes.batch_ways(mesh))
    return RewardGrad(policy, build(weights, {}), weights, chunks, mesh)


@pytest.mark.parametrize("codec", ["pixels", pytest.param("vae", marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_finite_differences(codec):
    policy, frozen, x0 = make(codec)
    call = program(policy)
    _, gradient = call(frozen, x0, PROMPTS, METADATA)
    assert gradient.shape == x0.shape and gradient.dtype == jnp.float32
    size = np.sqrt(np.square(gradient).sum((1, 2), keepdims=True))
    assert size.min() > 0
    direction, step = gradient / size, 1e-2
    above, below = (np.asarray(call(frozen, x0 + s * direction, PROMPTS, METADATA)[0]["colour"]) for s in (step, -step))
    # Along its own gradient every sample's reward rises by the gradient's size; the weight is in the gradient alone.
    np.testing.assert_allclose(2 * (above - below) / (2 * step), size[:, 0, 0], rtol=2e-2)
    other = np.roll(direction, 1, axis=0)  # another sample's direction says nothing of the order if they are mixed up
    above, below = (np.asarray(call(frozen, x0 + s * other, PROMPTS, METADATA)[0]["colour"]) for s in (step, -step))
    expected = np.asarray((gradient * other).sum((1, 2)))
    np.testing.assert_allclose(2 * (above - below) / (2 * step), expected, rtol=5e-2, atol=2e-2 * size.max())


@pytest.mark.parametrize("codec", ["pixels", pytest.param("vae", marks=pytest.mark.slow)])
@pytest.mark.parametrize("at_most", [1, 4])
def test_chunks_give_what_one_chunk_gives(codec, at_most):
    policy, frozen, x0 = make(codec)
    whole, parts = (program(policy, size)(frozen, x0, PROMPTS, METADATA) for size in (8, at_most))
    np.testing.assert_allclose(parts[0]["colour"], whole[0]["colour"], rtol=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-4, atol=1e-6)


def test_a_reward_without_a_gradient_is_refused_by_name_unless_it_is_only_watched():
    policy, frozen, x0 = make("pixels")
    with pytest.raises(ValueError, match=r"rewards.strict=1.0: this reward has no gradient in the images.*watched"):
        program(policy, weights={"colour": 1.0, "strict": 1.0})
    scores, gradient = program(policy, weights={"colour": 2.0, "strict": 0.0})(frozen, x0, PROMPTS, METADATA)
    assert list(scores) == ["colour"]
    np.testing.assert_array_equal(gradient, program(policy)(frozen, x0, PROMPTS, METADATA)[1])


def test_a_config_whose_rewards_have_no_gradient_is_refused_before_anything_compiles():
    config = configs.load("draft", str(ROOT / "configs" / "any.py"))
    config.rewards = dict(colour=1.0, strict=0.5)
    settings, compared = configs.resolve(config), Reward("strict", "device", build(["colour"], {})[0].score, np.add)
    for reward in (build(["strict"], {})[0], compared):  # the latter's value is made of a whole group's features
        with pytest.raises(configs.ConfigError, match=r"rewards.strict=0.5: .* no gradient .*only watch it"):
            Collector(settings, None, None, {}, [], [*build(["colour"], {}), reward], None)


def test_the_program_ahead_of_time_is_the_one_that_runs():
    policy, frozen, x0 = make("pixels")
    score = OnDevice(lambda params, images, inputs: inputs * images.mean((1, 2, 3)), {}, lambda p, m: np.ones(len(p)))
    rewards, chunks = [Reward("bright", "device", score)], np.arange(8).reshape(2, 4)
    call = RewardGrad(policy, rewards, {"bright": 2.0}, chunks, meshes.make_mesh({}))
    lowered = call.lower(frozen, jax.ShapeDtypeStruct(x0.shape, x0.dtype))
    found = lowered.compile()({}, call.weighted.params, x0, {"bright": np.ones(8, np.float32)})
    jax.tree.map(np.testing.assert_array_equal, found, call(frozen, x0, [""] * 8, [{}] * 8))
    assert np.abs(found[1]).min() > 0


ON_DEVICES = """
import sys
import numpy as np
from mixgrpo_jax.runtime import distributed, mesh as meshes
from tests.engine.test_reward_grad import METADATA, PROMPTS, make, program

distributed.initialize()
found = {}
for codec in ("pixels", "vae"):
    for sizes in ({"data": 4, "fsdp": -1}, {"data": 2, "tensor": -1}):
        mesh = meshes.make_mesh(sizes)
        policy, frozen, x0 = make(codec)
        x0 = meshes.spread(np.asarray(x0), mesh)
        at_most = 8 if codec == "vae" else 2
        scores, gradient = program(policy, at_most, mesh=mesh)(frozen, x0, PROMPTS, METADATA)
        name = f"{codec}-{'-'.join(sizes)}"
        found[f"{name}-scores"] = np.asarray(scores["colour"])
        found[f"{name}-gradient"] = distributed.gather(gradient)
if distributed.is_first():
    np.savez(sys.argv[1], **found)
"""


def check_file(file):
    """Every result in a file is that of one device."""
    expected = {codec: (policy := make(codec)) and program(policy[0])(*policy[1:], PROMPTS, METADATA)
                for codec in ("pixels", "vae")}  # fmt: skip
    with np.load(file) as found:
        assert len(found.files) == 8
        for name in found.files:
            scores, gradient = expected[name.partition("-")[0]]
            if name.endswith("scores"):
                np.testing.assert_allclose(found[name], scores["colour"], rtol=1e-5, err_msg=name)
            else:
                np.testing.assert_allclose(found[name], gradient, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(tmp_path):
    run_program(ON_DEVICES, tmp_path / "found.npz", **virtual_devices(8))
    check_file(tmp_path / "found.npz")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    from tests.runtime.test_two_processes import start

    start(ON_DEVICES, tmp_path / "grad", 2, str(tmp_path / "found.npz"))
    check_file(tmp_path / "found.npz")
