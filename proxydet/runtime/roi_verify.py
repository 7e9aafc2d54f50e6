"""Proves by running which RoIAlign the installed detectron2 uses: the published one, its own, or another."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from proxydet.errors import EnvironmentProblem
from proxydet.runtime.patch import patch_status

Verdict = Literal["active", "not active", "altered"]

_TOLERANCE = 2e-5
"""Largest difference from an independent computation that float32 sums explain, for values around 1."""

_HALF_STEP = 1e-3
"""Half precision's step at 1: the published gradient is rounded to it, and a tie may fall either way."""

_TIME_LIMIT = 600

# The child searches the same folders in the same order as its parent, whatever started the parent.
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module('proxydet.runtime.roi_probe', run_name='__main__', alter_sys=True)"
)


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
    """What explains a verdict that the file's content would not suggest."""

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
    if device is None:
        device = "cuda" if _has_gpu() else "cpu"
    found = _measure(device, list(sys.path if search_path is None else search_path))
    file = Path(found["operator"])
    status = patch_status(file)
    verdict = _verdict(found)
    return RoiAlignReport(
        verdict=verdict,
        file=file,
        file_state=status.state,
        device=found["device"],
        versions={name: found[name] for name in ("torch", "torchvision", "detectron2")},
        figures=found["figures"],
        between_the_two=found["between_the_two"],
        repeats=found["repeats"],
        notes=_notes(verdict, status.state, stale=bool(status.stale_bytecode)),
    )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _measure(device: str, search_path: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="proxydet-verify-") as folder:
        answer = Path(folder) / "answer.json"
        # -B: looking must not leave bytecode in the installation.
        command = [sys.executable, "-B", "-c", _START, json.dumps(search_path), str(answer), device]
        try:
            done = subprocess.run(  # noqa: S603 - a list, no shell, our own module
                command, capture_output=True, text=True, timeout=_TIME_LIMIT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise EnvironmentProblem(
                f"detectron2's RoIAlign did not answer within {_TIME_LIMIT} s.",
                hint="run: proxydet env",
            ) from error
        if done.returncode != 0 or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["it wrote no message"])[-1]
            raise EnvironmentProblem(
                f"detectron2's RoIAlign does not run (exit code {done.returncode}): {last}",
                hint="run: proxydet patch status, and: proxydet env --check",
            )
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _verdict(found: dict[str, Any]) -> Verdict:
    figures = found["figures"]
    if found["dtype"] != "float32":
        return "altered"
    values, gradient = figures["values_from_published"], figures["gradient_from_published"]
    if values < _TOLERANCE and gradient < _HALF_STEP:
        return "active"
    values, gradient = figures["values_from_plain"], figures["gradient_from_plain"]
    if values < _TOLERANCE and gradient < _TOLERANCE:
        return "not active"
    return "altered"


def _notes(verdict: Verdict, state: str, *, stale: bool) -> tuple[str, ...]:
    expected = {"applied": "active", "original": "not active"}.get(state)
    if expected is None or expected == verdict:
        return ()
    if stale:
        verb = "apply" if state == "applied" else "revert"
        return (
            f"Python runs a compiled file of another source; `proxydet patch {verb}` deletes it",
        )
    return (
        "the operator does not do what its source file says: something replaces it when Python starts "
        "(a .pth file, sitecustomize), or torchvision's own operator differs",
    )
