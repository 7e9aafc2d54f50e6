"""Runs the RoIAlign that detectron2 really uses and compares it with an independent computation.

The verdict comes from running it in a fresh interpreter: a file on disk shows neither stale bytecode nor what replaces
the operator when Python starts.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from proxydet.errors import EnvironmentProblem
from proxydet.runtime.patch import patch_status
from proxydet.runtime.processes import call_in_new_process

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proxydet.runtime.roi_align import RoiGeometry

    Array = NDArray[np.float64]

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
    """Largest absolute difference between the two computations: what there is to tell apart."""

    repeats: dict[str, int] | None = None
    """On a GPU: backward passes, gradient elements, and elements that were not always the same."""

    notes: tuple[str, ...] = ()
    """Why the verdict is another than the file's content suggests."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        plain = asdict(self)
        plain["file"] = str(self.file)
        plain["notes"] = list(self.notes)
        return plain


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
        EnvironmentProblem: The operator does not run at all.
    """
    path = sys.path if search_path is None else search_path
    try:
        found = call_in_new_process(
            __name__, "measure", search_path=path, seconds=_SECONDS, device=device
        )
    except EnvironmentProblem as error:
        raise EnvironmentProblem(
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
            f"Python runs a compiled file of another source; `proxydet patch {command}` deletes it"
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

    from proxydet.runtime.roi_align import RoiGeometry

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = np.random.default_rng(4723)
    features_NCHW = generator.normal(size=(1, 3, 48, 52)).astype(np.float32)
    weight_KCPQ = generator.normal(size=(len(_BOXES_N4), 3, 2, 2)).astype(np.float32)

    features = torch.tensor(features_NCHW, device=device, requires_grad=True)
    pooler = ROIPooler(2, [1 / _STRIDE], sampling_ratio=0, pooler_type="ROIAlignV2")
    pooled = pooler([features], [Boxes(torch.tensor(_BOXES_N4, device=device))])
    (pooled * torch.tensor(weight_KCPQ, device=device)).sum().backward()
    if features.grad is None:
        raise RuntimeError("the operator passed no gradient back")
    values, gradient = pooled.detach().cpu().numpy(), features.grad.cpu().numpy()

    def rounded(array: Any) -> Any:
        return array.astype(np.float16).astype(array.dtype)

    boxes_K4 = np.asarray(_BOXES_N4, dtype=np.float32)
    geometry = RoiGeometry(
        output_size=(2, 2), spatial_scale=1 / _STRIDE, sampling_ratio=0, aligned=True
    )
    figures: dict[str, float] = {}
    computed = {}
    for name, rounding in (("published", rounded), ("plain", lambda array: array)):
        boxes_K5 = np.insert(rounding(boxes_K4).astype(np.float64), 0, 0, axis=1)
        computed[name] = pool(rounding(features_NCHW).astype(np.float64), boxes_K5, geometry)
        expected = rounding(
            pool_gradient(weight_KCPQ.astype(np.float64), boxes_K5, features_NCHW.shape, geometry)
        )
        figures[f"values_from_{name}"] = float(np.abs(values - computed[name]).max())
        figures[f"gradient_from_{name}"] = float(np.abs(gradient - expected).max())
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "operator": str(Path(sys.modules[layers.ROIAlign.__module__].__file__ or "")),
        "dtype": str(values.dtype),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": d2.INSTALLED.version,
        "figures": figures,
        "between_the_two": float(np.abs(computed["published"] - computed["plain"]).max()),
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


def pool(features_NCHW: Array, boxes_K5: Array, geometry: RoiGeometry) -> Array:
    """Pool boxes out of feature maps.

    Args:
        features_NCHW: Feature maps.
        boxes_K5: Image index, x1, y1, x2, y2 in pixels.
        geometry: Bins, scale and sampling.

    Returns:
        Pooled features (K, C, P, Q).
    """
    import numpy as np

    pooled_KCPQ = np.zeros((len(boxes_K5), features_NCHW.shape[1], *geometry.output_size))
    for box, bin_y, bin_x, image, y, x, weight in _cells(boxes_K5, features_NCHW.shape, geometry):
        pooled_KCPQ[box, :, bin_y, bin_x] += weight * features_NCHW[image, :, y, x]
    return pooled_KCPQ


def pool_gradient(
    grad_KCPQ: Array, boxes_K5: Array, shape: tuple[int, ...], geometry: RoiGeometry
) -> Array:
    """Gradient of :func:`pool` with regard to the features.

    Args:
        grad_KCPQ: Gradient of the pooled features.
        boxes_K5: Image index, x1, y1, x2, y2 in pixels.
        shape: (N, C, H, W) of the features.
        geometry: Bins, scale and sampling.

    Returns:
        Gradient of the features (N, C, H, W).
    """
    import numpy as np

    grad_NCHW = np.zeros(shape)
    for box, bin_y, bin_x, image, y, x, weight in _cells(boxes_K5, shape, geometry):
        grad_NCHW[image, :, y, x] += weight * grad_KCPQ[box, :, bin_y, bin_x]
    return grad_NCHW


def _cells(
    boxes_K5: Array, shape: tuple[int, ...], geometry: RoiGeometry
) -> Iterator[tuple[int, int, int, int, int, int, float]]:
    """Every (box, bin row, bin column, image, cell row, cell column, weight) that contributes."""
    rows, columns = geometry.output_size
    for box, (image, x1, y1, x2, y2) in enumerate(boxes_K5):
        along_y = _samples(y1, y2, rows, geometry)
        along_x = _samples(x1, x2, columns, geometry)
        for bin_y, y_points in enumerate(along_y):
            for bin_x, x_points in enumerate(along_x):
                share = 1 / max(len(y_points) * len(x_points), 1)
                for y in y_points:
                    for x in x_points:
                        for row, weight_y in _neighbours(y, shape[2]):
                            for column, weight_x in _neighbours(x, shape[3]):
                                weight = share * weight_y * weight_x
                                yield box, bin_y, bin_x, int(image), row, column, weight


def _samples(start: float, end: float, bins: int, geometry: RoiGeometry) -> list[list[float]]:
    """Sample coordinates of each bin along one axis, in feature cells."""
    shift = 0.5 if geometry.aligned else 0.0
    low, high = start * geometry.spatial_scale - shift, end * geometry.spatial_scale - shift
    extent = high - low if geometry.aligned else max(high - low, 1.0)
    count = geometry.sampling_ratio if geometry.sampling_ratio > 0 else math.ceil(extent / bins)
    step = extent / bins
    return [
        [low + index * step + (sample + 0.5) * step / count for sample in range(count)]
        for index in range(bins)
    ]


def _neighbours(coordinate: float, cells: int) -> list[tuple[int, float]]:
    """The one or two cells around a coordinate and their linear weights; none where it lies outside."""
    if not -1.0 <= coordinate <= cells:
        return []
    inside = max(coordinate, 0.0)
    low = int(inside)
    if low >= cells - 1:
        return [(cells - 1, 1.0)]
    return [(low, 1.0 - (inside - low)), (low + 1, inside - low)]
