"""Shared by all tests: compiled programs, a velocity that is cheap and depends on everything, and a small policy."""

import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import families, flux, t5
from mixgrpo_jax.models.families import Parts
from mixgrpo_jax.models.flux.policy import FAMILY
from mixgrpo_jax.tasks.signs.data import build_tokenizer

jax.config.update("jax_threefry_partitionable", True)

# Many tests run a whole command on the same small config: what one process has compiled, all others read, and later
# test runs too.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
KEPT = {"jax_compilation_cache_dir": str(CACHE), "jax_persistent_cache_min_compile_time_secs": 0.1}
for field, value in KEPT.items():
    jax.config.update(field, value)
    os.environ.setdefault(field.upper(), str(value))  # of processes that tests start


# What models and files are compared with is in the extra `parity`; without it, the tests that need it are skipped.
PARITY = ("torch", "diffusers", "accelerate", "peft", "onnx", "onnxruntime", "rapidocr_onnxruntime")
ABSENT = [name for name in PARITY if importlib.util.find_spec(name) is None]
PIPELINES = ("test_pipeline.py", "test_pipeline_sd3.py", "test_pipeline_flux2.py")
collect_ignore = [*PIPELINES, "models/test_ppocr.py"] if ABSENT else []


def _skipping(item):
    try:
        return (yield)
    except ImportError as error:
        if ABSENT:
            pytest.skip(f"without the extra parity ({', '.join(ABSENT)}): {str(error).strip().splitlines()[0]}")
        raise


pytest_runtest_setup = pytest.hookimpl(_skipping, wrapper=True)
pytest_runtest_call = pytest.hookimpl(_skipping, wrapper=True)


def toy_velocity(params, x, sigma, cond):
    """v = tanh(x W + cond + sigma b); x [B, S, C], sigma [B], cond [B, C]. Bind the parameters with `partial`."""
    return jnp.tanh(x @ params["w"] + cond[:, None] + sigma[:, None, None] * params["b"])


@pytest.fixture(scope="session")
def toy():
    """(velocity, params, noise [P=2, S=3, C=4], cond [P, C])."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": 0.5 * jax.random.normal(keys[0], (4, 4)), "b": jax.random.normal(keys[1], (4,))}
    return toy_velocity, params, jax.random.normal(keys[2], (2, 3, 4)), jax.random.normal(keys[3], (2, 4))


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory):
    """Folder of a policy of a thousandth of the shipped one's work."""
    folder = tmp_path_factory.mktemp("policy")
    sizes = dict(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=32)
    text = t5.t5_tiny(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    configs = {"transformer": flux.flux_small(**sizes, pooled_projection_dim=32), "text_encoder_2": text}
    parts = Parts(FAMILY, configs, {"tokenizer_2": build_tokenizer()})
    params = jax.tree.map(np.array, families.init(parts, jax.random.key(0)))
    final = params["transformer"]["final_out"]["kernel"]  # zero as made: it would hide what is learned
    final += np.random.default_rng(0).normal(size=final.shape, scale=0.02)
    families.save(folder, parts, params)
    return folder
