"""Facts about the computer: processor, memory, disk, container, scheduler, and variables that change results."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from proxydet.inspection.facts import Fact, Facts

_GIB = 2**30

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
)
"""Environment variables that change which code runs, or how."""

_SCHEDULERS = {
    "SLURM_JOB_ID": "SLURM",
    "PBS_JOBID": "PBS",
    "LSB_JOBID": "LSF",
    "JOB_ID": "Grid Engine",
    "TORCHELASTIC_RUN_ID": "torchrun",
}


def machine_facts(data_root: Path, root: Path = Path("/")) -> Facts:
    """Collect the facts of this computer.

    Args:
        data_root: The folder of the data sets, or one above it: whose disk is measured.
        root: The root of the file system (tests put another in its place).

    Returns:
        Facts by key.
    """
    return {
        "platform": Fact(sys.platform),
        "system": Fact(platform.platform()),
        "cpu": _processor(root),
        "cpu.cores": Fact(_cores(root)),
        "memory": _memory(root),
        "disk": _disk(data_root),
        "container": Fact(_container(root, os.environ)),
        "scheduler": Fact(_scheduler(os.environ)),
        "variables": Fact(_variables(os.environ)),
    }


def _processor(root: Path) -> Fact:
    info = root / "proc/cpuinfo"
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return Fact(line.split(":", 1)[1].strip())
    name = platform.processor() or platform.machine()
    return Fact(name or None, "" if name else "the system does not say")


def _cores(root: Path) -> str:
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    text = f"{usable} of {total}" if usable != total else str(total)
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        text += f", limited to {int(quota[0]) / int(quota[1]):g} by its control group"
    return text


def _memory(root: Path) -> Fact:
    sizes = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        sizes[name] = rest.split()
    if "MemTotal" not in sizes:
        return Fact(None, "the system does not say")
    total, free = (int(sizes[name][0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    text = f"{total:.1f} GiB, {free:.1f} GiB available"
    limits = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
    for limit in (_read(root / name).strip() for name in limits):
        if limit.isdigit() and int(limit) / _GIB < total:
            text += f", limited to {int(limit) / _GIB:.1f} GiB by its control group"
            break
    return Fact(text)


def _disk(folder: Path) -> Fact:
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        usage = shutil.disk_usage(existing)
    except OSError as error:
        return Fact(None, f"{existing}: {error.strerror}")
    missing = "" if existing == folder.absolute() else f" (not there yet; of {existing})"
    return Fact(
        f"{folder}{missing}: {usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} GiB"
    )


def _container(root: Path, variables: Mapping[str, str]) -> str:
    if "APPTAINER_NAME" in variables or "SINGULARITY_NAME" in variables:
        return "Apptainer"
    if "KUBERNETES_SERVICE_HOST" in variables:
        return "Kubernetes"
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run/.containerenv").exists():
        return "Podman"
    kind = variables.get("container")
    return kind or "none found"


def _scheduler(variables: Mapping[str, str]) -> str:
    found = [f"{name} {variables[key]}" for key, name in _SCHEDULERS.items() if key in variables]
    if "SLURM_JOB_ID" in variables:
        details = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE")
        found += [f"{key}={variables[key]}" for key in details if key in variables]
    return ", ".join(found) or "none found"


def _variables(variables: Mapping[str, str]) -> str:
    return ", ".join(f"{n}={variables[n]}" for n in VARIABLES if n in variables) or "none set"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
