"""The files in launch/, on hosts: each trains as one process does, and values in the settings reach no shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from commands import BIN, ENVIRONMENT, HOSTILE, REPOSITORY, SECRET, Ended, run_on
from hosts import Hosts
from runs import arguments, events

LAUNCH = REPOSITORY / "launch"
SCRIPTS = ["deepspeed_hosts.sh", "torchrun.sh", "slurm.sbatch"]

Start = Callable[[Hosts, list[str], Path], Ended]


def over_hostfile(remote: str) -> Start:
    def start(hosts: Hosts, settings: list[str], folder: Path) -> Ended:
        environment = {**ENVIRONMENT, "HOSTFILE": str(folder / "hosts" / "hostfile"), "REMOTE": remote}
        environment |= {"NETWORK_INTERFACE": "eth0"}
        command = [str(LAUNCH / "deepspeed_hosts.sh"), "pretrain", *settings]
        return run_on(hosts, {"node0": command}, folder=folder, environment=environment)

    return start


def slurm(hosts: Hosts, settings: list[str], folder: Path) -> Ended:
    tools = folder / "tools"
    tools.mkdir()
    for tool in ("srun", "scontrol"):
        (tools / tool).symlink_to(Path(__file__).with_name("fake_slurm.py"))
    environment = {**ENVIRONMENT, "PATH": f"{tools}:{ENVIRONMENT['PATH']}", "NETWORK_INTERFACE": "eth0"}
    environment |= {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "123456", "SLURM_SUBMIT_DIR": str(folder)}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "pretrain", *settings]
    return run_on(hosts, {"node0": command}, folder=folder, environment=environment)


def skypilot(hosts: Hosts, settings: list[str], folder: Path) -> Ended:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    given = dict(setting.split("=", 1) for setting in settings)
    (folder / "launch").symlink_to(LAUNCH)
    (folder / ".venv").symlink_to(Path(BIN).parent)
    (folder / "config.yaml").write_text("seed: 42\n")
    own = {"DATASET": given.pop("data.path"), "OUTPUT": given.pop("output"), "CONFIG": "config.yaml"}
    own["OVERRIDES"] = " ".join(f"{key}={value}".replace(" ", "") for key, value in given.items())
    own |= {"NETWORK_INTERFACE": "eth0", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    own |= {"SKYPILOT_TASK_ID": "sky-1", "SKYPILOT_NODE_IPS": "\n".join(hosts.addresses.values())}
    environment = {**{k: str(v) for k, v in (task["envs"] | task["secrets"]).items()}, **ENVIRONMENT, **own}
    command = ["bash", "-c", task["run"]]
    return run_on(hosts, dict.fromkeys(hosts.inits, command), folder=folder, environment=environment)


def kubernetes(hosts: Hosts, settings: list[str], folder: Path) -> Ended:
    trainer = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]["trainer"]
    plain = {entry["name"]: entry["value"] for entry in trainer["env"] if "value" in entry}

    def environment(name: str) -> Mapping[str, str]:
        rank = list(hosts.inits).index(name)
        pet = {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": str(rank), "MASTER_ADDR": "node0"}
        return {**ENVIRONMENT, **plain, "PET_MASTER_PORT": "29400", **{f"PET_{k}": v for k, v in pet.items()}}

    command = [*trainer["command"], trainer["args"][0], *settings]
    return run_on(hosts, dict.fromkeys(hosts.inits, command), folder=folder, environment=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        pytest.param(over_hostfile("pdsh"), id="pdsh"),
        pytest.param(over_hostfile("ssh"), id="ssh", marks=pytest.mark.extended),
        pytest.param(slurm, id="slurm", marks=pytest.mark.extended),
        pytest.param(skypilot, id="skypilot", marks=pytest.mark.extended),
        pytest.param(kubernetes, id="kubernetes"),
    ],
)
def test_two_hosts_train_as_one_process_does(
    make_hosts: Callable[[int], Hosts], dataset: Path, farthest: Callable[[Path], float], tmp_path: Path, start: Start
) -> None:
    hosts = make_hosts(2)
    output = tmp_path / HOSTILE
    ended = start(hosts, arguments(dataset, output, pretrain__epochs=1, engine__zero_stage=1), tmp_path)
    assert not any(ended.statuses), ended.output
    assert [ended.ranks[rank]["HOST"] for rank in (0, 1)] == ["node0", "node1"]
    for environment in ended.ranks.values():
        assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "eth0"
        assert environment["WANDB_NOTES"] == HOSTILE and environment["WANDB_API_KEY"] == SECRET
    (began,) = events(output / "pretrain", "start")
    assert began["processes"] == 2
    assert farthest(output / "pretrain") < 1e-6
    assert not list(tmp_path.rglob("pwned")), "a shell ran a value"
    assert SECRET not in ended.output
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and SECRET.encode() in f.read_bytes()]
    assert not list(tmp_path.glob(".s3rec-*")), "the launcher leaves files behind"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_shellcheck(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["deepspeed_hosts.sh"], "the first argument is pretrain, finetune or doctor, not ''"),
        (["deepspeed_hosts.sh", "pretrain", "pretrain.epoch=3"], "pretrain.epoch"),
        (["torchrun.sh", "train"], "the first argument is pretrain, finetune or doctor, not 'train'"),
    ],
)
def test_a_mistake_is_told_before_any_host_is_asked(command: Sequence[str], told: str, tmp_path: Path) -> None:
    words = ["bash", str(LAUNCH / command[0]), *command[1:]]
    environment = {**ENVIRONMENT, "HOME": str(tmp_path)}
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert ran.returncode == 2
    assert told in ran.stderr
    assert os.listdir(tmp_path) == []


def test_the_kubernetes_job_has_only_fields_of_its_schema() -> None:
    """Fields that the schema lacks do not survive the way through its classes."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
