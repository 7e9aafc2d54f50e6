"""Facts about computers other than this one, from a file system laid out for the purpose."""

import pytest

from proxydet.runtime.report import VARIABLES, machine_facts

_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")
_CONTAINERS = ("APPTAINER_NAME", "SINGULARITY_NAME", "KUBERNETES_SERVICE_HOST", "container")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in (*_JOBS, *_CONTAINERS, *VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nmodel name\t: Abacus 3000\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    return tmp_path


def test_processor_and_memory(root, tmp_path):
    facts = machine_facts(tmp_path, root)
    assert facts["cpu"].value == "Abacus 3000"
    assert facts["memory"].value == "16.0 GiB, 8.0 GiB available"


def test_limits_of_the_control_group(root, tmp_path):
    (root / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    (root / "sys/fs/cgroup/memory.max").write_text(str(4 * 2**30))
    facts = machine_facts(tmp_path, root)
    assert "limited to 1.5" in facts["cpu.cores"].value
    assert "limited to 4.0 GiB" in facts["memory"].value
    (root / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    (root / "sys/fs/cgroup/memory.max").write_text("max")
    facts = machine_facts(tmp_path, root)
    assert "limited" not in facts["cpu.cores"].value + facts["memory"].value


def test_a_system_that_says_nothing(tmp_path):
    facts = machine_facts(tmp_path, tmp_path / "empty")
    assert facts["memory"].value is None
    assert facts["memory"].problem


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    value = machine_facts(tmp_path / "data" / "lvis", tmp_path)["disk"].value
    assert "not there yet" in value
    assert "GiB free" in value


@pytest.mark.parametrize(
    ("variables", "files", "expected"),
    [
        ({}, (), "none found"),
        ({}, (".dockerenv",), "Docker"),
        ({}, ("run/.containerenv",), "Podman"),
        ({"APPTAINER_NAME": "x"}, (), "Apptainer"),
        ({"KUBERNETES_SERVICE_HOST": "x"}, (".dockerenv",), "Kubernetes"),
        ({"container": "lxc"}, (), "lxc"),
    ],
)
def test_containers(tmp_path, monkeypatch, variables, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine_facts(tmp_path, tmp_path)["container"].value == expected


def test_schedulers(tmp_path, monkeypatch):
    assert machine_facts(tmp_path)["scheduler"].value == "none found"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert machine_facts(tmp_path)["scheduler"].value == "SLURM 17, SLURM_NTASKS=8"


def test_variables_that_change_results_are_listed(tmp_path, monkeypatch):
    assert machine_facts(tmp_path)["variables"].value == "none set"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("EDITOR", "ed")
    assert machine_facts(tmp_path)["variables"].value == "OMP_NUM_THREADS=1"
