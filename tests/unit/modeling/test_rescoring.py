"""Rescoring by the proposals that agree on a region."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.network import ImageView, ProxyDetNetwork
from proxydet.modeling.postprocess import ClassText, agreed_scores, detect_classes

OFF = InferenceConfig(score_threshold=0.02, masks=False)
ON = dataclasses.replace(OFF, rescore=True)


@pytest.fixture(scope="module")
def network(tiny) -> ProxyDetNetwork:
    return tiny.lively(tiny.network())


def same(first, second, atol=0.0) -> bool:
    return len(first) == len(second) and all(
        torch.allclose(
            getattr(first, name).double(), getattr(second, name).double(), atol=atol, rtol=0
        )
        for name in ("boxes_N4", "scores_N", "classes_N")
    )


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_scores_are_those_of_the_formula(network, tiny):
    regions = network.embed([tiny.image(96, 128, 0), tiny.image(64, 64, 1)])
    padded = regions.valid_BR.clone()
    padded[1, 5:] = False
    regions = dataclasses.replace(regions, valid_BR=padded)
    got = agreed_scores(regions)
    for boxes, scores, valid, own in zip(
        regions.boxes_BR4.tolist(),
        regions.proposal_scores_BR.tolist(),
        regions.valid_BR.tolist(),
        got.tolist(),
        strict=True,
    ):
        known = [
            pair
            for pair, there in zip(zip(boxes, scores, strict=True), valid, strict=True)
            if there
        ]
        for box, there, value in zip(boxes, valid, own, strict=True):
            evidence = sum(overlap(box, other) ** 6 * score for other, score in known)
            if there:
                assert value == pytest.approx(1 - math.exp(-evidence), abs=1e-5)
    assert bool(((got >= 0) & (got <= 1)).all())


def test_boxes_that_many_agree_on_come_first(network, tiny):
    regions = network.embed([tiny.image(96, 128)])
    boxes = torch.zeros_like(regions.boxes_BR4)
    boxes[..., 2:] = 1.0
    boxes += 3.0 * torch.arange(boxes.shape[1])[:, None]  # all apart
    boxes[0, :4] = torch.tensor(
        [[50.0, 50, 70, 70], [50, 50, 70, 71], [50, 49, 70, 70], [50, 50, 82, 70]]
    )
    scores = torch.full_like(regions.proposal_scores_BR, 0.01)
    scores[0, :4], scores[0, 4] = torch.tensor([0.3, 0.25, 0.25, 0.4]), 0.45
    regions = dataclasses.replace(regions, boxes_BR4=boxes, proposal_scores_BR=scores)
    agreed = agreed_scores(regions)[0]
    # The best box of four that overlap was not the surest one, and a lonely one keeps about its own score.
    assert int(agreed.argmax()) == 0
    assert agreed[4] == pytest.approx(1 - math.exp(-0.45), abs=1e-3)


def test_detection_takes_the_rescored_proposals(network, tiny):
    image, words = tiny.image(96, 128), network.vocabulary
    (plain,) = network.detect([image], words, settings=OFF)
    (found,) = network.detect([image], words, settings=ON)
    assert not same(found, plain)
    regions = network.embed([image])
    text = ClassText(text_DC=torch.tensor(words.normalised()).T, base_C=network.base_C)
    given = dataclasses.replace(regions, proposal_scores_BR=agreed_scores(regions))
    expected = detect_classes([given], text, network.classifiers(), OFF)
    assert torch.equal(found.scores_N, expected.scores_L)
    assert torch.equal(found.classes_N, expected.classes_L)


def test_chunks_of_classes_and_batches_change_nothing(network, tiny):
    images, words = [tiny.image(96, 128, 0), tiny.image(64, 64, 1)], tiny.vocabulary(150)
    together = network.detect(images, words, settings=ON)
    chunked = network.detect(images, words, settings=dataclasses.replace(ON, class_chunk=64))
    for image, found, by_chunks in zip(images, together, chunked, strict=True):
        (alone,) = network.detect([image], words, settings=ON)
        assert len(found) > 5
        assert same(found, by_chunks)
        assert same(found, alone, atol=1e-4)


def test_one_view_seen_twice_is_one_view(network, tiny):
    image = tiny.image(96, 128)
    (plain,) = network.detect([image], settings=ON)
    twice = network.detect_views([ImageView(image=image)] * 2, original_size=(96, 128), settings=ON)
    assert len(plain) > 5
    assert same(twice, plain, atol=1e-4)


def test_thresholds_and_background_see_the_new_scores(network, tiny):
    image, words = tiny.image(96, 128), network.vocabulary
    (found,) = network.detect([image], words, settings=ON)
    first = int(found.classes_N[0])
    own = np.full(len(words), np.nan)
    own[first] = float(found.scores_N.median())
    (kept,) = network.detect([image], words.with_scorers(threshold=own), settings=ON)
    assert bool((kept.scores_N[kept.classes_N == first] > own[first]).all())
    assert len(kept) < len(found)
    hidden = np.arange(len(words)) == first
    (rest,) = network.detect([image], words.with_scorers(background=hidden), settings=ON)
    assert first not in rest.classes_N.tolist()
    assert len(rest) < len(found)
