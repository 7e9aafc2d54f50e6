"""Boxes as tensors: overlap, regression deltas, clipping, cell centres.

Boxes are (x1, y1, x2, y2) in pixels. Dimensions: B images, R regions of an image (padded), G objects of an image
(padded), N boxes, M cells. No function here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Weights = tuple[float, float, float, float]

# A refined box grows at most by this factor in each direction: from 16 to 1000 pixels.
_LARGEST_LOG_SCALE = math.log(1000.0 / 16.0)


def areas(boxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(boxes_BR4: Tensor, others_BG4: Tensor) -> Tensor:
    """Return intersection over union of all pairs within an image: (B, R, G), 0 where two boxes are apart."""
    top_left = torch.maximum(boxes_BR4[:, :, None, :2], others_BG4[:, None, :, :2])
    bottom_right = torch.minimum(boxes_BR4[:, :, None, 2:], others_BG4[:, None, :, 2:])
    shared_BRG = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    union_BRG = areas(boxes_BR4)[:, :, None] + areas(others_BG4)[:, None, :] - shared_BRG
    return torch.where(shared_BRG > 0, shared_BRG / union_BRG, torch.zeros_like(shared_BRG))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Move corners into the image.

    Args:
        boxes: (..., 4).
        sizes: (..., 2), height and width of each box's image; broadcast against the boxes.
    """
    bounds = torch.stack([sizes[..., 1], sizes[..., 0]] * 2, dim=-1).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), bounds)


def nonempty(boxes: Tensor) -> Tensor:
    """Return which boxes (..., 4) have a width and a height above 0: bool (...)."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def apply_deltas(deltas: Tensor, boxes: Tensor, weights: Weights) -> Tensor:
    """Move and scale boxes (R-CNN's parametrisation, Girshick 2015).

    Args:
        deltas: (..., 4): shift of the centre in box widths and heights, logarithm of the growth, each times its weight.
        boxes: (..., 4), the boxes to change.
        weights: The four factors by which ``deltas`` are scaled up.

    Returns:
        (..., 4) float32.
    """
    scaled = deltas.float() / deltas.new_tensor(weights, dtype=torch.float32)
    sizes = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + 0.5 * sizes + scaled[..., :2] * sizes
    half = 0.5 * sizes * scaled[..., 2:].clamp(max=_LARGEST_LOG_SCALE).exp()
    return torch.cat([centres - half, centres + half], dim=-1)


def deltas_between(boxes: Tensor, targets: Tensor, weights: Weights) -> Tensor:
    """Return the deltas (..., 4) by which `apply_deltas` turns ``boxes`` into ``targets``; both must be non-empty."""
    sizes, target_sizes = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    shift = (targets[..., :2] + 0.5 * target_sizes) - (boxes[..., :2] + 0.5 * sizes)
    deltas = torch.cat([shift / sizes, (target_sizes / sizes).log()], dim=-1)
    return deltas * deltas.new_tensor(weights)


def cell_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Return the points (x, y) in pixels that the cells of a map stand for: (height * width, 2), row by row."""
    rows = torch.arange(height, device=device) * stride + stride // 2
    columns = torch.arange(width, device=device) * stride + stride // 2
    down, across = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([across.flatten(), down.flatten()], dim=1).float()


def image_of_each(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return which image each of N rows belongs to, where the rows lie image after image: int64 (N,)."""
    repeats_B = torch.tensor(counts, dtype=torch.int64)
    image_N = torch.arange(len(counts)).repeat_interleave(repeats_B, output_size=sum(counts))
    return image_N.to(device, non_blocking=True)
