"""Suppression by ONNX's own operator, which stops early and takes all classes at once.

While a detector is traced, two operators stand for it; each is then translated to ``NonMaxSuppression``. They exist in the
exporting process only: the ONNX file holds none of them.

Dimensions: K boxes, R regions, C classes, L pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from proxydet.export.suppression import filled
from proxydet.modeling.config import InferenceConfig


class OnnxSuppression:
    """`proxydet.export.suppression.Suppression` that becomes ONNX's operator; it can be traced, not run."""

    def keep_best(self, boxes_K4: Tensor, scores_K: Tensor, iou: float, limit: int) -> Tensor:
        """See `Suppression.keep_best`; boxes that score 0 are left out."""
        floor = scores_K.new_zeros(())
        kept_L3 = _operator()(boxes_K4, scores_K[None], floor, iou, limit)
        return filled(kept_L3[:, 2], limit, scores_K)

    def keep_best_by_class(
        self,
        boxes_R4: Tensor,
        scores_RC: Tensor,
        score_threshold: Tensor,
        settings: InferenceConfig,
    ) -> tuple[Tensor, Tensor]:
        """See `Suppression.keep_best_by_class`."""
        limit = settings.max_detections
        kept_L3 = _operator()(boxes_R4, scores_RC.T, score_threshold, settings.nms_iou, limit)
        return kept_L3[:, 2], kept_L3[:, 1]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export` makes of the operator."""
    from onnxscript import opset18

    op: Any = opset18  # typed for scripts, not for tracing

    def suppress(
        boxes_K4: Any, scores_CK: Any, score_threshold: Any, iou: float, limit: int
    ) -> Any:
        return op.NonMaxSuppression(
            op.Unsqueeze(boxes_K4, [0]),
            op.Unsqueeze(scores_CK, [0]),
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[iou]),
            op.Reshape(score_threshold, [1]),
        )

    return {_operator(): suppress}


@lru_cache(maxsize=1)
def _operator() -> Any:
    """Register the operator once in the process, and return it.

    It takes boxes (K, 4), scores (C, K), a score threshold, an overlap and a limit for each class, and returns
    ``NonMaxSuppression``'s rows (L, 3): 0, class, box; of each class best first.
    """
    # It has no kernel: nothing ever runs it.
    torch.library.define(
        "proxydet::suppress",
        "(Tensor boxes, Tensor scores, Tensor score_threshold, float iou, int limit) -> Tensor",
    )

    def shapes(boxes: Tensor, *_others: object) -> Tensor:
        rows = torch.library.get_ctx().new_dynamic_size()
        return boxes.new_empty((rows, 3), dtype=torch.int64)

    torch.library.register_fake("proxydet::suppress", shapes)
    return torch.ops.proxydet.suppress.default
