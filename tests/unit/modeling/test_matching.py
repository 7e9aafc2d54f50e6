"""Matching and sampling of a whole batch against detectron2's, image by image."""

from __future__ import annotations

import proxydet.runtime.d2  # noqa: F401

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from hypothesis import given
from hypothesis import strategies as st

from proxydet.modeling import roi_heads
from proxydet.modeling.boxes import Regions
from proxydet.modeling.roi_heads import Assignment, BatchObjects

CLASSES = 7


def regions_of(boxes: torch.Tensor, valid: torch.Tensor | None = None) -> Regions:
    if valid is None:
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    scores = torch.linspace(1, 0.5, boxes.shape[1]).expand(len(boxes), -1)
    return Regions(boxes_BR4=boxes, objectness_BR=scores * valid, valid_BR=valid)


def some_boxes(images: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, count, 2, generator=generator) * 60
    return torch.cat(
        [corners, corners + 10 + torch.rand(images, count, 2, generator=generator) * 40], 2
    )


def test_ground_truth_is_padded(tiny):
    truth = BatchObjects.from_instances(tiny.box_batch().instances, torch.device("cpu"))
    assert truth.counts == (3, 1)
    assert truth.valid_BG.tolist() == [[True, True, True], [True, False, False]]
    assert truth.classes_BG.tolist() == [[0, 3, 0], [4, 0, 0]]
    assert all(masks is not None for masks in truth.masks)


def test_matching_equals_detectron2s(tiny):
    truth = BatchObjects.from_instances(tiny.box_batch().instances, torch.device("cpu"))
    regions = regions_of(torch.cat([some_boxes(2, 200, 0), truth.boxes_BG4[:, :1]], dim=1))
    assignment = roi_heads.match(regions, truth, 0.4, CLASSES)
    matcher = Matcher([0.4], [0, 1])
    for image, count in enumerate(truth.counts):
        objects = truth.boxes_BG4[image, :count]
        matched, labels = matcher(pairwise_iou(Boxes(objects), Boxes(regions.boxes_BR4[image])))
        wanted = torch.where(labels == 1, truth.classes_BG[image][matched], CLASSES)
        assert assignment.labels_BR[image].tolist() == wanted.tolist()
        assert assignment.objects_BR[image].tolist() == matched.tolist()
        assert (wanted < CLASSES).any()


def test_without_objects_all_is_background(tiny):
    truth = BatchObjects.from_instances(tiny.empty_batch().instances, torch.device("cpu"))
    regions = regions_of(some_boxes(1, 5, 0), torch.tensor([[True] * 4 + [False]]))
    assignment = roi_heads.match(regions, truth, 0.5, CLASSES)
    assert assignment.labels_BR.tolist() == [[CLASSES] * 4 + [roi_heads.PADDING]]
    assert assignment.boxes_from(truth).tolist() == [[[0.0] * 4] * 5]


def test_a_padded_object_matches_nothing():
    # The second image has no object; its padding must not become one, even where any overlap is enough.
    truth = BatchObjects(
        boxes_BG4=torch.tensor([[[0.0, 0.0, 10.0, 10.0]], [[0.0, 0.0, 0.0, 0.0]]]),
        classes_BG=torch.tensor([[5], [0]]),
        valid_BG=torch.tensor([[True], [False]]),
        counts=(1, 0),
        masks=(None, None),
        masked_BG=torch.tensor([[False], [False]]),
    )
    boxes = torch.tensor([[[20.0, 20.0, 30.0, 30.0]]] * 2)
    assignment = roi_heads.match(regions_of(boxes), truth, 0.0, CLASSES)
    assert assignment.labels_BR.tolist() == [[5], [CLASSES]]


def test_ground_truth_joins_with_the_published_objectness(tiny):
    truth = BatchObjects.from_instances(tiny.box_batch().instances, torch.device("cpu"))
    joined = roi_heads.append_ground_truth(regions_of(some_boxes(2, 4, 0)), truth)
    assert joined.valid_BR.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    assert joined.objectness_BR[0, 4:].tolist() == pytest.approx([23.0258] * 3, abs=1e-3)
    assert joined.objectness_BR[1, 5:].tolist() == [0.0, 0.0]


@given(
    st.lists(st.integers(-1, CLASSES), min_size=1, max_size=60),
    st.integers(1, 70),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.integers(0, 5),
)
def test_sampling_takes_as_many_as_it_may(labels, size, fraction, seed):
    labels_BR = torch.tensor([labels])
    regions = regions_of(some_boxes(1, len(labels), 0), labels_BR >= 0)
    generator = torch.Generator().manual_seed(seed)
    drawn, assignment = roi_heads.sample(
        regions,
        Assignment(labels_BR=labels_BR, objects_BR=torch.arange(len(labels))[None]),
        size=size,
        positive_fraction=fraction,
        classes=CLASSES,
        generator=generator,
    )
    positives = sum(0 <= label < CLASSES for label in labels)
    background = labels.count(CLASSES)
    want_positive = min(positives, int(size * fraction))
    want_background = min(background, size - want_positive)
    got = assignment.labels_BR[0]
    assert int(((got >= 0) & (got < CLASSES)).sum()) == want_positive
    assert int((got == CLASSES).sum()) == want_background
    assert int(drawn.valid_BR.sum()) == want_positive + want_background
    assert drawn.boxes_BR4.shape[1] <= size
    # Every row still belongs to its box, and none is drawn twice.
    rows = assignment.objects_BR[drawn.valid_BR]
    assert len(set(rows.tolist())) == len(rows)
    assert torch.equal(drawn.boxes_BR4[drawn.valid_BR], regions.boxes_BR4[0][rows])
    assert torch.equal(got[drawn.valid_BR[0]], labels_BR[0][rows])


def test_background_fills_up_only_what_objects_leave():
    # The background comes first: if too much of it were drawn, the cut to size would drop the objects.
    labels_BR = torch.tensor([[CLASSES] * 10 + [1] * 4])
    _, drawn = roi_heads.sample(
        regions_of(some_boxes(1, 14, 0)),
        Assignment(labels_BR=labels_BR, objects_BR=torch.arange(14)[None]),
        size=8,
        positive_fraction=0.5,
        classes=CLASSES,
        generator=torch.Generator().manual_seed(0),
    )
    assert sorted(drawn.labels_BR[0].tolist()) == [1] * 4 + [CLASSES] * 4


def test_sampling_is_uniform_and_follows_the_generator():
    labels_BR = torch.full((1, 20), CLASSES)
    regions = regions_of(some_boxes(1, 20, 0))
    assignment = Assignment(labels_BR=labels_BR, objects_BR=torch.arange(20)[None])

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        _, drawn = roi_heads.sample(
            regions, assignment, size=5, positive_fraction=0.5, classes=CLASSES, generator=generator
        )
        return drawn.objects_BR[0].tolist()

    assert draw(1) == draw(1)
    counts = torch.bincount(
        torch.tensor([draw(seed) for seed in range(800)]).flatten(), minlength=20
    )
    # 200 expected each; 5 standard deviations are 61.
    assert counts.min() > 139
    assert counts.max() < 261
