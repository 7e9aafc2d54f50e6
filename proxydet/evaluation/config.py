"""How detections are scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proxydet.data.config import PROTOCOLS, Protocol
from proxydet.errors import ConfigError
from proxydet.modeling.config import require, require_positive, require_share

_IOU_TYPES = ("bbox", "segm")
_ENGINES = ("hotcoco", "lvis")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How detections are scored; the defaults are LVIS's and COCO's own protocols."""

    engine: Literal["hotcoco", "lvis"] = "hotcoco"
    """What computes precision and recall: hotcoco (fast), or lvis: the official evaluators (lvis, pycocotools)."""

    protocol: Protocol | None = None
    """Whose protocol: lvis (federated annotations), coco (exhaustive ones) or openimages; null: by what the annotations say."""

    iou_types: tuple[str, ...] = ()
    """What is scored: bbox, segm, or both; empty: boxes, and masks where the ground truth, the detector and its results
    all have them."""

    max_detections: int = 300
    """The most detections of an image that LVIS's protocol counts, over all categories. COCO's has its own limits."""

    score_threshold: float = 0.3
    """Precision, recall and false positives are also reported of the detections above this, in [0, 1], one label a box as ``predict``
    reports them; classes that have a threshold of their own have that. Average precision sees all detections."""

    fixed: bool = False
    """Fixed AP (Dave et al. 2021): no limit an image, but one a category over the data set. Not comparable with AP."""

    fixed_detections: int = 10_000
    """Fixed AP's limit of detections a category."""

    fixed_per_image: int = 1000
    """Detections that a detector keeps of an image when its fixed AP is measured; a bound on memory only."""

    hierarchy: Path | None = None
    """OpenImages' class hierarchy (JSON); with it AP50 is also measured on detections expanded by it."""

    allow_outside: bool = False
    """Accept boxes that reach out of their image by more than a pixel; they are scored as given."""

    allow_duplicates: bool = False
    """Accept results that hold every detection of every image more than once, as files that were joined twice do."""

    bootstrap: int = 200
    """Resamples of the images that confidence intervals are made from; 0 for no intervals."""

    confidence: float = 0.95
    """Confidence of the intervals."""

    seed: int = 0
    """Seed of the resamples."""

    batch_size: int = 1
    """Images that go through the detector at once, in one process. Others change detections by rounding only."""

    def __post_init__(self) -> None:
        if self.engine not in _ENGINES:
            raise ConfigError(
                f"evaluation.engine is {self.engine!r}.", hint=f"use one of {', '.join(_ENGINES)}"
            )
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ConfigError(
                f"evaluation.protocol is {self.protocol!r}.",
                hint=f"use one of {', '.join(PROTOCOLS)}, or null for what the annotations say",
            )
        unknown = [value for value in self.iou_types if value not in _IOU_TYPES]
        if unknown or len(set(self.iou_types)) < len(self.iou_types):
            raise ConfigError(
                f"evaluation.iou_types is {list(self.iou_types)}.", hint="use bbox, segm, or both"
            )
        require(
            self.bootstrap == 0 or self.bootstrap >= 2,
            f"evaluation.bootstrap must be 0, or at least 2, not {self.bootstrap}",
        )
        require(
            0 < self.confidence < 1,
            f"evaluation.confidence must be above 0 and below 1, not {self.confidence}",
        )
        require_share("evaluation", score_threshold=self.score_threshold)
        require(self.seed >= 0, f"evaluation.seed must not be negative, as {self.seed} is")
        sizes = ("max_detections", "fixed_detections", "fixed_per_image", "batch_size")
        require_positive("evaluation", **{name: getattr(self, name) for name in sizes})
