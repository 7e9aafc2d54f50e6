"""The files of an evaluation: results.json, per_category.csv, report.html."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proxydet.evaluation.analysis import (
    Calibration,
    ErrorBreakdown,
    break_down_errors,
    calibrate,
)
from proxydet.evaluation.evaluate import Evaluation
from proxydet.evaluation.page import write_page
from proxydet.evaluation.pictures import ImageReader
from proxydet.evaluation.recall import BoxRecall, box_recall
from proxydet.evaluation.tables import category_csv
from proxydet.reporting import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What lies behind the numbers, for boxes or masks; all None where the protocol has no matches (OpenImages).

    Attributes:
        errors: Errors by kind.
        calibration: Scores against precision.
        recall: Recall of boxes, classes left aside.
    """

    errors: ErrorBreakdown | None
    calibration: Calibration | None
    recall: tuple[BoxRecall, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None where there is nothing to measure."""
        calibration = None
        if self.calibration is not None:
            calibration = {
                "edges": self.calibration.edges.tolist(),
                "score": [_known(value) for value in self.calibration.score_B.tolist()],
                "precision": [_known(value) for value in self.calibration.precision_B.tolist()],
                "detections": self.calibration.count_B.tolist(),
                "error": self.calibration.error,
            }
        return {
            "errors": asdict(self.errors) if self.errors else None,
            "calibration": calibration,
            "box_recall": [asdict(value) for value in self.recall],
        }


def analyse(evaluation: Evaluation, progress: Progress = SILENT) -> Analysis:
    """Look behind the numbers of the masks, or of the boxes where no masks were scored.

    Raises:
        EnvironmentProblem: The engine failed.
    """
    scored = evaluation.scored.get("segm") or evaluation.scored.get("bbox")
    with progress.task("analysing errors", total=None):
        return Analysis(
            errors=break_down_errors(evaluation.truth, evaluation.results, scored)
            if scored
            else None,
            calibration=calibrate(scored.matches) if scored else None,
            recall=box_recall(evaluation.truth, evaluation.results),
        )


def write_files(
    evaluation: Evaluation,
    analysis: Analysis,
    folder: Path,
    *,
    read: ImageReader | None = None,
    commands: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write an evaluation's files.

    Args:
        evaluation: What was measured.
        analysis: What lies behind it.
        folder: Where to; made when it is not there.
        read: Reads an image by its id, for pictures of errors; None leaves them out.
        commands: Command lines to go on with, and what each does.

    Returns:
        The files by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**evaluation.report.to_dict(), "analysis": analysis.to_dict()}
    files = {
        "results.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        "per_category.csv": category_csv(evaluation.report),
    }
    written = {name: folder / name for name in files}
    for name, text in files.items():
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(written[name])
    written["report.html"] = write_page(
        evaluation,
        folder / "report.html",
        errors=analysis.errors,
        calibration=analysis.calibration,
        read=read,
        commands=commands or {},
    )
    return written


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
