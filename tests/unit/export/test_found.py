"""From a graph's outputs to the picture, in numpy."""

from __future__ import annotations

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import torch
from detectron2.layers import paste_masks_in_image

from proxydet.export.found import paste, to_picture


def outputs(boxes: list[list[float]]) -> dict[str, np.ndarray]:
    count = len(boxes)
    return {
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "scores": np.linspace(0.9, 0.1, count, dtype=np.float32),
        "classes": np.arange(count) % 2,
        "masks": np.random.default_rng(0).random((max(count, 1), 28, 28), dtype=np.float32),
        "mask_index": np.arange(count),
        "finite": np.True_,
    }


def test_masks_are_pasted_as_detectron2_does() -> None:
    rng = np.random.default_rng(3)
    corners = rng.uniform(-5, 75, (40, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 0.5], axis=1)
    boxes = np.concatenate([boxes, [[0, 0, 70, 50], [10.2, 10.2, 10.9, 40], [69, 49, 70, 50]]])
    boxes = np.clip(boxes, 0, [70, 50, 70, 50]).astype(np.float32)
    boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    # Smooth, as a mask head's are: where a probability is one half to the last bit, rounding decides.
    wave = np.sin(np.linspace(0, 5, 28, dtype=np.float32))
    masks = np.stack([0.5 + 0.45 * np.roll(wave, k)[:, None] * wave for k in range(len(boxes))])
    wanted = paste_masks_in_image(
        torch.from_numpy(masks), torch.from_numpy(boxes), (50, 70), threshold=0.5
    ).numpy()
    pasted = np.stack([paste(*pair, (50, 70)) for pair in zip(masks, boxes, strict=True)])
    assert wanted.any(axis=(1, 2)).sum() > 20
    assert (wanted != pasted).mean() < 1e-4


def test_boxes_are_scaled_clipped_and_dropped_where_empty() -> None:
    found = to_picture(
        outputs([[10, 20, 30, 40], [5, 5, 5, 9], [90, 0, 120, 50]]), (50, 100), (100, 300), "ab"
    )
    np.testing.assert_allclose(found.boxes_xyxy, [[30, 40, 90, 80], [270, 0, 300, 100]])
    assert found.labels == ("a", "a")
    assert found.mask_index.tolist() == [0, 2]
    assert found.image_size == (100, 300)


def test_a_mask_alone_and_all_masks_are_the_same() -> None:
    found = to_picture(outputs([[3, 4, 40, 30], [20, 10, 60, 45]]), (50, 70), (50, 70), "ab")
    assert found.masks.shape == (2, 50, 70)
    assert found.masks.any()
    np.testing.assert_array_equal(found.masks[1], found.mask(1))


def test_nothing_found() -> None:
    found = to_picture(outputs([]), (50, 70), (100, 140), "ab")
    assert len(found) == 0
    assert found.masks.shape == (0, 100, 140)
