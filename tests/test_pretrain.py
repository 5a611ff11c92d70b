import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax import config as configs
from mixgrpo_jax import pretrain
from mixgrpo_jax.models import families
from mixgrpo_jax.tasks.signs import data as signs


@pytest.fixture(scope="module")
def small(small_policy):
    parts, params = families.load(small_policy)
    return parts, jax.tree.map(jnp.asarray, params), parts.family.make(parts, configs.base().model)


def batch(policy, count):
    images = np.random.default_rng(0).integers(0, 256, (count, *configs.base().model.image_size, 3), dtype=np.uint8)
    return images, policy.tokenize([f"a blue sign that says {number} in white" for number in range(10, 10 + count)])


def test_the_loss_is_that_of_flow_matching_at_shifted_noise_levels(small):
    _, params, policy = small
    images, tokens = batch(policy, 80)
    x0, seen = np.asarray(policy.codec.encode(None, images)), {}

    def still(params, x, sigma, cond):
        seen.update(x=x, sigma=sigma)
        return jnp.zeros_like(x)

    stub = dataclasses.replace(policy, velocity=still)
    loss = pretrain.flow_matching_loss(stub, 3.0, params, images, tokens, jax.random.key(0))
    sigma = np.asarray(seen["sigma"])
    noise = (seen["x"] - (1 - sigma[:, None, None]) * x0) / sigma[:, None, None]
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.01)
    np.testing.assert_allclose(loss, np.square(noise - x0).mean(), rtol=1e-4)
    assert 0.65 < np.median(sigma) < 0.85  # that of a logit-normal is 1/2, and 3 in odds is 3/4
    assert sigma.min() > 0 and sigma.max() < 1


@pytest.mark.slow
def test_a_run_learns_and_leaves_a_checkpoint_with_its_card(small, small_policy, tmp_path, monkeypatch):
    parts, _, policy = small
    monkeypatch.setattr(families, "small_parts", lambda folder, tokenizer: parts)
    make_step, shown = pretrain.make_step, []

    def watched(policy, options):
        optimiser, step = make_step(policy, options)
        return optimiser, lambda state, images, *rest: (shown.append((state, images)), step(state, images, *rest))[1]

    monkeypatch.setattr(pretrain, "make_step", watched)
    config = configs.base()
    config.pretrain.steps, config.pretrain.warmup, config.pretrain.batch = 60, 5, 16
    config.pretrain.clean_steps, config.pretrain.bias_scale = 40, 3.0
    config.evaluation.prompts = config.evaluation.batch = 8
    config.evaluation.num_steps = 2
    scores = pretrain.pretrain(config, tmp_path)
    card = json.loads((tmp_path / "checkpoint" / "card.json").read_text())
    assert (card["steps"], card["seed"], card["held_out"]) == (60, config.seed, scores)
    assert (tmp_path / "pretrained.png").is_file()

    batches = signs.batches(signs.load("train"), config.seed, 16)
    assert len(shown) == 60
    for index, name in ((0, "clean"), (39, "clean"), (40, "image"), (59, "image")):
        np.testing.assert_array_equal(shown[index][1], batches[index][name])

    before = families.init(parts, jax.random.fold_in(jax.random.key(config.seed), 0))
    before["text_encoder_2"]["relative_bias"] *= 3.0
    jax.tree.map(np.testing.assert_array_equal, shown[0][0].params, before)
    _, learned = families.load(tmp_path / "checkpoint")
    images, tokens = batch(policy, 80)
    losses = [
        float(pretrain.flow_matching_loss(policy, 3.0, params, images, tokens, jax.random.key(1)))
        for params in (before, learned)
    ]
    assert losses[1] < 0.95 * losses[0]
