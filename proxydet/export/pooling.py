"""RoIAlign over the pyramid with shapes that do not depend on the boxes.

The detector pools each box from its own level, level by level. Here every box is pooled from every level, and what is not
from its own is set to zero before the results are added up. On levels that are not its own a box is shrunk to a point:
where the samples follow from the size (ratio 0), that costs nothing.

Dimensions: N regions, C channels, S side of a pooled region.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.ops import roi_align

from proxydet.modeling.roi_align import RegionPooler


class ExportPooler(RegionPooler):
    """Same values as `proxydet.modeling.roi_align.RegionPooler`, by torchvision's operator.

    Args:
        pooler: The pooler to stand in for.
    """

    def __init__(self, pooler: RegionPooler) -> None:
        super().__init__(pooler.config, pooler.side)

    def forward(self, features: list[Tensor], boxes_N4: Tensor, image_N: Tensor) -> Tensor:
        """Pool every box: (N, C, S, S)."""
        level_N1 = self.level(boxes_N4)[:, None]
        index_N1 = image_N[:, None].to(boxes_N4.dtype)
        pooled = []
        for level, maps in zip(self.levels, features, strict=True):
            own_N1 = level_N1 == level
            rois_N5 = torch.cat([index_N1, torch.where(own_N1, boxes_N4, 0.0)], dim=1)
            cells = roi_align(
                maps,
                rois_N5,
                (self.side, self.side),
                spatial_scale=1.0 / 2**level,
                sampling_ratio=self.config.sampling_ratio,
                aligned=True,
            )
            pooled.append(torch.where(own_N1[:, :, None, None], cells, 0.0))
        return torch.stack(pooled).sum(dim=0)

    def parts(
        self,
        features: list[Tensor],
        boxes_N4: Tensor,
        image_N: Tensor,
        size: int,  # noqa: ARG002 the detector bounds memory by it
    ) -> Iterator[Tensor]:
        """Pool every box: in one part, since a picture's regions are few and the number of parts must be known."""
        yield self(features, boxes_N4, image_N)
