"""Whether one detector is better than another, on the same images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from proxydet.errors import ConfigError
from proxydet.evaluation.bootstrap import Difference, differences
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import Evaluation, run_evaluation
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.reporting import SILENT, Progress

_LOG = logging.getLogger(__name__)


def compare_results(
    first: Path,
    second: Path,
    truth: GroundTruth,
    *,
    config: EvaluationConfig,
    groups: Mapping[str, NDArray[np.bool_]],
    progress: Progress = SILENT,
) -> dict[str, tuple[Difference, ...]]:
    """Compare two results files by pairs of resamples of the same images.

    Args:
        first: One detector's results.
        second: The other's.
        truth: The data set that both are of.
        config: How to score.
        groups: Sets of categories to average over.
        progress: Where progress is shown.

    Returns:
        By iou type (masks where both have them), one difference a metric: second minus first.

    Raises:
        DataError: A results file cannot be used.
        ConfigError: No resamples are to be drawn, or the protocol has none (OpenImages).
    """
    if not config.bootstrap:
        raise ConfigError("A comparison needs resamples.", hint="give --bootstrap at least 2")
    evaluations = [
        run_evaluation(results, truth, config=config, groups=groups, progress=progress)
        for results in (first, second)
    ]
    _tell_unmatched_masks(first, second, evaluations)
    compared = {}
    for kind in evaluations[0].scored:
        pair = [evaluation.scored.get(kind) for evaluation in evaluations]
        resamples = [part.resamples for part in pair if part is not None and part.resamples]
        if len(resamples) == 2:
            compared[kind] = differences(resamples[0], resamples[1], config.confidence)
    if not compared:
        raise ConfigError(
            f"Results on {truth.name} cannot be compared: its protocol has no resamples, or the two files share neither "
            "boxes nor masks."
        )
    return compared


def _tell_unmatched_masks(first: Path, second: Path, evaluations: Sequence[Evaluation]) -> None:
    """Warn where the masks of one file have nothing to be compared with."""
    with_masks = ["segm" in evaluation.scored for evaluation in evaluations]
    if with_masks[0] != with_masks[1]:
        lacking = second if with_masks[0] else first
        _LOG.warning("masks are not compared: not every detection of %s has one", lacking)
