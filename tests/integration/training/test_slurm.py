"""Every way to submit a training to SLURM, on a real one: slurmctld and two slurmd, each on a node of its own.

Needs root, slurm-wlm and munge, as Debian has them; skipped with the reason elsewhere.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainings import TOY, finish, same, start

from proxydet.files import JsonLines

pytestmark = pytest.mark.slow

CONFIGURATION = """
ClusterName=two
SlurmctldHost=node-1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=86400
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=node-[1-2] CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """SLURM on two nodes."""

    def __init__(self, folder: Path, nodes: Any) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *words: str) -> str:
        """Run one of SLURM's commands and return what it prints."""
        process = self.nodes.start("node-1", words, self.environment)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return output.strip()

    def submit(self, script: str, *options: str) -> str:
        """Submit a batch script; return the job's number."""
        words = [f"--chdir={self.folder}", "--output=%j.txt", "--open-mode=append", "--parsable"]
        return self.call("sbatch", *words, *options, "--wrap", script)

    def state(self, job: str) -> dict[str, str]:
        return dict(
            word.split("=", 1)
            for word in self.call("scontrol", "show", "job", job).split()
            if "=" in word
        )

    def wait(self, job: str, *, timeout: float = 600) -> tuple[int, str]:
        """Return the exit code of a job, and what it has printed, when it has ended."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, self.output(job)
            time.sleep(0.5)
        return int(state["ExitCode"].split(":")[0]), self.output(job)

    def output(self, job: str) -> str:
        path = self.folder / f"{job}.txt"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def cluster(two_nodes, tmp_path_factory) -> Iterator[Cluster]:
    programs = ("slurmctld", "slurmd", "sbatch", "munged")
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        pytest.skip(f"SLURM is not installed; missing: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    for name in ("state", *(f"spool.{node}" for node in two_nodes.names)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    munged = ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    found = Cluster(folder, two_nodes)
    daemons = [subprocess.Popen(munged, stderr=subprocess.DEVNULL)]
    try:
        time.sleep(1)
        for node, *words in (
            ("node-1", "slurmctld", "-D"),
            *((node, "slurmd", "-D", "-N", node) for node in two_nodes.names),
        ):
            words = ["sh", "-c", 'exec "$@" > /dev/null 2>&1', "sh", *words]
            daemons.append(two_nodes.start(node, words, found.environment))
        deadline = time.monotonic() + 60
        while found.call("sinfo", "--noheader", "--format=%t %D") != "idle 2":
            assert time.monotonic() < deadline, found.call("sinfo")
            time.sleep(1)
        yield found
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.communicate()


def toy(folder: Path, *words: str) -> str:
    return shlex.join([sys.executable, str(TOY), str(folder), *words])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """A training of two processes on one machine."""
    folder = tmp_path_factory.mktemp("alone")
    code, errors = finish(start(TOY, folder, "--launch", "2"))
    assert code == 0, errors
    return folder


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("{toy} --launch 2", ["-N1", "-n8"]),
        ("srun {toy} --launch 2", ["-N1", "--ntasks-per-node=1"]),
        ("srun {toy}", ["-N2", "--ntasks-per-node=1"]),
        ("srun {toy}", ["-N1", "--ntasks-per-node=2"]),
        ("srun --ntasks=2 --ntasks-per-node=1 {toy}", ["-N2", "-n8"]),
    ],
)
def test_one_training_of_two_processes(cluster, two_processes, tmp_path, script, options):
    job = cluster.submit(script.format(toy=toy(tmp_path)), *options)
    code, output = cluster.wait(job)
    assert code == 0, output
    assert same(tmp_path, two_processes)


def test_a_script_on_two_nodes_without_srun_ends_at_once(cluster, tmp_path):
    code, output = cluster.wait(cluster.submit(toy(tmp_path), "-N2", "--ntasks-per-node=1"))
    assert code == 3, output
    assert "srun --ntasks=2 --ntasks-per-node=1" in output
    assert not list(tmp_path.iterdir())


def test_every_task_reports_and_the_cause_is_among_them(cluster, tmp_path):
    job = cluster.submit(f"srun {toy(tmp_path, '--fail', '1:5:data')}", "-N1", "-n2")
    code, output = cluster.wait(job)
    assert code == 6, output
    assert "DataError: The image 12.jpg cannot be read." in output
    assert "TrainingError: Process 0 of 2 lost the others" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("script", "options", "signal"),
    [("srun {train}", ["-N1", "-n2"], []), ("exec {train} --gpus 2", ["-N1"], ["--batch"])],
)
def test_a_requeued_training_continues(cluster, base, tmp_path, script, options, signal):
    """SIGUSR1, as --signal=[B:]USR1@180 sends it, ends the training with a checkpoint and puts the job back."""
    more = ["training.iterations=40", "training.scaling=none", "training.evaluation.at_end=false"]
    sets = [word for item in [*base, *more] for word in ("--set", item)]
    words = [
        "train",
        "--recipe",
        "tiny",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "run"),
        "--requeue",
        *sets,
    ]
    command = shlex.join([sys.executable, "-m", "proxydet_cli", *words])
    job = cluster.submit(script.format(train=command), *options, "--requeue")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run/checkpoints").glob("step_*.pth")):
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.2)
    cluster.call("scancel", *signal, "--signal=USR1", job)
    while cluster.state(job)["Restarts"] != "1" or cluster.state(job)["JobState"] != "PENDING":
        assert time.monotonic() < deadline, cluster.output(job)
        time.sleep(0.2)
    assert "The SLURM job is back in the queue." in cluster.output(job)
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    code, output = cluster.wait(job)
    assert code == 0, output
    assert "trained 40 iterations" in output
    steps = [record["iteration"] for record in JsonLines(tmp_path / "run/metrics.jsonl").read()]
    assert steps == list(range(1, 41))
