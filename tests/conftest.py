"""Shared by all tests: a velocity that is cheap, depends on everything it is given, and can be counted."""

import os
import shutil
import tempfile

import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_threefry_partitionable", True)

# Many tests run a whole command on the same small config: what one worker has compiled, the others read.
if "MIXGRPO_JAX_TEST_CACHE" not in os.environ:
    os.environ["MIXGRPO_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="mixgrpo_jax_")
CACHE = os.environ["MIXGRPO_JAX_TEST_CACHE"]
jax.config.update("jax_compilation_cache_dir", CACHE)


def pytest_sessionfinish(session):
    """The first process, which started the workers, cleans up."""
    if not hasattr(session.config, "workerinput"):
        shutil.rmtree(CACHE, ignore_errors=True)


def toy_velocity(params, x, sigma, cond):
    """v = tanh(x W + cond + sigma b); x [B, S, C], cond [B, C]."""
    return jnp.tanh(x @ params["w"] + cond[:, None] + sigma * params["b"])


@pytest.fixture
def toy():
    """(velocity, params, noise [P=2, S=3, C=4], cond [P, C])."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": 0.5 * jax.random.normal(keys[0], (4, 4)), "b": jax.random.normal(keys[1], (4,))}
    return toy_velocity, params, jax.random.normal(keys[2], (2, 3, 4)), jax.random.normal(keys[3], (2, 4))
