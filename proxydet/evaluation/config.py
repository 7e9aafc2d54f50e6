"""How detections are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from proxydet.errors import ConfigError

_IOU_TYPES = ("bbox", "segm")
_ENGINES = ("hotcoco", "lvis")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How detections are scored; the defaults are LVIS's and COCO's own protocols."""

    engine: Literal["hotcoco", "lvis"] = "hotcoco"
    """What computes precision and recall: hotcoco (fast), or lvis: the official evaluators (lvis, pycocotools)."""

    iou_types: tuple[str, ...] = ()
    """What is scored: bbox, segm, or both; empty: boxes, and masks where every detection has one."""

    max_detections: int = 300
    """The most detections of an image that LVIS's protocol counts, over all categories. COCO's has its own limits."""

    fixed: bool = False
    """Fixed AP (Dave et al. 2021): no limit an image, but one a category over the data set. Not comparable with AP."""

    fixed_detections: int = 10_000
    """Fixed AP's limit of detections a category."""

    fixed_per_image: int = 1000
    """Detections that a detector keeps of an image when its fixed AP is measured; a bound on memory only."""

    allow_outside: bool = False
    """Accept boxes that reach out of their image by more than a pixel; they are scored as they are."""

    batch_size: int = 1
    """Images that go through the detector at once, in one process."""

    def __post_init__(self) -> None:
        if self.engine not in _ENGINES:
            raise ConfigError(
                f"evaluation.engine is {self.engine!r}.", hint=f"use one of {', '.join(_ENGINES)}"
            )
        unknown = [value for value in self.iou_types if value not in _IOU_TYPES]
        if unknown or len(set(self.iou_types)) < len(self.iou_types):
            raise ConfigError(
                f"evaluation.iou_types is {list(self.iou_types)}.", hint="use bbox, segm, or both"
            )
        for name in ("max_detections", "fixed_detections", "fixed_per_image", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"evaluation.{name} is {getattr(self, name)}; it must be at least 1."
                )
