"""The estimate through the command, by the TPU's own compiler."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.python import run_program

pytest.importorskip("libtpu", reason="the TPU's compiler is in libtpu")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SHARDED = ("--config.mesh.fsdp=-1", "--config.mesh.data=1")
FOUR = ("--config.mesh.fsdp=4", "--config.mesh.data=1")  # larger slices, it does not fill


def estimate(tmp_path, topology, *options, config="signs.py"):
    file = tmp_path / "estimate.json"
    command = [sys.executable, "-m", "mixgrpo_jax.estimate", f"--config=configs/{config}", f"--topology={topology}"]
    done = subprocess.run([*command, f"--json={file}", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text()), done.stdout


@pytest.mark.parametrize(("topology", "devices", "micro_batch"), [("v5e:2x2", 4, 8), ("v5e:4x4", 16, 1)])
def test_the_shipped_policy_fits_and_costs_what_it_should(tmp_path, topology, devices, micro_batch):
    batch = (f"--config.batch.micro_batch={micro_batch}", "--config.batch.updates=3", "--config.batch.prompts=16")
    result, text = estimate(tmp_path, topology, *SHARDED, *batch)
    assert result["fits"] and "fits" in text and result["devices"] == devices
    assert "compiler options for TPU v5 lite: xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000" in text
    assert set(result["bytes_per_device"]) == {"features", "rollout", "decode", "update"}
    assert all(0 < sizes["total"] < result["hbm_bytes"] for sizes in result["bytes_per_device"].values())
    assert result["evaluations_per_iteration"]["update"] == 16 * 12 * 3
    assert (result["remat"], result["samples_per_pass"]) == ("none", micro_batch)
    for phase in ("rollout", "update"):
        assert result["flops_per_iteration"][phase]["ratio"] == pytest.approx(1, abs=0.05), phase
        assert result["collectives"][phase]["all-gather"]["bytes"] > 0
        assert min(result["seconds_per_iteration"][phase].values()) > 0
        plan = result["schedule"][phase]
        assert plan["seconds"]["0.6"]["total"] > max(result["seconds_per_iteration"][phase].values())
        assert 0 < plan["utilisation"]["0.6"]["without recomputation"] < 1
        assert len(plan["costliest"]) == 10 and any("nn/streams.py:" in i["place"] for i in plan["costliest"])
    assert set(result["schedule"]) == set(result["bytes_per_device"]) and "by the schedule it takes" in text


def test_a_compiler_that_tries_less_gives_no_schedule(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O1")
    sizes = ("--config.batch.prompts=16", "--config.batch.micro_batch=16", "--config.model.remat=auto")
    result, text = estimate(tmp_path, "v5e:2x2", *SHARDED, *sizes)
    assert (result["remat"], result["samples_per_pass"]) == ("dots", 12)
    assert (
        "update: 12 samples of a device in a pass, remat 'dots'" in text and "model.remat='auto' is 'dots' here" in text
    )
    assert result["schedule"] == {} and result["seconds_per_iteration"]["update"]["compute"] > 0
    assert "the compiler tries too little for its schedule to tell speed" in text


def test_what_does_not_fit_says_what_would_help(tmp_path):
    sizes = ("--config.batch.prompts=4096", "--config.batch.updates=1", "--config.batch.micro_batch=12288")
    result, text = estimate(tmp_path, "v5e:2x2", *FOUR, *sizes)
    assert not result["fits"] and "does not fit" in text
    assert result["bytes_per_device"]["update"]["total"] > result["hbm_bytes"]
    assert "a smaller batch.micro_batch" in text and "model.remat='block'" in text
    assert result["smallest"] == {"v5e": None}


RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
RECIPES = [name for name in RECIPES if not name.startswith(("flux", "sd35", "quickstart", "scenes", "signs"))]
SOME = RECIPES if os.environ.get("MIXGRPO_JAX_LOWER") == "all" else ["nft", "op_grpo"]
LOWERED = """
import sys
import jax
from mixgrpo_jax import config as configs, estimate
from mixgrpo_jax.engine import ahead
from mixgrpo_jax.engine.programs import fit
from mixgrpo_jax.models import families

jax.config.update("jax_platforms", "cpu")
topology, *recipes = sys.argv[1:]
parts = families.architectures()["flux1-dev"]()
for recipe in recipes:
    for task, rank in (("flux_dev", 0), ("flux_dev_lora", 64)):
        config = configs.load(recipe, "configs/any.py", task)
        config.model.attention = "splash"
        settings = configs.resolve(config)
        assert settings.model.lora.rank == rank
        mesh = estimate.slice_mesh(settings, topology)
        phases, resident = ahead.lower(fit(settings, parts, mesh), parts, mesh, estimate.host_mesh(topology))
        assert phases.keys() >= {"rollout", "decode", "update"}
        assert ("reward_grad" in phases) == ("reward_grad" in settings.objective.needs)
        total = sum(resident.values())
        print(recipe, rank, f"{total / 2**30:.2f}", *[f"{name}={size / 2**30:.2f}" for name, size in resident.items()])
"""


def test_recipes_are_lowered_at_flux_devs_shapes_in_full_and_by_adapters():
    """What stays on a device leaves an update its memory. All recipes with MIXGRPO_JAX_LOWER=all."""
    said = run_program(LOWERED, "v5p:2x4x4", *SOME, cwd=ROOT, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    rows = [line.split(maxsplit=3) for line in said.splitlines() if line.split()[0] in SOME]
    print(said)
    assert [(name, rank) for name, rank, *_ in rows] == [(name, rank) for name in SOME for rank in ("0", "64")]
    assert all(0 < float(total) < 95 / 2 for _, _, total, _ in rows)
