"""Masks are measured as the COCO tools measure them, and damage is told before it reaches compiled code."""

from __future__ import annotations

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import torch
from detectron2.structures import PolygonMasks
from hotcoco.mask import decode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from proxydet.data import masks as module
from proxydet.data.masks import measure

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
masks = shapes.flatmap(lambda shape: arrays.arrays(np.uint8, shape, elements=st.integers(0, 1)))


def encode(mask: np.ndarray) -> dict[str, object]:
    return coco_mask.encode(np.asfortranarray(mask))


def edges_of(several: list[np.ndarray]) -> np.ndarray:
    """Where masks begin and end in their columns, in the numbers that `encode` takes."""
    found = []
    for number, mask in enumerate(several):
        column, row = np.nonzero(np.diff(np.pad(mask, ((1, 1), (0, 0))).astype(int), axis=0).T)
        found.append(number * (mask.size + 1) + column * mask.shape[0] + row)
    return np.sort(np.concatenate(found))


@given(shapes.flatmap(lambda shape: st.lists(
    arrays.arrays(np.uint8, shape, elements=st.integers(0, 1)), min_size=1, max_size=4
)))  # fmt: skip
@settings(deadline=None)
def test_masks_are_encoded_as_the_coco_tools_do(several):
    encoded = module.encode(edges_of(several), len(several), several[0].shape)
    assert encoded == [encode(mask)["counts"] for mask in several]


def test_numbers_of_many_characters_are_encoded_as_the_coco_tools_do():
    some = np.zeros((3000, 4000), dtype=np.uint8)
    some[100:2900, 5:3990] = 1
    some[5:2000:7, 3000:] = 0
    several = [some, 1 - some, np.zeros_like(some), np.ones_like(some)]
    encoded = module.encode(edges_of(several), 4, some.shape)
    assert encoded == [encode(mask)["counts"] for mask in several]


@given(st.lists(masks, max_size=6))
@settings(deadline=None)
def test_areas_and_soundness_of_real_masks(several):
    areas, sound = measure([encode(mask) for mask in several])
    assert areas.tolist() == [mask.sum() for mask in several]
    assert sound.all()


def test_large_masks_whose_runs_need_many_characters():
    mask = np.zeros((3000, 4000), dtype=np.uint8)
    mask[100:2900, 5:3990] = 1
    mask[::7] = 0
    areas, sound = measure([encode(mask), encode(1 - mask)])
    assert areas.tolist() == [mask.sum(), mask.size - mask.sum()]
    assert sound.all()


@given(masks, st.binary(min_size=0, max_size=30))
@settings(deadline=None, max_examples=150)
def test_sound_means_that_the_runs_fill_the_image(mask, noise):
    """Any bytes: where they are called sound, decoding them gives the area that was measured."""
    height, width = mask.shape
    rle = {"size": [height, width], "counts": noise}
    areas, sound = measure([encode(mask), rle, encode(mask)])
    assert sound[0]
    assert sound[2]
    if sound[1]:
        assert decode(rle).sum() == areas[1]


@given(masks, st.data())
@settings(deadline=None)
def test_changed_counts_are_told_or_harmless(mask, data):
    counts = bytearray(encode(mask)["counts"])  # type: ignore[call-overload]
    place = data.draw(st.integers(0, len(counts) - 1))
    counts[place] = data.draw(st.integers(0, 255))
    rle = {"size": list(mask.shape), "counts": bytes(counts)}
    areas, sound = measure([rle])
    if sound[0]:
        assert decode(rle).sum() == areas[0]


def test_polygons_are_cropped_as_detectron2_does():
    rng = np.random.default_rng(0)
    shapes = [
        [rng.random(2 * rng.integers(3, 30)) * 300 - 50 for _ in range(count)]
        for count in [1, 1, 3, 0, 2] * 8
    ]
    low = rng.random((40, 2)) * 100
    boxes = np.concatenate([low, low + rng.random((40, 2)) * 150], axis=1).astype(np.float32)
    boxes[0, 2:] = boxes[0, :2] + np.float32(0.05)
    boxes[1, 2:] = boxes[1, :2] + np.float32(56)
    wanted = PolygonMasks(shapes).crop_and_resize(torch.from_numpy(boxes), 28)
    assert wanted.any(dim=(1, 2)).sum() > 20
    np.testing.assert_array_equal(module.crop_polygons(shapes, boxes, 28), wanted.numpy())
    assert module.crop_polygons([], np.zeros((0, 4), np.float32), 28).shape == (0, 28, 28)
