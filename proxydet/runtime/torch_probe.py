"""Asks torch about itself and its GPUs; run in an interpreter of its own, where a crash does no harm.

Only the standard library, torch and torchvision's compiled file are loaded: importing torchvision itself takes
seconds more.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from proxydet.runtime.processes import Fact

Facts = dict[str, Fact]

NOT_ASKED = "unknown, since torch does not load"
"""Why a fact that only torch knows is missing."""

PARTS = {
    "torch.import": "importing it",
    "gpu.available": "looking for GPUs",
    "torchvision.import": "loading its operators",
    "cpu.bf16": "multiplying in bf16",
}
"""The first fact of each part of the probe, and what a crash there happened in."""


def main() -> None:
    """Write what :func:`probe` finds to stdout, a JSON line after each part: a crash loses only the later ones."""
    # Torch's import makes a million objects and drops few: collecting garbage meanwhile is a tenth of its time.
    gc.disable()

    def write(facts: Facts) -> None:
        lines = {key: astuple(fact) for key, fact in facts.items()}
        sys.stdout.write(f"\n{json.dumps({'facts': lines})}\n")
        sys.stdout.flush()

    probe(report=write)


def probe(*, compute: bool = True, report: Callable[[Facts], None] = lambda _: None) -> Facts:
    """Collect the facts of torch, the GPUs that it sees, and torchvision's operators.

    Args:
        compute: Also add two numbers on every GPU, and multiply in 16 bits. Not for one process of a training: it would
            take memory on the GPUs of the others.
        report: Called after each part with the facts so far.
    """
    try:
        import torch
        import torch.distributed
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        unknown = ("gpu.available", "torch.built_with", "cudnn", "nccl")
        facts = dict.fromkeys(unknown, Fact(None, NOT_ASKED))
        facts["torch.import"] = Fact(None, _first_line(error))
        report(facts)
        return facts
    built_with = torch.__config__.show().strip()
    cuda = torch.version.cuda
    nccl = ""
    if torch.distributed.is_nccl_available():
        from torch.cuda import nccl as library

        version: object = library.version()
        nccl = ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
    facts = {
        "torch.import": Fact("works"),
        "torch.debug": Fact(str(bool(torch.version.debug))),
        "torch.built_with": Fact(built_with),
        "torch.cuda": Fact(cuda, "" if cuda else "built without CUDA"),
        "cudnn": Fact(cudnn_version(torch.backends.cudnn.version())),
        "nccl": Fact(nccl or None, "" if nccl else "torch was built without it"),
    }
    # Known from the flags of its build where it sees no GPU, too.
    if built_for := dict.fromkeys(re.findall(r"code=((?:sm|compute)_\w+)", built_with)):
        facts["torch.arch_list"] = Fact(", ".join(built_for))
    report(facts)
    facts |= _gpus(compute=compute)
    report(facts)
    facts |= _torchvision_operators()
    report(facts)
    if compute:
        wanted = [("cpu.bf16", "bf16", "cpu")]
        if facts["gpu.available"] == Fact("Yes"):
            wanted += [("gpu.bf16", "bf16", "cuda"), ("gpu.fp16", "fp16", "cuda")]
        for key, precision, device in wanted:
            try:
                ratio = half_speed(precision, device)
            except (RuntimeError, AssertionError) as error:
                facts[key] = Fact(None, _first_line(error))
                continue
            times = f"yes (matrix products are {ratio:.1f} times as fast as in fp32)"
            if ratio <= 1:
                longer = 1 / max(ratio, 1e-4)
                times = f"no (matrix products take {longer:.0f} times as long as in fp32)"
            facts[key] = Fact(times)
        report(facts)
    return facts


# Sides of the matrices that are multiplied: without units for it, the small ones already show it, and the large take seconds.
_SIDES = {"cpu": (64, 512), "cuda": (1024, 4096)}


@lru_cache
def half_speed(precision: str, device: str = "cpu") -> float:
    """Measure how many times as fast a matrix product in 16 bits is as one in fp32; some milliseconds, once a process.

    Flags do not decide it: a processor may know the instructions and take them apart, or lack the library for them.

    Args:
        precision: ``"bf16"`` or ``"fp16"``.
        device: Its type: ``"cpu"``, or ``"cuda"`` for the first GPU.

    Returns:
        Above 1 where the device has units for it; far below 1 where it has none; 0 for other types of devices, which are
        not measured.
    """
    import torch

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def seconds(side: int, dtype: torch.dtype) -> float:
        factor = torch.rand(side, side, device=device).to(dtype)
        taken = []
        for _ in range(6):
            # Of a CPU its own time, which other programs do not disturb.
            clock = time.process_time if device == "cpu" else time.perf_counter
            start = clock()
            product = factor @ factor
            if device != "cpu":
                product[0, 0].item()
            taken.append(clock() - start)
        return min(taken[1:])

    ratio = 0.0
    with torch.inference_mode():
        for side in _SIDES.get(device, ()):
            ratio = seconds(side, torch.float32) / max(seconds(side, half), 1e-9)
            # Small products of a device that has units may cost more to begin than to compute.
            if ratio < 0.2:
                break
    return ratio


def cudnn_version(number: int | None) -> str | None:
    """Write cuDNN's version number as text: 8200 is 8.2.0, and with five digits, from 9 on, 92600 is 9.26.0."""
    if number is None:
        return None
    major = 10_000 if number >= 90_000 else 1_000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def gpu_facts(gpus: Sequence[tuple[str, str, int]]) -> Facts:
    """Name GPUs, those of one kind together, given name, architecture (``"9.0"``) and bytes of memory of each."""
    kinds: dict[tuple[str, str, int], list[str]] = {}
    for index, gpu in enumerate(gpus):
        kinds.setdefault(gpu, []).append(str(index))
    names = [f"GPU {','.join(n)}: {name} (arch={arch})" for (name, arch, _), n in kinds.items()]
    return {
        "gpu.names": Fact("; ".join(names)),
        "gpu.count": Fact(str(len(gpus))),
        "gpu.memory": Fact("; ".join(f"{size / 2**30:.1f} GiB" for _, _, size in kinds)),
    }


def _gpus(*, compute: bool) -> Facts:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    problem = str(caught[0].message).splitlines()[0] if caught else ""
    if not available:
        return {"gpu.available": Fact("No", problem)}
    facts: Facts = {}
    count = torch.cuda.device_count()
    try:
        found = [torch.cuda.get_device_properties(index) for index in range(count)]
        facts |= gpu_facts([(g.name, f"{g.major}.{g.minor}", g.total_memory) for g in found])
        if built_for := torch.cuda.get_arch_list():
            facts["torch.arch_list"] = Fact(", ".join(built_for))
        tf32 = "on" if torch.backends.cudnn.allow_tf32 else "off"
        capable = any(gpu.major >= 8 for gpu in found)
        facts["gpu.tf32"] = Fact(tf32 if capable else "not on these GPUs")
    except (RuntimeError, AssertionError) as error:
        return {"gpu.available": Fact("Yes", _first_line(error))}
    # What a build for another GPU or a broken driver cannot do.
    for index in range(count if compute else 0):
        try:
            if (torch.ones(2, device=f"cuda:{index}") + 1).sum().item() != 4:
                problem = f"GPU {index} computes 1 + 1 wrongly"
                break
        except RuntimeError as error:
            problem = f"GPU {index}: {_first_line(error)}"
            break
    return {"gpu.available": Fact("Yes", problem), **facts}


def _torchvision_operators() -> Facts:
    """Whether torchvision's operators can be used; neither value nor problem without torchvision."""
    import torch

    if "torchvision" not in sys.modules:
        try:
            spec = find_spec("torchvision")
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            return {"torchvision.import": Fact(None)}
        compiled = Path(spec.origin).parent.glob("_C*")
        files = [file for file in compiled if file.suffix in {".so", ".pyd", ".dylib"}]
        if not files:
            return {"torchvision.import": Fact(None, "its compiled operators are missing")}
        try:
            torch.ops.load_library(files[0])
        except (OSError, RuntimeError, ImportError) as error:
            why = f"its operators do not load into this torch: {_first_line(error.__cause__ or error)}"
            return {"torchvision.import": Fact(None, why)}
    problem = ""
    operators, cuda = torch.ops.torchvision, torch.version.cuda
    for name in ("nms", "roi_align"):
        if not hasattr(operators, name):
            problem = f"its operator {name} is missing"
    if not problem and cuda is not None and hasattr(operators, "_cuda_version"):
        built = int(operators._cuda_version())
        if built <= 0:
            problem = f"it was built without CUDA, torch for CUDA {cuda}"
        elif built // 1000 != int(cuda.split(".")[0]):
            problem = f"it was built for CUDA {built // 1000}, torch for CUDA {cuda}"
    return {"torchvision.import": Fact(None if problem else "works", problem)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def facts_before_crash(output: str, end: str) -> Facts:
    """Read what the probe wrote to stdout before its process ended, and attribute a crash to the part that it was in.

    ``end`` is how the process ended ("ends the process (SIGSEGV): ..."), empty where it ended well. The crash stands in
    place of the first part that was not finished; later ones are missing.
    """
    facts: Facts = {}
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "facts" in found:
            facts = {key: Fact(*fact) for key, fact in found["facts"].items()}
            break
    missing = [key for key in PARTS if key not in facts]
    loads = "torch.import" not in facts or facts["torch.import"].value is not None
    if missing and loads:
        facts[missing[0]] = Fact(None, f"{PARTS[missing[0]]} {end or 'gives no result'}")
    return facts
