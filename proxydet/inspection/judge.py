"""What a difference from the published environment means, and why.

A rule looks at one fact and at all others (those that nobody knows have no value) and returns a verdict with its
reason. The reasons state what was measured or what the code does; where neither is known, the verdict is ``may change
results``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from proxydet.inspection.facts import Facts, numbers
from proxydet.inspection.report import Verdict

PUBLISHED_GPUS = 8
PUBLISHED_GPU_GIB = 32


class Judgement(NamedTuple):
    """A verdict and its reason."""

    verdict: Verdict
    reason: str = ""


Rule = Callable[[str | None, Facts], Judgement]

NOT_JUDGED = Judgement("not judged")


def note(_value: str | None, _facts: Facts) -> Judgement:
    """A field that is only told."""
    return NOT_JUDGED


def harmless(reason: str) -> Rule:
    """A field whose difference changes no number."""
    return lambda _value, _facts: Judgement("harmless", reason)


def changes(reason: str, *, missing: str = "") -> Rule:
    """A field whose difference may change numbers.

    Args:
        reason: How.
        missing: Why its absence fails; empty where absence is not judged.
    """

    def rule(value: str | None, _facts: Facts) -> Judgement:
        if value is None:
            return Judgement("will fail", missing) if missing else NOT_JUDGED
        return Judgement("may change results", reason)

    return rule


def needed(oldest: tuple[int, ...], missing: str, otherwise: Rule) -> Rule:
    """A field that must be there in a least version.

    Args:
        oldest: The least version.
        missing: What to do where it is absent or older.
        otherwise: The rule for the rest.
    """

    def rule(value: str | None, facts: Facts) -> Judgement:
        if value is None:
            return Judgement("will fail", missing)
        if numbers(value) < oldest:
            least = ".".join(map(str, oldest))
            return Judgement("will fail", f"{least} or later is needed; {missing}")
        return otherwise(value, facts)

    return rule


def platform(value: str | None, _facts: Facts) -> Judgement:
    """Anything but Linux."""
    del value
    return Judgement(
        "may change results", "training on several GPUs needs NCCL, which is on Linux only"
    )


def torch_import(value: str | None, facts: Facts) -> Judgement:
    """Whether torch can be imported at all."""
    if value is not None:
        return Judgement("same")
    if facts["torch"].value is None:
        return Judgement("will fail", "nothing runs without torch: reinstall proxydet")
    return Judgement("will fail", "torch is there but damaged, or built for other system libraries")


def torchvision_import(value: str | None, facts: Facts) -> Judgement:
    """Whether torchvision's operators load into this torch."""
    if value is not None:
        return Judgement("same")
    if facts["torchvision"].value is None:
        return Judgement("will fail", "RoIAlign and NMS are torchvision's: reinstall proxydet")
    return Judgement(
        "will fail", "RoIAlign and NMS are its operators: install the torchvision of this torch"
    )


def gpu(value: str | None, facts: Facts) -> Judgement:
    """Whether a GPU can be used."""
    problem = facts["gpu.available"].problem
    if value is None:
        return Judgement("will fail", "torch's CUDA or the driver is damaged: reinstall them")
    if value == "Yes":
        return Judgement("will fail", "the GPU does not compute") if problem else Judgement("same")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return Judgement("harmless", "CUDA_VISIBLE_DEVICES hides every GPU")
    if facts["driver"].value is not None:
        without = facts["torch.cuda"].value is None
        why = "torch was built without CUDA" if without else "torch cannot use it"
        return Judgement(
            "will fail", f"there is a GPU, but {why}: install a torch that this driver supports"
        )
    return Judgement(
        "harmless", "quickstart and prediction run on the CPU; the recipes of training need GPUs"
    )


def driver(_value: str | None, facts: Facts) -> Judgement:
    """A driver too old for torch's CUDA, or another than the published."""
    if facts["driver"].problem and facts["driver"].value is not None:
        return Judgement("will fail", "update the driver, or install a torch for an older CUDA")
    return Judgement("harmless", "kernels come with torch")


def gpu_names(value: str | None, facts: Facts) -> Judgement:
    """GPUs other than the published ones."""
    built = facts["torch.arch_list"].value or ""
    for arch in (value or "").split("arch=")[1:]:
        number = arch.split(")")[0].replace(".", "")
        if built and not _runs_on(number, built):
            return Judgement("will fail", f"this torch has no code for sm_{number}, only {built}")
    return Judgement(
        "may change results", "another GPU takes other kernels, which add in another order"
    )


def _runs_on(arch: str, built: str) -> bool:
    """Code for an older minor version of the same architecture runs, and so does portable code (compute_)."""
    for name in built.split(", "):
        kind, _, number = name.partition("_")
        number = number.rstrip("af")
        same_major = number[:-1] == arch[:-1] and int(number) <= int(arch)
        if (kind == "sm" and same_major) or (kind == "compute" and int(number) <= int(arch)):
            return True
    return False


def gpu_count(value: str | None, _facts: Facts) -> Judgement:
    """Another number of GPUs."""
    if value == str(PUBLISHED_GPUS):
        return Judgement("same")
    return Judgement(
        "may change results",
        f"the published batch is spread over {PUBLISHED_GPUS} GPUs, each drawing its own images",
    )


def gpu_memory(value: str | None, _facts: Facts) -> Judgement:
    """Less memory a GPU than the recipes were sized for."""
    least = min(float(part.split()[0]) for part in (value or "0 GiB").split("; "))
    if least >= PUBLISHED_GPU_GIB - 1:
        return Judgement("harmless", "enough for the published batch")
    return Judgement(
        "may change results", "the published batch may not fit; another changes results"
    )


def tf32(value: str | None, _facts: Facts) -> Judgement:
    """Convolutions in TF32, which the published GPUs did not have."""
    if value == "on":
        return Judgement(
            "may change results",
            "convolutions outside mixed precision round to 10 bits; the published ones did not",
        )
    return Judgement("same")


def unset(reason: str) -> Rule:
    """A variable that is best not set."""

    def rule(value: str | None, _facts: Facts) -> Judgement:
        same = value in {None, "<not set>"}
        return Judgement("same") if same else Judgement("may change results", reason)

    return rule


def roi_align(value: str | None, facts: Facts) -> Judgement:
    """The installed RoIAlign, next to the published change."""
    state = (value or "").split(" @")[0]
    if value is None:
        installed = facts["detectron2"].value is not None
        return Judgement(
            "will fail", "run: proxydet patch status" if installed else "run: proxydet setup"
        )
    if state == "applied" and not facts["roi_align"].problem:
        return Judgement("same")
    if state == "original" and not facts["roi_align"].problem:
        return Judgement(
            "harmless",
            "training's mode `published` makes the change at run time; other code: proxydet patch apply",
        )
    return Judgement("may change results", "run: proxydet patch status")


def dependencies(value: str | None, facts: Facts) -> Judgement:
    """Packages that proxydet declares and that are not there."""
    del value
    if facts["dependencies"].problem.startswith("not installed"):
        return Judgement("will fail", "reinstall proxydet in this environment")
    return NOT_JUDGED
