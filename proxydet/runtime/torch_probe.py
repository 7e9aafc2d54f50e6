"""Asks torch about itself and its GPUs; run in an interpreter of its own, where a crash harms nobody.

``python -m proxydet.runtime.torch_probe`` writes a JSON object to stdout after each part, the last one whole: where a
part ends the process, the ones before are known. Only the standard library, torch and
torchvision's compiled file are loaded: importing torchvision itself costs seconds more.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def main() -> None:
    """Write what :func:`probe` finds to stdout, a line after each part."""
    # Torch's import makes a million objects and drops few: collecting garbage meanwhile is a tenth of its time.
    gc.disable()
    probe(tell=_write)


def _write(answer: Answer) -> None:
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()


def probe(*, compute: bool = True, tell: Callable[[Answer], None] = lambda _: None) -> Answer:
    """Collect what torch and torchvision say about themselves.

    Args:
        compute: Also add two numbers on every GPU. Not for one process of a training: it would take memory on the
            GPUs of the others.
        tell: Called after each part with the answer so far.

    Returns:
        ``torch`` (or ``torch_error``), ``gpus``, ``torchvision_error`` and more; all JSON values.
    """
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        failed = {"torch_error": _say(error)}
        tell(failed)
        return failed
    answer: Answer = {
        "torch": torch.__version__,
        "debug": str(bool(torch.version.debug)),
        "cuda": torch.version.cuda,
        "built_with": torch.__config__.show().strip(),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl_version(),
    }
    tell(answer)
    answer.update(_gpus(compute=compute))
    tell(answer)
    answer["torchvision_error"] = _torchvision_error()
    tell(answer)
    return answer


def _gpus(*, compute: bool) -> Answer:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    answer: Answer = {"gpu_available": available, "gpu_warning": ""}
    if caught:
        answer["gpu_warning"] = str(caught[0].message).splitlines()[0]
    if not available:
        return answer
    try:
        answer["gpus"] = [_gpu(index) for index in range(torch.cuda.device_count())]
        answer["arch_list"] = torch.cuda.get_arch_list()
        answer["tf32_convolutions"] = torch.backends.cudnn.allow_tf32
        answer["gpu_error"] = _compute_error() if compute else ""
    except (RuntimeError, AssertionError) as error:
        answer["gpu_error"] = _say(error)
    return answer


def _nccl_version() -> str | None:
    import torch.distributed

    if not torch.distributed.is_nccl_available():
        return None
    from torch.cuda import nccl

    version: object = nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _gpu(index: int) -> Answer:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "arch": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
    }


def _compute_error() -> str:
    """Add two numbers on every GPU: what a build for another GPU or a broken driver cannot do."""
    import torch

    for index in range(torch.cuda.device_count()):
        try:
            if (torch.ones(2, device=f"cuda:{index}") + 1).sum().item() != 4:
                return f"GPU {index} computes 1 + 1 wrongly"
        except RuntimeError as error:
            return f"GPU {index}: {_say(error)}"
    return ""


def _torchvision_error() -> str | None:
    """Why torchvision's operators cannot be used; empty where they can, None without torchvision."""
    import torch

    if "torchvision" in sys.modules:
        return "" if hasattr(torch.ops.torchvision, "roi_align") else "it has no operators"
    try:
        spec = find_spec("torchvision")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    files = [
        f for f in Path(spec.origin).parent.glob("_C*") if f.suffix in {".so", ".pyd", ".dylib"}
    ]
    if not files:
        return "its compiled operators are not there"
    try:
        torch.ops.load_library(files[0])
    except (OSError, RuntimeError, ImportError) as error:
        return f"its operators do not load into this torch: {_say(error.__cause__ or error)}"
    return _missing_operator() or _other_cuda()


def _missing_operator() -> str:
    import torch

    for name in ("roi_align", "nms"):
        if not hasattr(torch.ops.torchvision, name):
            return f"its operator {name} is not there"
    return ""


def _other_cuda() -> str:
    import torch

    cuda = torch.version.cuda
    if cuda is None or not hasattr(torch.ops.torchvision, "_cuda_version"):
        return ""
    built = int(torch.ops.torchvision._cuda_version())
    if built <= 0:
        return f"it was built without CUDA, torch for CUDA {cuda}"
    if built // 1000 != int(cuda.split(".")[0]):
        return f"it was built for CUDA {built // 1000}, torch for CUDA {cuda}"
    return ""


def _say(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


if __name__ == "__main__":
    main()
