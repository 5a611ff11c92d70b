"""The launch scripts, among stand-ins for gcloud, kubectl, ssh, srun and scontrol."""

import pathlib
import signal
import subprocess
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
RUN = ("--config=configs/quickstart.py", "--workdir=runs/a b")
FLAGS = ("--", "--config.seed=3", '--config.data.folder=$HOME "q"')
SLICE = ("--accelerator=tpu-v5p-slice", "--topology=4x4x4", "--image=here/mixgrpo_jax")
SCRIPTS = {
    "tpu_vm.sh": ("--name=mix", "--zone=z", "--spot", "--project=p", *RUN),
    "tpu_pod.sh": ("--name=mix", "--zone=z", "--type=v5p-64", "--spot", *RUN),
    "gke.sh": ("--name=mix", *SLICE, *RUN),
    "slurm.sbatch": RUN,
    "hosts.sh": ("--hosts=me@gpu1,gpu2", "--folder=/shared/mixgrpo_jax", *RUN),
}
scripts = pytest.mark.parametrize("script", SCRIPTS)


def test_shellcheck_finds_nothing():
    files = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci" / "run"]
    assert len(files) > 5
    result = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


@scripts
def test_help_names_every_option(world, script):
    result = world.run(script, "--help")
    assert result.returncode == 0
    assert f"launch/{script}" in result.stdout
    text = (ROOT / "launch" / script).read_text()
    taken = next(line for line in text.splitlines() if line.startswith("options "))
    valued, switches = taken.split('"')[1], taken.split('"')[3]
    for option in [*valued.split(), *switches.split(), "dry-run"]:
        assert f"--{option}" in result.stdout, option


@scripts
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--colour=red",), "--colour is unknown"),
        (("--config",), "--config needs a value"),
        (("--config=",), "--config needs a value"),
        (("--config", "--workdir=x"), "--config needs a value"),
        (("--dry-run=no",), "--dry-run takes no value"),
        (("quickstart",), "quickstart is no option"),
        ((), "is missing"),
    ],
)
def test_wrong_options_are_refused_by_name(world, script, arguments, message):
    result = world.run(script, *arguments)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.startswith(script)
    assert not world.calls()


@scripts
def test_a_missing_workdir_is_refused(world, script):
    arguments = [argument for argument in SCRIPTS[script] if not argument.startswith("--workdir")]
    result = world.run(script, *arguments)
    assert result.returncode == 2 and "--workdir is missing" in result.stderr
    assert not world.calls()


@scripts
def test_a_dry_run_calls_nothing_and_prints_what_a_run_calls(world, script):
    # The VM is absent; the slice is absent, then ready, and its run is finished at the first look.
    answers = [("tpu-vm describe", 1, ""), ("queued-resources describe", 1, "")]
    answers += [("queued-resources describe", 0, "ACTIVE")] * 2 + [("train.exit\\ 2", 0, "0")]
    world.answers(*answers)
    printed = world.run(script, *SCRIPTS[script], "--dry-run", *FLAGS)
    assert printed.returncode == 0, printed.stderr
    assert not world.calls()
    ran = world.run(script, *SCRIPTS[script], *FLAGS)
    assert ran.returncode == 0, ran.stderr
    looks = ("sleep", "train.exit\\ 2", "queued-resources describe")
    real = sorted(call for call in world.calls() if not any(look in call for look in looks))
    world.answers()
    assert world.shell(printed.stdout).returncode == 0
    assert sorted(call for call in world.calls() if "queued-resources describe" not in call) == real


def test_a_vm_that_is_there_is_not_made_again(world):
    assert world.run("tpu_vm.sh", *SCRIPTS["tpu_vm.sh"]).returncode == 0
    assert not world.calls("create")
    assert len(world.calls("tpu-vm ssh")) == 2


def test_a_vm_that_cannot_be_made_ends_the_script(world):
    world.answers(("describe", 1, ""), ("create", 3, ""))
    assert world.run("tpu_vm.sh", *SCRIPTS["tpu_vm.sh"]).returncode == 3
    assert not world.calls("ssh")


@pytest.mark.parametrize("failing", ["git", "tpu-vm scp", "pip"])
def test_an_install_that_fails_starts_nothing(world, failing):
    world.answers((failing, 4, ""))
    assert world.run("tpu_vm.sh", *SCRIPTS["tpu_vm.sh"]).returncode == 4
    assert not world.calls("nohup")


def test_log_fetch_and_delete(world):
    vm = ("--name=mix", "--zone=z")
    world.run("tpu_vm.sh", *vm, "--log")
    world.run("tpu_vm.sh", *vm, "--workdir=runs/a", "--fetch=here")
    world.run("tpu_vm.sh", *vm, "--workdir=gs://bucket/a", "--fetch=here")
    world.run("tpu_vm.sh", *vm, "--delete")
    log, fetch, fetch_bucket, delete = world.calls()
    assert "tail" in log and "--worker=0" in log
    assert fetch.endswith("--recurse mix:mixgrpo_jax/runs/a here")
    assert fetch_bucket == "gcloud storage cp --recursive gs://bucket/a here"
    assert delete == "gcloud compute tpus tpu-vm delete mix --zone=z --quiet"


def test_the_run_outlives_the_ssh_and_leaves_its_status(world):
    home = world.remote("gcloud")
    world.stand_in("../home/venv/bin/python", '#!/bin/sh\nprintf "%s\\n" "$@"; exit 7\n')
    result = world.shell(
        "set -euo pipefail; . launch/common.sh; options 'name config workdir' '' "
        f"--name=mix --config=c.py --workdir='a b' {FLAGS[0]} {FLAGS[1]} '{FLAGS[2]}'; start"
    )
    assert result.returncode == 0, result.stderr
    for _ in range(200):
        if (home / "train.exit").exists():
            break
        time.sleep(0.1)
    assert (home / "train.exit").read_text() == "7\n"
    told = (home / "train.log").read_text().splitlines()
    assert told == ["-m", "mixgrpo_jax.train", "--config=c.py", "--workdir=a b", *FLAGS[1:]]


ACTIVE, SUSPENDED, ABSENT = (
    ("queued-resources describe", 0, "ACTIVE"),
    ("queued-resources describe", 0, "SUSPENDED"),
    ("queued-resources describe", 1, ""),
)
WAITING = ("queued-resources describe", 0, "WAITING_FOR_RESOURCES")
RUNNING, FINISHED, FAILED = (("train.exit\\ 2", 0, status) for status in ("running", "0", "1"))


def verbs(world):
    """What happened to the queued resource, and which workers were told something, in order."""
    words = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        "nohup": "start",
        "pip": "install",
    }
    return [word for call in world.calls() for part, word in words.items() if part in call]


def test_a_pod_is_requested_awaited_used_and_released(world):
    world.answers(ABSENT, WAITING, WAITING, ACTIVE, ACTIVE, RUNNING, ACTIVE, FINISHED)
    result = world.run("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"])
    assert result.returncode == 0, result.stderr
    assert verbs(world) == ["create", "install", "start", "delete"]
    assert "--spot" in world.calls("create")[0] and "v2-alpha-tpuv5" in world.calls("create")[0]
    assert all("--worker=all" in call for call in world.calls("nohup") + world.calls("pip"))


def test_a_lost_slice_is_replaced_and_the_run_goes_on(world):
    world.answers(
        *(ABSENT, ACTIVE, ACTIVE, RUNNING, SUSPENDED, SUSPENDED),  # taken while running
        *(ABSENT, SUSPENDED, SUSPENDED),  # the next is lost before it is ready
        *(ABSENT, ACTIVE, ACTIVE, FAILED, SUSPENDED, SUSPENDED),  # here the run notices first
        *(ABSENT, ACTIVE, ACTIVE, FINISHED),
    )
    result = world.run("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"], "--poll=10")
    assert result.returncode == 0, result.stderr
    start = ["create", "install", "start", "delete"]
    assert verbs(world) == [*start, "create", "delete", *start, *start]
    assert {"sleep 20", "sleep 40"} <= set(world.calls("sleep"))  # each wait is twice the last


def test_a_run_that_fails_on_a_healthy_slice_is_not_repeated(world):
    world.answers(ABSENT, *[ACTIVE] * 2, FAILED, ACTIVE, ("tail", 0, "RuntimeError: rollout and update disagree"))
    result = world.run("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"])
    assert result.returncode == 2
    assert "failed with status 1" in result.stderr and "rollout and update disagree" in result.stdout
    assert verbs(world) == ["create", "install", "start"]


def test_a_run_that_sigterm_stopped_goes_on_where_the_slice_stays(world):
    stopped = ("train.exit\\ 2", 0, "143")
    world.answers(ABSENT, ACTIVE, ACTIVE, stopped, ACTIVE, ACTIVE, stopped, SUSPENDED, SUSPENDED,
                  ABSENT, ACTIVE, ACTIVE, FINISHED)  # fmt: skip
    result = world.run("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"])
    assert result.returncode == 0, result.stderr
    first = ["create", "install", "start", "start", "delete"]  # started again once, then the slice is lost
    assert verbs(world) == [*first, "create", "install", "start", "delete"]
    assert "stopped by SIGTERM on a slice that stays" in result.stderr


def test_an_ssh_that_fails_is_not_the_runs_end(world):
    world.answers(ABSENT, ACTIVE, ACTIVE, ("train.exit\\ 2", 255, ""), ACTIVE, FINISHED)
    assert world.run("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"], "--keep").returncode == 0
    assert verbs(world) == ["create", "install", "start"]


def test_a_pod_that_is_there_is_gone_on_with(world):
    world.answers(*[ACTIVE] * 3, FINISHED)
    assert world.run("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"]).returncode == 0
    assert verbs(world) == ["install", "start", "delete"]


def test_retries_end(world):
    world.answers(*[("queued-resources create", 1, "")] * 9)
    result = world.run("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"], "--retries=3")
    assert result.returncode == 2 and "gave up after 3 retries" in result.stderr
    assert len(world.calls("queued-resources create")) == 4


def test_the_jobset(world):
    arguments = (*SCRIPTS["gke.sh"], "--namespace=us")
    assert world.run("gke.sh", *arguments, *FLAGS).returncode == 0
    assert world.calls() == ["kubectl --namespace=us apply --filename=-"]
    text = (world.folder / "stdin").read_text()
    assert "@" not in text.split("\n", 1)[1]
    jobset = yaml.safe_load(text)
    assert (jobset["metadata"]["name"], jobset["spec"]["failurePolicy"]) == ("mix", {"maxRestarts": 20})
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (16, 16, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 15
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    container = pod["containers"][0]
    assert container["image"] == "here/mixgrpo_jax"
    assert container["command"] == ["python", "-m", "mixgrpo_jax.train"]  # no shell that would keep SIGTERM to itself
    assert container["args"] == [*RUN, *FLAGS[1:]]
    assert [variable["name"] for variable in container["env"]] == ["PYTHONUNBUFFERED"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_the_jobset_on_spot_nodes(world):
    assert world.run("gke.sh", *SCRIPTS["gke.sh"], "--spot").returncode == 0
    jobset = yaml.safe_load((world.folder / "stdin").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--topology=4*4", "--topology=4*4 is none"),
        ("--topology=4", "--topology=4 is none"),
        ("--chips=0", "--chips=0 is no count"),
        ("--chips=5", "--topology=4x4x4 has 64 chips, which nodes of --chips=5 do not make up"),
    ],
)
def test_a_topology_that_cannot_be(world, option, message):
    result = world.run("gke.sh", *SCRIPTS["gke.sh"], option)
    assert result.returncode != 0 and message in result.stderr
    assert not world.calls()


def test_kubectl_that_fails_fails_the_script(world):
    world.answers(("apply", 1, ""))
    assert world.run("gke.sh", *SCRIPTS["gke.sh"]).returncode == 1


def test_gke_log_and_delete(world):
    world.run("gke.sh", "--name=mix", "--log")
    world.run("gke.sh", "--name=mix", "--delete")
    log, delete = world.calls()
    assert "jobset-name=mix" in log and "job-completion-index=0" in log
    assert delete == "kubectl delete jobset mix"


def test_slurm_gives_one_process_a_node_all_of_its_gpus(world):
    one = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert "JAX_LOCAL_DEVICE_IDS=0\\,1\\,2\\,3" in world.run("slurm.sbatch", *RUN, "--dry-run", **one).stdout
    each = one | {"SLURM_NTASKS_PER_NODE": "4"}
    assert "JAX_LOCAL_DEVICE_IDS" not in world.run("slurm.sbatch", *RUN, "--dry-run", **each).stdout


def test_slurm_passes_a_failure_on_and_does_not_requeue_it(world):
    world.answers(("srun", 5, ""))
    assert world.run("slurm.sbatch", *RUN).returncode == 5
    assert not world.calls("scontrol")


def test_slurm_passes_sigterm_on_waits_and_queues_again(world):
    told = world.folder / "told"
    world.stand_in("srun", f"#!/bin/bash\ntrap 'echo saved > {told}; exit 0' TERM\ntouch {told}\n"
                           "for i in {1..600}; do /bin/sleep 0.1; done\n")  # fmt: skip
    environment = world.environment(SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(ROOT))
    batch = subprocess.Popen(["bash", "launch/slurm.sbatch", *RUN], cwd=ROOT, env=environment)
    for _ in range(200):
        if told.exists():
            break
        time.sleep(0.1)
    batch.send_signal(signal.SIGTERM)
    batch.wait(timeout=60)
    assert told.read_text() == "saved\n"
    assert world.calls() == ["scontrol requeue 77"]


HOST = r"""#!/usr/bin/env bash
echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID ${*: -1}"
[[ $JAX_PROCESS_ID != "${FAILS:-none}" ]] || exit 6
[[ ! ${FAILS:-} ]] || exec /bin/sleep 60
"""


def test_hosts_are_told_who_they_are(world):
    home = world.remote("ssh")
    world.stand_in("python", HOST)
    arguments = ("--hosts=me@gpu1,gpu2", f"--folder={home}", *RUN)
    result = world.run("hosts.sh", *arguments, *FLAGS)
    assert result.returncode == 0, result.stderr
    expected = {f"{host}: gpu1:1234 2 {i} {FLAGS[-1]}" for i, host in enumerate(("me@gpu1", "gpu2"))}
    assert set(result.stdout.splitlines()) == expected


def test_a_host_that_fails_stops_the_others(world):
    home = world.remote("ssh")
    world.stand_in("python", HOST)
    started = time.monotonic()
    result = world.run("hosts.sh", "--hosts=gpu1,gpu2", f"--folder={home}", *RUN, FAILS="1")
    assert result.returncode == 2 and "ended with status 6" in result.stderr
    assert time.monotonic() - started < 55


def test_several_slices_are_one_request_and_every_node_runs(world):
    world.answers(
        ("queued-resources describe", 1, ""), ("queued-resources describe", 0, "ACTIVE"), ("train.exit\\ 2", 0, "0")
    )
    result = world.run("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"], "--slices=2", "--dry-run", *FLAGS)
    assert result.returncode == 0, result.stderr
    commands = result.stdout
    assert "create mix --zone=z --node-count=2 --node-prefix=mix --accelerator-type=v5p-64" in commands
    assert "--node-id" not in commands
    for node in ("mix-0", "mix-1"):
        assert f"{node}:/tmp/mixgrpo_jax.tar.gz --worker=all" in commands
        assert commands.count(f"tpu-vm ssh {node} ") == 2  # it installs, and starts
    assert "replicas: 2" in world.run("gke.sh", *SCRIPTS["gke.sh"], "--slices=2", "--dry-run").stdout
    for script in ("tpu_pod.sh", "gke.sh"):
        result = world.run(script, *SCRIPTS[script], "--slices=two")
        assert result.returncode == 2 and "--slices=two is no count" in result.stderr
