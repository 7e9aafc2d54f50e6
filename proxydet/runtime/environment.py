"""What this machine and its packages are, next to the environment of the published results.

::

    report = environment()
    report.worst                       # "may change results"
    print(report.to_markdown())        # a block for an issue
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import proxydet
from proxydet._version import __version__
from proxydet.errors import EnvironmentProblem
from proxydet.paths import datasets_folder
from proxydet.runtime.patch import package_folder, patch_status, roi_align_files
from proxydet.runtime.report import (
    NOT_ASKED,
    EnvironmentReport,
    Fact,
    Facts,
    Field,
    Verdict,
    ask,
    judged_fields,
    numbers,
)

_QUERIES = ("driver_version,name,memory.total,compute_cap", "driver_version,name,memory.total")
"""Asked in turn: drivers before 470 do not know the compute capability."""

_OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580,)}
"""By major version of CUDA, the least driver on Linux (NVIDIA's CUDA compatibility guide, minor versions)."""

_MIB = 2**20

Kinds = dict[tuple[str, str, int], list[str]]
"""Name, architecture and bytes of memory to the numbers of the GPUs that are alike."""


def driver_facts() -> Facts:
    """Ask nvidia-smi for the driver, the GPUs and their topology.

    Returns:
        ``driver`` and ``gpu.topology`` always; ``gpu.names``, ``gpu.count`` and ``gpu.memory`` where it lists GPUs.
    """
    listed = _list_gpus()
    topology = ask(["nvidia-smi", "topo", "-m"]) if listed.value is not None else listed
    # It underlines its headings on a terminal and elsewhere.
    plain = Fact(re.sub(r"\x1b\[[0-9;]*m", "", topology.value)) if topology.value else topology
    lines = (listed.value or "").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    if not rows or min(map(len, rows)) < 3:
        # Without a GPU it may say so in a sentence, and end as if all were well.
        told = Fact(None, f"nvidia-smi: {lines[0]}") if lines else listed
        return {"driver": told, "gpu.topology": plain}
    kinds: Kinds = {}
    for index, (_, name, memory, *arch) in enumerate(rows):
        key = (name, arch[0] if arch else "unknown", _bytes(memory))
        kinds.setdefault(key, []).append(str(index))
    return {"driver": Fact(rows[0][0]), "gpu.topology": plain, **kind_facts(kinds)}


def _list_gpus() -> Fact:
    found = Fact(None)
    for query in _QUERIES:
        found = ask(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        if found.value is not None or found.problem.endswith("not found"):
            break
    return found


def _bytes(memory: str) -> int:
    """``"32768 MiB"`` in bytes; 0 where the driver says ``[N/A]``."""
    return int(memory.split()[0]) * _MIB if memory.split()[0].isdigit() else 0


def kind_facts(kinds: Kinds) -> Facts:
    """Name GPUs, those of one kind together.

    Args:
        kinds: The GPUs.

    Returns:
        ``gpu.names``, ``gpu.count`` and ``gpu.memory``.
    """
    names = [f"GPU {','.join(n)}: {name} (arch={arch})" for (name, arch, _), n in kinds.items()]
    memory = [f"{size / 2**30:.1f} GiB" for _, _, size in kinds]
    return {
        "gpu.names": Fact("; ".join(names)),
        "gpu.count": Fact(str(sum(map(len, kinds.values())))),
        "gpu.memory": Fact("; ".join(memory)),
    }


def judged_driver(facts: Facts) -> Fact:
    """Add to the driver that it is too old for the CUDA which torch was built with, where it is.

    Args:
        facts: ``driver``, and ``torch.cuda`` and ``gpu.available`` where they are known.

    Returns:
        The driver. A GPU that torch can use makes it good enough: NVIDIA's compatibility package lets old ones serve.
    """
    driver, cuda = facts["driver"], facts.get("torch.cuda", Fact(None))
    works = facts.get("gpu.available", Fact(None)).value == "Yes"
    if driver.value is None or cuda.value is None or works:
        return driver
    least = _OLDEST_DRIVER.get(numbers(cuda.value)[0])
    if least is None or numbers(driver.value) >= least:
        return driver
    wanted = ".".join(map(str, least))
    return Fact(driver.value, f"CUDA {cuda.value} of PyTorch needs {wanted} or later")


_TORCH_SECONDS = 120
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from proxydet.runtime.torch_probe import main; main()"
)


class TorchProbe:
    """Torch's answers, asked for in a process of their own while other facts are collected.

    Where this process has torch already, it is asked here, and the GPUs are only looked at.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        if "torch" not in sys.modules:
            self._process = subprocess.Popen(  # noqa: S603 - a list, no shell, our own module
                [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )

    def facts(self) -> Facts:
        """Wait for the answers and return them as facts by key."""
        return facts_from_answer(self._answer())

    def _answer(self) -> dict[str, Any]:
        if self._process is None:
            from proxydet.runtime.torch_probe import probe

            return probe(compute=False)
        end = ""
        try:
            written, complaints = self._process.communicate(timeout=_TORCH_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            written, complaints = self._process.communicate()
            end = f"takes more than {_TORCH_SECONDS} s"
        return complete_answer(written, end or _how_it_ended(self._process.returncode, complaints))


def complete_answer(written: str, end: str) -> dict[str, Any]:
    """Read what the probe wrote before it ended, and blame a crash on the part that it was at.

    Args:
        written: Its output: a JSON object a line after each part that it did, each holding those before; lines of
            anything else may stand between.
        end: How the process ended, after "importing it"; empty where it ended well.

    Returns:
        The probe's answer, with the error of the part that it did not survive; later parts are missing.
    """
    for line in reversed(written.splitlines()):
        answer = _part(line)
        if answer is None:
            continue
        if "torch_error" in answer or "torchvision_error" in answer:
            return answer
        if "gpu_available" not in answer:
            return {**answer, "gpu_error": f"looking for GPUs {end}"}
        return {**answer, "torchvision_error": f"loading its operators {end}"}
    return {"torch_error": f"importing it {end or 'gives no answer'}"}


def _part(line: str) -> dict[str, Any] | None:
    """What a line of the probe says; None for a line of something else."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    ours = isinstance(value, dict) and ("torch" in value or "torch_error" in value)
    return value if ours else None


def _how_it_ended(code: int, complaints: str) -> str:
    if code == 0:
        return ""
    try:
        how = signal.Signals(-code).name
    except ValueError:
        how = f"exit code {code}"
    last = (complaints.strip().splitlines() or ["no message"])[-1]
    return f"ends the process ({how}): {last}"


def facts_from_answer(answer: dict[str, Any]) -> Facts:
    """Turn the probe's answers into facts.

    Args:
        answer: What :func:`proxydet.runtime.torch_probe.probe` returned.

    Returns:
        Facts by key; where torch does not load, the problem and what therefore is not known.
    """
    if "torch_error" in answer:
        silent = ("gpu.available", "torch.built_with", "cudnn", "nccl")
        return {"torch.import": Fact(None, answer["torch_error"])} | dict.fromkeys(
            silent, Fact(None, NOT_ASKED)
        )
    facts: Facts = {
        "torch.import": Fact("works"),
        "torch.debug": Fact(answer["debug"]),
        "torch.built_with": Fact(answer["built_with"]),
        "torch.cuda": Fact(answer["cuda"], "" if answer["cuda"] else "built without CUDA"),
        "cudnn": Fact(_cudnn_version(answer["cudnn"])),
        "nccl": Fact(answer["nccl"], "" if answer["nccl"] else "torch was built without it"),
    }
    if "torchvision_error" in answer:
        error = answer["torchvision_error"]
        facts["torchvision.import"] = Fact("works" if error == "" else None, error or "")
    built_for = answer.get("arch_list") or _architectures(answer["built_with"])
    if built_for:
        facts["torch.arch_list"] = Fact(", ".join(built_for))
    return facts | _gpu_facts(answer)


def _architectures(built_with: str) -> list[str]:
    """The GPUs that torch has code for, out of its build's flags: known where it sees no GPU, too."""
    return list(dict.fromkeys(re.findall(r"code=((?:sm|compute)_\w+)", built_with)))


def _cudnn_version(number: int | None) -> str | None:
    if number is None:
        return None
    # 8200 is 8.2.0; from 9 on the major version has five digits: 92600 is 9.26.0.
    major = 10_000 if number >= 90_000 else 1_000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _gpu_facts(answer: dict[str, Any]) -> Facts:
    warning = answer.get("gpu_error") or answer.get("gpu_warning", "")
    if "gpu_available" not in answer:
        return {"gpu.available": Fact(None, warning)}
    if not answer["gpu_available"]:
        return {"gpu.available": Fact("No", warning)}
    kinds: Kinds = {}
    for index, gpu in enumerate(answer.get("gpus", [])):
        kinds.setdefault((gpu["name"], gpu["arch"], gpu["memory"]), []).append(str(index))
    facts: Facts = {"gpu.available": Fact("Yes", warning), **kind_facts(kinds)}
    facts["gpu.tf32"] = Fact(_tf32(answer, kinds))
    return facts


def _tf32(answer: dict[str, Any], kinds: Kinds) -> str:
    capable = any(float(arch) >= 8 for _, arch, _ in kinds)
    if not capable:
        return "not on these GPUs"
    return "on" if answer.get("tf32_convolutions") else "off"


def tool_facts() -> Facts:
    """Collect facts about compilers, the driver and compiled architectures; needs no torch.

    Returns:
        Facts by key.
    """
    home = cuda_home()
    nvcc = ask([str(home / "bin" / "nvcc") if home else "nvcc", "-V"])
    compiler = ask([os.environ.get("CXX", "c++"), "--version"])
    return {
        "compiler": _first_line(compiler),
        "cuda.compiler": _release(nvcc),
        "cuda.home": Fact(str(home) if home else None, "" if home else "not found"),
        **driver_facts(),
        "detectron2.arch": _arch_flags("detectron2", home),
        "torchvision.arch": _arch_flags("torchvision", home),
        "TORCH_CUDA_ARCH_LIST": Fact(os.environ.get("TORCH_CUDA_ARCH_LIST", "<not set>")),
        "DETECTRON2_ENV_MODULE": Fact(os.environ.get("DETECTRON2_ENV_MODULE", "<not set>")),
    }


def cuda_home() -> Path | None:
    """The CUDA toolkit: ``$CUDA_HOME``, else where nvcc is, else /usr/local/cuda; None where there is none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        return Path(nvcc).resolve().parent.parent
    default = Path("/usr/local/cuda")
    return default if default.is_dir() else None


def _first_line(fact: Fact) -> Fact:
    return Fact(fact.value.splitlines()[0]) if fact.value else fact


def _release(nvcc: Fact) -> Fact:
    if nvcc.value is None:
        return nvcc
    release = re.search(r"release (\S+?),", nvcc.value)
    return Fact(f"CUDA {release[1]}" if release else nvcc.value.splitlines()[-1])


def _arch_flags(package: str, home: Path | None) -> Fact:
    """Which GPU architectures a package's compiled file holds code for, as CUDA's cuobjdump lists them."""
    folder = package_folder(package)
    files = sorted(folder.glob("_C*.so")) if folder is not None else []
    if not files:
        return Fact(None, "no compiled file")
    beside = home / "bin" / "cuobjdump" if home else None
    tool = str(beside) if beside is not None and beside.is_file() else shutil.which("cuobjdump")
    if tool is None:
        return Fact(None, "cuobjdump, which lists them, is not installed")
    listed = ask([tool, "--list-elf", str(files[0])])
    if listed.value is None:
        return listed
    found = {int(number) for number in re.findall(r"\.sm_(\d+)", listed.value)}
    text = ", ".join(f"{number // 10}.{number % 10}" for number in sorted(found))
    return Fact(text or None, "" if text else "it holds no GPU code")


_DISTRIBUTIONS = {
    "numpy": ("numpy", ("numpy",)),
    "Pillow": ("PIL", ("pillow",)),
    "fvcore": ("fvcore", ("fvcore",)),
    "iopath": ("iopath", ("iopath",)),
    "cv2": (
        "cv2",
        (
            "opencv-python-headless",
            "opencv-python",
            "opencv-contrib-python-headless",
            "opencv-contrib-python",
        ),
    ),
}
"""By fact: the name to import, and the packages that bring it."""


def package_facts() -> Facts:
    """Collect versions and places of the packages that matter, and the state of the installed RoIAlign.

    Returns:
        Facts by key.
    """
    facts: Facts = {"python": Fact(sys.version.replace("\n", "")), "proxydet": _proxydet()}
    for key, (module, names) in _DISTRIBUTIONS.items():
        facts[key] = _version(module, names)
    facts["torch"] = installed_version("torch")
    facts |= _torch_build()
    facts["torchvision"] = installed_version("torchvision")
    facts["detectron2"] = installed_version("detectron2")
    facts["detectron2._C"] = _compiled_part()
    facts["roi_align"] = _roi_align()
    facts["dependencies"] = _dependencies()
    return facts


def installed_version(name: str) -> Fact:
    """Return version and folder of a package from its files: ``"2.15.0+cu132 @/.../torch"``.

    Args:
        name: The name under which it is imported.

    Returns:
        The version that its ``version.py`` or ``__init__.py`` states, else that of its metadata.
    """
    folder = package_folder(name)
    if folder is None:
        return Fact(None, "not installed")
    for file in (folder / "version.py", folder / "__init__.py"):
        version = stated_version(file)
        if version is not None:
            return Fact(f"{version} @{folder}")
    for distribution in metadata.packages_distributions().get(name, []):
        return Fact(f"{metadata.version(distribution)} @{folder}")
    return Fact(f"unknown @{folder}", "its files do not say which version they are")


def stated_version(file: Path) -> str | None:
    """Read ``__version__ = "..."`` out of a Python file without running it.

    Args:
        file: The file; need not exist.

    Returns:
        The version, or None where the file does not state one.
    """
    version = _constants(file).get("__version__")
    return version if isinstance(version, str) else None


def _constants(file: Path) -> dict[str, object]:
    """The names that a Python file gives constants at its top level; empty where it cannot be read as one."""
    if not file.is_file():
        return {}
    try:
        module = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, object] = {}
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node.value.value for t in targets if isinstance(t, ast.Name)}
    return found


def _torch_build() -> Facts:
    """What torch's version file says of its build: known even where torch does not load."""
    folder = package_folder("torch")
    stated = {} if folder is None else _constants(folder / "version.py")
    facts: Facts = {}
    if "debug" in stated:
        facts["torch.debug"] = Fact(str(bool(stated["debug"])))
    if "cuda" in stated:
        cuda = stated["cuda"]
        facts["torch.cuda"] = Fact(str(cuda)) if cuda else Fact(None, "built without CUDA")
    return facts


def _version(module: str, distributions: tuple[str, ...]) -> Fact:
    if package_folder(module) is None:
        return Fact(None, "not installed")
    found = {name: _metadata_version(name) for name in distributions}
    versions = {name: version for name, version in found.items() if version is not None}
    if not versions:
        return installed_version(module)
    problem = ""
    if len(versions) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        problem = f"several packages write the same files: {listed}"
    return Fact(next(iter(versions.values())), problem)


def _metadata_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _proxydet() -> Fact:
    folder = Path(proxydet.__file__).parent
    revision = commit_of(folder)
    return Fact(f"{__version__} @{folder}" + (f", {revision}" if revision else ""))


def commit_of(folder: Path) -> str | None:
    """Return the commit of the source tree that holds a folder.

    Args:
        folder: A folder.

    Returns:
        ``commit 1a2b3c…``, with ``and uncommitted changes`` where there are some; None outside a source tree.
    """
    if "site-packages" in folder.parts or "dist-packages" in folder.parts:
        return None
    head = ask(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if head.value is None:
        return None
    changes = ask(["git", "-C", str(folder), "status", "--porcelain", "--", "."])
    return f"commit {head.value}" + (" and uncommitted changes" if changes.value else "")


def _compiled_part() -> Fact:
    folder = package_folder("detectron2")
    if folder is None:
        return Fact(None, "detectron2 is not installed")
    built = sorted(path.name for path in folder.glob("_C*") if path.suffix in {".so", ".pyd"})
    return Fact(built[0] if built else "not built")


def _roi_align() -> Fact:
    files = roi_align_files()
    if not files:
        return Fact(None, "detectron2 is not installed")
    try:
        status = patch_status(files[0])
    except (EnvironmentProblem, OSError) as error:
        return Fact(None, str(error))
    problems = [] if status.state in {"original", "applied"} else [status.reason]
    if status.stale_bytecode:
        problems.append("Python runs a compiled file of another source")
    if len(files) > 1:
        problems.append(f"{len(files)} copies of detectron2 are on Python's path")
    return Fact(f"{status.state} @{status.file}", "; ".join(problems))


def _dependencies() -> Fact:
    """Which of proxydet's own requirements are not installed at all."""
    try:
        required = metadata.requires("proxydet") or []
    except metadata.PackageNotFoundError:
        return Fact(None, "proxydet itself is not installed, only on Python's path")
    names = [
        re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        for line in required
        if "extra ==" not in line and "python_version" not in line
    ]
    missing = [name for name in names if _metadata_version(name) is None]
    problem = f"not installed: {', '.join(missing)}" if missing else ""
    return Fact(f"{len(names) - len(missing)} of {len(names)} installed", problem)


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


__all__ = ["EnvironmentReport", "Field", "Verdict", "environment"]


def environment(*, quick: bool = False, data_root: Path | None = None) -> EnvironmentReport:
    """Report the environment; what is missing or broken is a field, never an error.

    Args:
        quick: Do not import torch; its fields then come from its files, and the GPUs from nvidia-smi.
        data_root: The folder of the data sets, whose disk is measured; None for the default.

    Returns:
        All fields with the published values and a verdict for each difference. Torch is asked in a process of its
        own unless this one has imported it: a torch that crashes is reported like one that is missing.
    """
    probe = None if quick else TorchProbe()
    facts = machine_facts(datasets_folder() if data_root is None else data_root)
    facts |= package_facts() | tool_facts()
    if probe is not None:
        facts |= probe.facts()
    facts["driver"] = judged_driver(facts)
    return EnvironmentReport(
        fields=judged_fields(facts),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=quick,
    )
