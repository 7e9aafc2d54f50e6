"""What inference keeps of the scored regions. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from proxydet.modeling.checks import require_positive, require_share


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
    """Whether masks are predicted for the detections."""

    class_chunk: int = 2048
    """Classes that are scored at once: bounds the memory for large vocabularies."""

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
