"""Runs the RoIAlign that detectron2 really uses and compares it with an independent computation.

The verdict comes from running it in a fresh interpreter: a file on disk shows neither stale bytecode nor what replaces
the operator when Python starts.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from proxydet.errors import RuntimeEnvironmentError
from proxydet.runtime.patch import patch_status
from proxydet.runtime.processes import call_in_new_process

if TYPE_CHECKING:
    from torch import Tensor

Verdict = Literal["active", "not active", "altered"]

TOLERANCE = 2e-5
"""Largest difference from an independent computation that float32 sums explain, for values around 1."""

_HALF_STEP = 1e-3
"""Half precision's step at 1: the published gradient is rounded to it, and a tie may round either way."""

_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class RoiAlignReport:
    """Which RoIAlign ran, and the figures that show it."""

    verdict: Verdict
    """``active``: the published change; ``not active``: detectron2's own operator; ``altered``: neither."""
    file: Path
    """The source file of the operator that ran."""
    file_state: str
    """What that file holds: ``original``, ``applied``, ``half``, ``altered`` or ``missing``."""
    device: str
    """Where it ran: ``cpu`` or the GPU's name."""
    versions: dict[str, str]
    """torch, torchvision and detectron2."""
    figures: dict[str, float]
    """Largest absolute differences of values and gradient from the published and from the plain computation."""
    between_the_two: float
    """Largest absolute difference between the two computations: how far apart they are."""
    repeats: dict[str, int] | None = None
    """On a GPU: backward passes, gradient elements, and elements that were not always the same."""
    notes: tuple[str, ...] = ()
    """Why the verdict is another than the file's content suggests."""


def verify_roi_align(
    *, device: Literal["cpu", "cuda"] | None = None, search_path: Sequence[str] | None = None
) -> RoiAlignReport:
    """Run detectron2's RoIAlign in a fresh interpreter and compare it with an independent computation.

    The inputs are such that the published and the plain operator give different values: features and boxes that
    half precision cannot hold, with boxes beyond 1,024 pixels.

    Args:
        device: Where to run it; None takes a GPU where there is one.
        search_path: Python's search path for the fresh interpreter; None for this process's own.

    Returns:
        The verdict with its figures.

    Raises:
        RuntimeEnvironmentError: The operator does not run at all.
    """
    path = sys.path if search_path is None else search_path
    try:
        found = call_in_new_process(
            __name__, "measure", search_path=path, seconds=_SECONDS, device=device
        )
    except RuntimeEnvironmentError as error:
        raise RuntimeEnvironmentError(
            f"detectron2's RoIAlign does not run: {error.message}",
            hint="run: proxydet patch status, and: proxydet env --check",
        ) from error
    file = Path(found["operator"])
    status = patch_status(file)
    verdict = verdict_of(found)
    notes: tuple[str, ...] = ()
    if {"applied": "active", "original": "not active"}.get(status.state, verdict) != verdict:
        command = "apply" if status.state == "applied" else "revert"
        notes = (
            f"Python runs stale bytecode, compiled from another source; `proxydet patch {command}` deletes it"
            if status.stale_bytecode
            else "the operator differs from its source file: something replaces it when Python starts "
            "(a .pth file, sitecustomize), or torchvision's own operator differs",
        )
    return RoiAlignReport(
        verdict=verdict,
        file=file,
        file_state=status.state,
        device=found["device"],
        versions={name: found[name] for name in ("torch", "torchvision", "detectron2")},
        figures=found["figures"],
        between_the_two=found["between_the_two"],
        repeats=found["repeats"],
        notes=notes,
    )


def verdict_of(found: dict[str, Any]) -> Verdict:
    """Name the operator that :func:`measure` ran."""
    figures = found["figures"]
    if found["dtype"] != "float32":
        return "altered"
    values, gradient = figures["values_from_published"], figures["gradient_from_published"]
    if values < TOLERANCE and gradient < _HALF_STEP:
        return "active"
    values, gradient = figures["values_from_plain"], figures["gradient_from_plain"]
    return "not active" if values < TOLERANCE and gradient < TOLERANCE else "altered"


# ---- in the fresh interpreter ----------------------------------------------------------------------------------------

_STRIDE = 32
_BOXES_N4 = (
    (3.37, 9.91, 120.26, 77.13),
    (1040.46, 1100.37, 1301.41, 1201.62),
    (700.3, 1029.4, 1500.45, 1340.2),
)
"""Pixels; all coordinates have fractions that half precision cannot hold, those beyond 1,024 lose them whole."""

_REPEATS = 50


def measure(device: str | None) -> dict[str, Any]:
    """Compare the operator's values and gradient with the published and the plain computation.

    Args:
        device: ``"cpu"`` or ``"cuda"``; None takes a GPU where there is one.

    Returns:
        Largest absolute differences from the published and from the plain operator, for values and gradient, what
        was run, and on a GPU how many gradient elements differ between repeated backward passes.
    """
    warnings.simplefilter("ignore")
    import proxydet.runtime.d2 as d2

    import numpy as np
    import torch
    import torchvision
    from detectron2 import layers
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    from proxydet.runtime.roi_align import RoiGeometry, interpolation_matrices

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = np.random.default_rng(4723)
    features_1CHW = torch.from_numpy(generator.normal(size=(1, 3, 48, 52))).float()
    weight_KCPQ = torch.from_numpy(generator.normal(size=(len(_BOXES_N4), 3, 2, 2))).float()
    boxes_K4 = torch.tensor(_BOXES_N4)

    features = features_1CHW.to(device).requires_grad_()
    pooler = ROIPooler(2, [1 / _STRIDE], sampling_ratio=0, pooler_type="ROIAlignV2")
    pooled = pooler([features], [Boxes(boxes_K4.to(device))])
    (pooled * weight_KCPQ.to(device)).sum().backward()
    if features.grad is None:
        raise RuntimeError("the operator passed no gradient back")

    geometry = RoiGeometry(
        output_size=(2, 2), spatial_scale=1 / _STRIDE, sampling_ratio=0, aligned=True
    )
    figures: dict[str, float] = {}
    computed = {}
    for name in ("published", "plain"):
        # The published change rounds features, boxes and gradient.
        rounded = torch.Tensor.half if name == "published" else torch.Tensor.double
        cells_CHW, boxes = rounded(features_1CHW[0]).double(), rounded(boxes_K4).double()
        weights = interpolation_matrices(boxes, (48, 52), geometry)
        computed[name] = torch.einsum("kph,chw,kqw->kcpq", weights[0], cells_CHW, weights[1])
        gradient = torch.einsum("kph,kcpq,kqw->chw", weights[0], weight_KCPQ.double(), weights[1])
        figures[f"values_from_{name}"] = _distance(pooled, computed[name])
        figures[f"gradient_from_{name}"] = _distance(features.grad[0], rounded(gradient))
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "operator": str(Path(sys.modules[layers.ROIAlign.__module__].__file__ or "")),
        "dtype": str(pooled.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": d2.INSTALLED.version,
        "figures": figures,
        "between_the_two": _distance(computed["published"], computed["plain"]),
        "repeats": _count_differing() if device == "cuda" else None,
    }


def _count_differing() -> dict[str, int]:
    """Repeat one backward pass on the GPU and count the gradient elements that are not always the same."""
    import torch
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    torch.manual_seed(0)
    features = torch.randn((2, 64, 80, 80), device="cuda", requires_grad=True)
    corners = torch.rand((2, 500, 2, 2), device="cuda") * 640
    boxes = [Boxes(torch.cat([c.amin(1), c.amax(1)], dim=1)) for c in corners]
    pooler = ROIPooler(7, [1 / 8], sampling_ratio=0, pooler_type="ROIAlignV2")
    weight = torch.randn((1000, 64, 7, 7), device="cuda")
    first, differing = None, torch.zeros(features.shape, dtype=torch.bool, device="cuda")
    for _ in range(_REPEATS):
        (gradient,) = torch.autograd.grad((pooler([features], boxes) * weight).sum(), [features])
        first = gradient if first is None else first
        differing |= gradient != first
    return {
        "times": _REPEATS,
        "elements": features.numel(),
        "differing": int(differing.sum().item()),
    }


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first.detach().cpu().double() - second.double()).abs().max())
