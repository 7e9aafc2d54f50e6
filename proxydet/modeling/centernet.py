"""Class-agnostic CenterNet proposals (Zhou et al. 2021, arXiv 2103.07461).

Every cell of every pyramid level says how likely an object's centre lies in it and how far the object's sides are.

Dimensions: B images, H and W cells of a level, P proposals of an image (padded).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from proxydet.errors import NumericsError
from proxydet.modeling.config import ProposalConfig
from proxydet.modeling.geometry import cell_centres
from proxydet.modeling.nms import NmsInput, suppress

# Boxes are widened to this many pixels, so that none is empty.
_SMALLEST_SIDE = 0.01


@dataclass(frozen=True, kw_only=True)
class CenterNetOutput:
    """What the head says of every cell, a tensor a level, finest first.

    Attributes:
        heatmaps: (B, 1, H, W) logits.
        distances: (B, 4, H, W), left, top, right, bottom in strides, not negative.
        strides: Pixels a cell, a level.
    """

    heatmaps: tuple[Tensor, ...]
    distances: tuple[Tensor, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Boxes that may hold an object, best first.

    Attributes:
        boxes_BP4: xyxy pixels, not clipped to the image; zero where padded.
        scores_BP: In [0, 1]; zero where padded.
        valid_BP: bool, False where padded.
    """

    boxes_BP4: Tensor
    scores_BP: Tensor
    valid_BP: Tensor


class Scale(nn.Module):
    """A learnt factor, one for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        """Multiply."""
        return values * self.scale


class CenterNetHead(nn.Module):
    """Convolutions shared by all levels.

    Args:
        config: Sizes and starting values.
        channels: Channels of the pyramid.
        levels: Number of levels.
    """

    def __init__(self, config: ProposalConfig, channels: int, levels: int) -> None:
        super().__init__()
        tower: list[nn.Module] = []
        for _ in range(config.convs):
            tower += [
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(config.norm_groups, channels),
                nn.ReLU(),
            ]
        self.bbox_tower = nn.Sequential(*tower)
        self.agn_hm = nn.Conv2d(channels, 1, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        odds = config.initial_probability / (1 - config.initial_probability)
        nn.init.constant_(self.agn_hm.bias, math.log(odds))  # type: ignore[arg-type]
        nn.init.constant_(self.bbox_pred.bias, config.initial_distance)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return heatmap logits (B, 1, H, W) and distances (B, 4, H, W), one a level."""
        heatmaps, distances = [], []
        for maps, scale in zip(features, self.scales, strict=True):
            hidden = self.bbox_tower(maps)
            heatmaps.append(self.agn_hm(hidden))
            distances.append(functional.relu(scale(self.bbox_pred(hidden))))
        return tuple(heatmaps), tuple(distances)


class CenterNet(nn.Module):
    """The proposal network.

    Args:
        config: Sizes and limits.
        channels: Channels of the pyramid.
        strides: Stride of every level, finest first.
    """

    def __init__(self, config: ProposalConfig, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.strides = strides
        self.centernet_head = CenterNetHead(config, channels, len(strides))

    def forward(self, features: list[Tensor]) -> CenterNetOutput:
        """Run the head on the pyramid's maps, finest first."""
        heatmaps, distances = self.centernet_head(features)
        return CenterNetOutput(heatmaps=heatmaps, distances=distances, strides=self.strides)

    @torch.no_grad()
    def propose(
        self, output: CenterNetOutput, *, keep: int | None = None, check: bool = False
    ) -> Proposals:
        """Turn the head's output into boxes.

        Args:
            output: What `forward` returned.
            keep: Proposals to keep an image at most; None takes the configured number for training or inference.
            check: Whether to check for values that are not finite (waits for the device).

        Raises:
            NumericsError: A value is not finite, and ``check`` is set.
        """
        if check and not _all_finite(output):
            raise NumericsError(
                "the features of an image are not finite: the proposal network gave NaN or infinity",
                hint="the weights are damaged, or half precision is too narrow for them: use float32",
            )
        candidates = self.config.candidates_train if self.training else self.config.candidates_test
        if keep is None:
            keep = self.config.keep_train if self.training else self.config.keep_test
        boxes_BN4, scores_BN = self._candidates(output, candidates)
        counts = (scores_BN > 0).sum(dim=1).tolist()
        boxes = torch.cat([own[:count] for own, count in zip(boxes_BN4, counts, strict=True)])
        scores = torch.cat([own[:count] for own, count in zip(scores_BN, counts, strict=True)])
        nms_input = NmsInput(boxes_N4=boxes, scores_N=scores, counts=counts)
        kept = suppress(nms_input, iou=self.config.nms_iou, limit=keep)
        scores_BP = pad_sequence([scores[places] for places in kept], batch_first=True)
        return Proposals(
            boxes_BP4=pad_sequence([boxes[places] for places in kept], batch_first=True),
            scores_BP=scores_BP,
            valid_BP=scores_BP > 0,
        )

    def _candidates(self, output: CenterNetOutput, limit: int) -> tuple[Tensor, Tensor]:
        """Return the best cells of each level as boxes, by descending score; cells below the floor score 0."""
        boxes, scores = [], []
        for heatmap, distances, stride in zip(
            output.heatmaps, output.distances, output.strides, strict=True
        ):
            probability_BM = heatmap.detach().float().flatten(1).sigmoid()
            best_BK, cells_BK = probability_BM.topk(min(limit, probability_BM.shape[1]), dim=1)
            height, width = heatmap.shape[2:]
            points_M2 = cell_centres(height, width, stride, heatmap.device)
            sides_BM4 = distances.detach().float().flatten(2).transpose(1, 2)
            sides_BK4 = stride * sides_BM4.gather(1, cells_BK[:, :, None].expand(-1, -1, 4))
            boxes.append(boxes_around(points_M2[cells_BK], sides_BK4))
            scores.append(torch.where(best_BK > self.config.score_floor, best_BK.sqrt(), 0.0))
        scores_BN, order_BN = torch.cat(scores, dim=1).sort(dim=1, descending=True, stable=True)
        boxes_BN4 = torch.cat(boxes, dim=1).gather(1, order_BN[:, :, None].expand(-1, -1, 4))
        return boxes_BN4, scores_BN


def boxes_around(points: Tensor, sides: Tensor) -> Tensor:
    """Return the boxes (..., 4) whose sides have the given distances (..., 4) from points (..., 2), in pixels."""
    top_left = points - sides[..., :2]
    bottom_right = torch.maximum(points + sides[..., 2:], top_left + _SMALLEST_SIDE)
    return torch.cat([top_left, bottom_right], dim=-1)


def _all_finite(output: CenterNetOutput) -> bool:
    checks = [maps.isfinite().all() for maps in (*output.heatmaps, *output.distances)]
    return bool(torch.stack(checks).all())
