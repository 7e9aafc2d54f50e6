"""Predictions: shared masks are pasted and encoded once, as detectron2 pastes them."""

from __future__ import annotations

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from detectron2.layers import paste_masks_in_image

from proxydet.modeling import postprocess as module
from proxydet.modeling.postprocess import Prediction, masks, rles


@pytest.fixture
def found() -> Prediction:
    boxes = torch.tensor([[2.0, 3, 30, 40], [10.5, 5, 20, 33], [2.0, 3, 30, 40]])
    return Prediction(
        boxes_N4=boxes,
        scores_N=torch.tensor([0.9, 0.8, 0.7]),
        classes_N=torch.tensor([4, 1, 0]),
        mask_probs_MSS=torch.rand(2, 28, 28, generator=torch.Generator().manual_seed(0)),
        mask_index_N=torch.tensor([1, 0, 1]),
        image_size=(48, 50),
    )


def encoded(mask: torch.Tensor) -> bytes:
    """What the COCO tools make of a whole mask."""
    return coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"]


def test_masks_are_pasted_as_detectron2_does(found):
    wanted = paste_masks_in_image(
        found.mask_probs_MSS[found.mask_index_N], found.boxes_N4, (48, 50)
    )
    assert torch.equal(masks(found), wanted)


def test_each_distinct_mask_is_encoded_once(found):
    several = rles(found)
    assert several[0] is several[2]
    assert len({id(rle) for rle in several}) == 2
    assert [rle["size"] for rle in several] == [[48, 50]] * 3


@pytest.mark.parametrize("at_once", [1, 60, 2**22])
def test_masks_in_their_windows_are_the_pasted_ones(found, monkeypatch, at_once):
    monkeypatch.setattr(module, "_SAMPLES_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", at_once)
    windows = list(found.windows())
    for window, mask in zip(windows, found.distinct_masks(), strict=True):
        assert torch.equal(torch.from_numpy(window.whole()), mask)
    assert windows[1].inside_hw.shape < (48, 50)
    for rle, mask in zip(rles(found), masks(found), strict=True):
        assert rle["counts"].encode() == encoded(mask)


def test_a_mask_pastes_to_the_same_pixels_wherever_it_lies():
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(40, 2, generator=generator) * 2000
    boxes = torch.cat([corners, corners + torch.rand(40, 2, generator=generator) * 900 + 0.1], 1)
    boxes.clamp_(max=torch.tensor([2200.0, 2100, 2200, 2100]))
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
    # Smooth probabilities, so that many pixels lie near the threshold.
    coarse = torch.rand(len(boxes), 1, 4, 4, generator=generator) * 0.2 + 0.4
    probs = torch.nn.functional.interpolate(coarse, (28, 28), mode="bilinear")[:, 0]
    prediction = Prediction(
        boxes_N4=boxes,
        scores_N=torch.linspace(1, 0.1, len(boxes)),
        classes_N=torch.zeros(len(boxes), dtype=torch.int64),
        mask_probs_MSS=probs,
        mask_index_N=torch.arange(len(boxes)),
        image_size=(2100, 2200),
    )
    wanted = paste_masks_in_image(probs, boxes, (2100, 2200))
    assert wanted.any(dim=(1, 2)).sum() > 20
    for window, mask in zip(prediction.windows(), wanted, strict=True):
        assert torch.equal(torch.from_numpy(window.whole()), mask)
    assert [rle["counts"].encode() for rle in rles(prediction)] == list(map(encoded, wanted))


def test_choosing_keeps_only_the_masks_in_use(found):
    chosen = found.choose(torch.tensor([2, 0]))
    assert chosen.classes_N.tolist() == [0, 4]
    assert len(chosen.mask_probs_MSS) == 1
    assert torch.equal(masks(chosen), masks(found)[[2, 0]])
    by_mask = found.choose(found.scores_N > 0.75)
    assert by_mask.classes_N.tolist() == [4, 1]
    assert torch.equal(masks(by_mask), masks(found)[:2])


def test_choosing_nothing(found):
    nothing = found.choose(torch.tensor([], dtype=torch.int64))
    assert len(nothing) == 0
    assert masks(nothing).shape == (0, 48, 50)
    assert rles(nothing) == []


def test_choosing_without_masks(found):
    bare = Prediction(
        boxes_N4=found.boxes_N4,
        scores_N=found.scores_N,
        classes_N=found.classes_N,
        mask_probs_MSS=None,
        mask_index_N=torch.full((3,), -1),
        image_size=found.image_size,
    )
    chosen = bare.choose(torch.tensor([1]))
    assert chosen.mask_index_N.tolist() == [-1]
    assert not chosen.has_masks
    with pytest.raises(ValueError, match="no masks"):
        rles(chosen)
