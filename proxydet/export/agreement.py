"""Whether an exported file finds what the detector finds.

Dimensions: N detections of one, M of the other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from proxydet.detector import Detector, to_network
from proxydet.export.found import Found, to_picture
from proxydet.modeling.prediction import Prediction
from proxydet.vocabulary.vocabulary import Vocabulary

IOU_ABOVE = 0.99
SCORE_WITHIN = 1e-4
MATCHED_AT_LEAST = 0.99
MASKS_WITHIN = 0.01

Pixels = npt.NDArray[np.uint8]


class Runner(Protocol):
    """An opened exported file."""

    def run(
        self, scaled_hw3: Pixels, vocabulary: Vocabulary, score_threshold: float
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Run its graph; see `proxydet.export.runtime.OnnxDetector.run`."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well an exported file agrees with the detector on one picture."""

    picture: str
    """Name of the picture."""
    classes: int
    """Classes that were looked for."""
    detections: int
    """Detections of the detector in torch."""
    exported: int
    """Detections of the exported file."""
    matched: int
    """Pairs of the same class with an IoU above 0.99 and scores within 1e-4."""
    largest_score_difference: float
    """Among the matched."""
    largest_mask_difference: float | None
    """Among the matched, of mask probabilities; None for a detector of boxes."""

    @property
    def share(self) -> float:
        """Matched detections as a share of the larger number; 1 where neither found anything."""
        larger = max(self.detections, self.exported)
        return self.matched / larger if larger else 1.0

    @property
    def good(self) -> bool:
        """Whether at least 99 % are matched, and their masks differ nowhere by more than 0.01."""
        return (
            self.share >= MATCHED_AT_LEAST and (self.largest_mask_difference or 0) <= MASKS_WITHIN
        )


def compare(
    detector: Detector,
    runner: Runner,
    pixels_HW3: Pixels,
    vocabulary: Vocabulary,
    *,
    name: str,
    score_threshold: float,
) -> Agreement:
    """Run both on a picture.

    Args:
        detector: The detector.
        runner: The exported file.
        pixels_HW3: The picture.
        vocabulary: What to look for.
        name: Of the picture.
        score_threshold: Detections that score at most this are left out.
    """
    scaled = to_network(pixels_HW3, detector.sides)
    size = (pixels_HW3.shape[0], pixels_HW3.shape[1])
    settings = dataclasses.replace(
        detector.inference, score_threshold=score_threshold, precision="fp32"
    )
    (wanted,) = detector.network.detect(
        [scaled], vocabulary, original_sizes=[size], settings=settings
    )
    image = np.ascontiguousarray(scaled.permute(1, 2, 0).numpy())
    outputs = runner.run(image, vocabulary, score_threshold)
    found = to_picture(outputs, image.shape[:2], size, vocabulary.names)
    return _agreement(wanted.to("cpu"), found, name, len(vocabulary))


def _agreement(wanted: Prediction, found: Found, name: str, classes: int) -> Agreement:
    first, second = _matches(wanted, found)
    scores = np.abs(wanted.scores_N.numpy()[first] - found.scores[second])
    masks: float | None = None
    if wanted.mask_probs_MSS is not None:
        assert found.mask_probs is not None
        assert found.mask_index is not None
        differences_PSS = (
            wanted.mask_probs_MSS.numpy()[wanted.mask_index_N.numpy()[first]]
            - found.mask_probs[found.mask_index[second]]
        )
        masks = float(np.abs(differences_PSS).max(initial=0.0))
    return Agreement(
        picture=name,
        classes=classes,
        detections=len(wanted),
        exported=len(found),
        matched=len(first),
        largest_score_difference=float(scores.max(initial=0.0)),
        largest_mask_difference=masks,
    )


def _matches(wanted: Prediction, found: Found) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Pair detections one to one, best first; return their places in both."""
    boxes_N4 = wanted.boxes_N4.numpy().astype(np.float64)
    boxes_M4 = found.boxes_xyxy.astype(np.float64)
    top_left = np.maximum(boxes_N4[:, None, :2], boxes_M4[None, :, :2])
    bottom_right = np.minimum(boxes_N4[:, None, 2:], boxes_M4[None, :, 2:])
    shared_NM = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    area_N, area_M = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes_N4, boxes_M4))
    close_NM = shared_NM > IOU_ABOVE * (area_N[:, None] + area_M[None, :] - shared_NM)
    close_NM &= wanted.classes_N.numpy()[:, None] == found.class_ids[None, :]
    gaps_NM = np.abs(wanted.scores_N.numpy()[:, None] - found.scores[None, :])
    close_NM &= gaps_NM <= SCORE_WITHIN
    pairs = []
    for place in range(len(boxes_N4)):
        (candidates,) = close_NM[place].nonzero()
        if len(candidates):
            chosen = candidates[gaps_NM[place, candidates].argmin()]
            close_NM[:, chosen] = False
            pairs.append((place, chosen))
    indices = np.array(pairs, dtype=np.intp).reshape(-1, 2)
    return indices[:, 0], indices[:, 1]
