"""When two sets of detections count as the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

from proxydet.detector import Detector
from proxydet.export.agreement import Agreement, _agreement, compare
from proxydet.export.drawn import drawn_picture
from proxydet.export.found import Found

Outputs = dict[str, np.ndarray]


class Altered:
    """The detector itself as an exported file, with its outputs changed."""

    def __init__(self, detector: Detector, change: Callable[[Outputs], None]) -> None:
        self.detector, self.change = detector, change

    def run(self, scaled_hw3, vocabulary, score_threshold) -> Outputs:
        settings = self.detector.settings(score_threshold=score_threshold, max_detections=300)
        image = torch.from_numpy(scaled_hw3).permute(2, 0, 1)
        (found,) = self.detector.network.detect([image], vocabulary, settings=settings)
        outputs = {
            "boxes": found.boxes_N4.numpy().copy(),
            "scores": found.scores_N.numpy().copy(),
            "classes": found.classes_N.numpy().copy(),
            "masks": found.mask_probs_MSS.numpy().copy(),
            "mask_index": found.mask_index_N.numpy().copy(),
        }
        self.change(outputs)
        return outputs


def agreement(
    detector: Detector, tiny: ModuleType, change: Callable[[Outputs], None], threshold: float = 0.02
) -> Agreement:
    return compare(
        detector,
        Altered(detector, change),
        drawn_picture(100, 140),
        tiny.vocabulary(4),
        name="drawn",
        score_threshold=threshold,
    )


def test_the_same_agrees_in_full(detector: Detector, tiny: ModuleType) -> None:
    result = agreement(detector, tiny, lambda _outputs: None)
    assert result.detections > 10
    assert result.matched == result.detections == result.exported
    assert result.share == 1.0
    assert result.good
    assert result.largest_score_difference == 0.0


def shift_boxes(outputs: Outputs) -> None:
    outputs["boxes"] += [5, 0, 5, 0]


def lower_scores(outputs: Outputs) -> None:
    outputs["scores"] -= 1e-3


def change_classes(outputs: Outputs) -> None:
    outputs["classes"] = (outputs["classes"] + 1) % 4


@pytest.mark.parametrize("change", [shift_boxes, lower_scores, change_classes])
def test_each_difference_counts(
    detector: Detector, tiny: ModuleType, change: Callable[[Outputs], None]
) -> None:
    result = agreement(detector, tiny, change)
    assert result.share < 0.5
    assert not result.good


def test_detections_that_are_missing_or_doubled_count(detector: Detector, tiny: ModuleType) -> None:
    def double(outputs: Outputs) -> None:
        for name in ("boxes", "scores", "classes", "mask_index"):
            outputs[name] = np.concatenate([outputs[name], outputs[name]])

    def halve(outputs: Outputs) -> None:
        for name in ("boxes", "scores", "classes", "mask_index"):
            outputs[name] = outputs[name][::2]

    assert agreement(detector, tiny, double).share == 0.5
    assert agreement(detector, tiny, halve).share <= 0.51


def test_masks_that_differ_are_told(detector: Detector, tiny: ModuleType) -> None:
    def change(outputs: Outputs) -> None:
        outputs["masks"] = outputs["masks"] * 0.5

    result = agreement(detector, tiny, change)
    assert result.largest_mask_difference > 0.1
    assert result.share == 1.0
    assert not result.good


def test_nothing_in_both_agrees(detector: Detector, tiny: ModuleType) -> None:
    result = agreement(detector, tiny, lambda _outputs: None, threshold=0.9999)
    assert result.detections == 0
    assert result.good


def test_a_detection_is_matched_once_only(detector: Detector, tiny: ModuleType) -> None:
    image = torch.from_numpy(drawn_picture(100, 140)).permute(2, 0, 1)
    (found,) = detector.network.detect([image], tiny.vocabulary(4))
    first = found.scores_N.argmax().repeat(2)
    doubled = dataclasses.replace(
        found,
        boxes_N4=found.boxes_N4[first],
        scores_N=found.scores_N[first],
        classes_N=found.classes_N[first],
        mask_index_N=found.mask_index_N[first],
    )
    single = Found(
        boxes_xyxy=doubled.boxes_N4[:1].numpy(),
        scores=doubled.scores_N[:1].numpy(),
        class_ids=doubled.classes_N[:1].numpy(),
        labels=("one",),
        image_size=(100, 140),
        mask_probs=found.mask_probs_MSS.numpy(),
        mask_index=doubled.mask_index_N[:1].numpy(),
    )
    result = _agreement(doubled, single, "drawn", 4)
    assert (result.detections, result.exported, result.matched) == (2, 1, 1)
    assert not result.good
