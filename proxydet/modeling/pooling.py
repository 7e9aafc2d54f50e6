"""Pooling of regions from the pyramid level that fits their size.

Dimensions: N regions, C channels, S side of a pooled region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import proxydet.compat.d2  # noqa: F401

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn

from proxydet.compat.roi_align import current_mode
from proxydet.modeling.config import CascadeConfig
from proxydet.modeling.geometry import areas
from proxydet.modeling.region_align import RegionGrid, align_regions


class RegionPooler(nn.Module):
    """Aligned RoIAlign over several levels (Lin et al. 2017, equation 1, chooses the level).

    Args:
        config: Levels and the size that belongs to one of them.
        side: S.
    """

    def __init__(self, config: CascadeConfig, side: int) -> None:
        super().__init__()
        self.levels = config.pool_levels
        self.side = side
        self.config = config
        # detectron2's own layer, so that a repair of its roi_align reaches this one. On a CPU there is nothing to
        # repair (no atomics), and a faster way; the published rounding is kept where it is asked for.
        self.level_poolers = nn.ModuleList(
            ROIAlign((side, side), 1.0 / 2**level, config.sampling_ratio, aligned=True)
            for level in self.levels
        )
        self._grid = RegionGrid(
            side=side,
            scales=[1.0 / 2**level for level in self.levels],
            sampling_ratio=config.sampling_ratio,
        )

    def forward(self, features: list[Tensor], boxes_N4: Tensor, image_N: Tensor) -> Tensor:
        """Pool every box.

        Args:
            features: Maps (B, C, H, W) of ``levels``, finest first.
            boxes_N4: xyxy pixels.
            image_N: int64, which image each box belongs to.

        Returns:
            (N, C, S, S). Waits for the device once, whatever N is.
        """
        (pooled,) = self.parts(features, boxes_N4, image_N, max(len(boxes_N4), 1))
        return pooled

    def parts(
        self, features: list[Tensor], boxes_N4: Tensor, image_N: Tensor, size: int
    ) -> Iterator[Tensor]:
        """Pool every box, at most ``size`` boxes at once, so that the caller can bound its memory.

        Args:
            features: Maps (B, C, H, W) of ``levels``, finest first.
            boxes_N4: xyxy pixels.
            image_N: int64, which image each box belongs to.
            size: Boxes of a part.

        Yields:
            (n, C, S, S) of one part after the other; at least one, which may be empty. Waits for the device once.
        """
        # Boxes that are not finite have no level; whoever made them checks for them once a batch.
        boxes_N4 = boxes_N4.nan_to_num(nan=0.0)
        rois_N5 = torch.cat([image_N[:, None].to(boxes_N4.dtype), boxes_N4], dim=1)
        parts = rois_N5.split(size)
        if boxes_N4.device.type == "cpu" and current_mode() != "published":
            for rois, own in zip(parts, self._position(boxes_N4).split(size), strict=True):
                yield align_regions(features, rois, own, self._grid)
            return
        if len(self.levels) == 1:
            yield from (self.level_poolers[0](features[0], rois) for rois in parts)
            return
        position_N = self._position(boxes_N4)
        positions_L = torch.arange(len(self.levels), device=boxes_N4.device)
        counts = torch.stack(
            [(own[:, None] == positions_L).sum(dim=0) for own in position_N.split(size)]
        ).tolist()
        for rois, own, per_level in zip(parts, position_N.split(size), counts, strict=True):
            yield self._pool_part(features, rois, own.argsort(stable=True).split(per_level))

    def _pool_part(
        self, features: list[Tensor], rois_N5: Tensor, rows_of_level: Sequence[Tensor]
    ) -> Tensor:
        output = features[0].new_zeros(len(rois_N5), features[0].shape[1], self.side, self.side)
        for pooler, maps, rows in zip(self.level_poolers, features, rows_of_level, strict=True):
            output.index_put_((rows,), pooler(maps, rois_N5[rows]))
        return output

    def _position(self, boxes_N4: Tensor) -> Tensor:
        """Return the place among the levels of the one that each box is pooled from: int64 (N,)."""
        return self.level(boxes_N4) - self.levels[0]

    def level(self, boxes_N4: Tensor) -> Tensor:
        """Return the level that each box is pooled from: int64 (N,)."""
        size, level = self.config.canonical_size, self.config.canonical_level
        # The small number keeps empty boxes at a finite level and equals the published rounding.
        octaves_N = torch.log2(areas(boxes_N4).clamp(min=0).sqrt() / size + 1e-8)
        return torch.floor(level + octaves_N).clamp(self.levels[0], self.levels[-1]).long()
