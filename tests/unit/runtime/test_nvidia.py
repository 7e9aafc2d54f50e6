"""What nvidia-smi prints, from a stand-in that answers as drivers of several ages do."""

from __future__ import annotations

import pytest

from proxydet.runtime.processes import Fact
from proxydet.runtime.report import driver_facts, judged_driver

_TOOL = """#!/bin/sh
case "$*" in
  *compute_cap*) {new} ;;
  *memory.total*) {old} ;;
  "topo -m") printf '\\033[4mGPU0\\033[0m' ;;
  *) exit 6 ;;
esac
"""
_REFUSE = 'echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2'


def lines(*rows: str) -> str:
    return "; ".join(f"echo '{row}'" for row in rows)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a program of that name, and nothing else, on PATH."""

    def make(new: str = "exit 9", old: str = "exit 9") -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(_TOOL.format(new=new, old=old))
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return make


def test_gpus_of_one_kind_are_named_together(tool):
    v100 = "515.48.07, Tesla V100-SXM2-32GB, 32768 MiB, 7.0"
    tool(lines(v100, "515.48.07, Tesla T4, 15360 MiB, 7.5", v100))
    assert driver_facts() == {
        "driver": Fact("515.48.07"),
        "gpu.topology": Fact("GPU0"),
        "gpu.names": Fact("GPU 0,2: Tesla V100-SXM2-32GB (arch=7.0); GPU 1: Tesla T4 (arch=7.5)"),
        "gpu.count": Fact("3"),
        "gpu.memory": Fact("32.0 GiB; 15.0 GiB"),
    }


def test_a_driver_that_does_not_know_the_architecture(tool):
    tool(_REFUSE, lines("450.80.02, Tesla K80, [N/A]"))
    facts = driver_facts()
    assert facts["driver"].value == "450.80.02"
    assert facts["gpu.names"].value == "GPU 0: Tesla K80 (arch=unknown)"
    assert facts["gpu.memory"].value == "0.0 GiB"


def test_a_driver_that_does_not_answer_is_a_problem(tool):
    tool()
    facts = driver_facts()
    assert set(facts) == {"driver", "gpu.topology"}
    assert "nvidia-smi failed: 9" in facts["driver"].problem


def test_a_driver_without_gpus_says_so(tool):
    tool(lines("No devices were found"))
    facts = driver_facts()
    assert set(facts) == {"driver", "gpu.topology"}
    assert facts["driver"] == Fact(None, "nvidia-smi: No devices were found")


def test_no_driver(tool):
    facts = driver_facts()
    assert set(facts) == {"driver", "gpu.topology"}
    assert facts["driver"] == facts["gpu.topology"] == Fact(None, "nvidia-smi not found")


@pytest.mark.parametrize(
    ("driver", "cuda", "available", "problem"),
    [
        ("515.48.07", "13.2", "No", "CUDA 13.2 of PyTorch needs 580 or later"),
        ("525.50.1", "12.8", "No", "CUDA 12.8 of PyTorch needs 525.60 or later"),
        ("525.60.13", "12.8", "No", ""),
        ("450.80.02", "11.8", "No", ""),
        ("580.65.06", "13.2", "No", ""),
        ("515.48.07", "13.2", "Yes", ""),
        ("515.48.07", "13.2", None, "CUDA 13.2 of PyTorch needs 580 or later"),
        ("515.48.07", None, "No", ""),
        (None, "13.2", "No", ""),
        ("515.48.07", "99.1", "No", ""),
    ],
)
def test_a_driver_older_than_the_cuda_of_torch_needs(driver, cuda, available, problem):
    facts = {"driver": Fact(driver), "torch.cuda": Fact(cuda)}
    if available is not None:
        facts["gpu.available"] = Fact(available)
    assert judged_driver(facts) == Fact(driver, problem)
