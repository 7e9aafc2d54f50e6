"""Facts about torch and the GPUs, and about the tools that build for them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from proxydet.compat.patch import package_folder
from proxydet.inspection.facts import NOT_ASKED, Fact, Facts, ask
from proxydet.inspection.nvidia import Kinds, driver_facts, kind_facts

_TORCH_SECONDS = 120
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from proxydet.inspection.torch_probe import main; main()"
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
            from proxydet.inspection.torch_probe import probe

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
        answer: What :func:`proxydet.inspection.torch_probe.probe` returned.

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
