"""What inference keeps of the scored regions. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from proxydet.errors import ConfigError
from proxydet.modeling.checks import require_positive, require_share

TTA_SCALES = (0.75, 1.0, 1.25)
"""Sizes of ``--tta``, times the usual one."""

_SMALLEST, _LARGEST = 0.1, 4.0


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """What is kept of the scored regions."""

    score_threshold: float = 0.02
    """Detections must score above this, in [0, 1]."""

    nms_iou: float = 0.5
    """Overlap above which the lower-scored of two detections of one class is dropped."""

    max_detections: int = 300
    """Best detections kept an image."""

    one_class_per_proposal: bool = False
    """Keep only the best class of each proposal, as the published demos do."""

    alpha: float = 0.15
    """Weight of the mixup branch for base classes, in [0, 1] (published without image labels: 0.35)."""

    beta: float = 0.35
    """Weight of the mixup branch for novel classes, in [0, 1] (published without image labels: 0.55)."""

    masks: bool = True
    """Whether masks are predicted for the detections, by a detector that has a mask head."""

    class_chunk: int = 2048
    """Classes that are scored at once: bounds the memory for large vocabularies."""

    flip: bool = False
    """Test-time augmentation: also look at the mirrored picture, and take the mean."""

    scales: tuple[float, ...] = (1.0,)
    """Test-time augmentation: sizes to look at each picture in, times its usual size; the mean is taken."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the backbone and the pyramid; fp16 and bf16 need a GPU."""

    def __post_init__(self) -> None:
        require_share(
            "inference",
            score_threshold=self.score_threshold,
            nms_iou=self.nms_iou,
            alpha=self.alpha,
            beta=self.beta,
        )
        require_positive(
            "inference", max_detections=self.max_detections, class_chunk=self.class_chunk
        )
        if not self.scales or not all(_SMALLEST <= scale <= _LARGEST for scale in self.scales):
            raise ConfigError(
                f"inference.scales is {list(self.scales)}: there must be at least one, each from {_SMALLEST} to {_LARGEST}"
            )

    @property
    def augmented(self) -> bool:
        """Whether each picture is looked at in more than its one usual view."""
        return self.flip or self.scales != (1.0,)
