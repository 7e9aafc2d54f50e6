"""Classes as linear scorers: bias, scale, thresholds of their own, background; and embeddings of regions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.postprocess import ClassText, class_scores, detect_classes

LOW = InferenceConfig(score_threshold=0.0, masks=False, nms_iou=1.0, max_detections=10_000)


@pytest.fixture(scope="module")
def network(tiny) -> ProxyDetNetwork:
    return tiny.lively(tiny.network())


@pytest.fixture(scope="module")
def image(tiny):
    return tiny.image(90, 120)


def pairs(found) -> dict[tuple[tuple[float, ...], int], float]:
    return {
        (tuple(box), kind): score
        for box, kind, score in zip(
            found.boxes_N4.tolist(), found.classes_N.tolist(), found.scores_N.tolist(), strict=True
        )
    }


def test_bias_and_scale_are_those_of_the_formula(network, image):
    words = network.vocabulary
    bias, scale = np.linspace(-1, 1, len(words)), np.linspace(0.5, 2, len(words))
    regions = network.embed([image])
    classifiers = network.classifiers()
    text_CD = torch.tensor(words.normalised(), dtype=torch.float64)
    probabilities = []
    for values, classifier in zip(
        (*regions.detection, regions.mixup_BRD), classifiers, strict=True
    ):
        cosine_RC = values[0].double() @ text_CD.T
        logits = classifier.temperature * torch.tensor(scale) * cosine_RC + torch.tensor(bias)
        if classifier.cls_bias is not None:
            logits = logits + classifier.cls_bias
        probabilities.append(logits.sigmoid())
    weight_C = torch.where(torch.tensor(words.base), LOW.alpha, LOW.beta).double()
    detection_RC = torch.stack(probabilities[:-1]).mean(dim=0)
    expected = detection_RC ** (1 - weight_C) * probabilities[-1] ** weight_C
    expected = (expected * regions.proposal_scores_BR[0][:, None]).sqrt()
    (found,) = network.detect([image], words.with_scorers(bias=bias, scale=scale), settings=LOW)
    got = found.scores_N.double()
    flat = expected[regions.valid_BR[0]].flatten().sort(descending=True).values
    torch.testing.assert_close(got, flat[: len(got)], atol=1e-5, rtol=1e-4)
    assert len(got) > 20


def test_plain_scorers_change_no_bit(network, image):
    words = network.vocabulary
    same = words.with_scorers(bias=np.zeros(6), scale=np.ones(6), threshold=np.full(6, np.nan))
    assert same == words
    (plain,) = network.detect([image], words, settings=LOW)
    (found,) = network.detect([image], same, settings=LOW)
    assert pairs(found) == pairs(plain)


@pytest.mark.parametrize("best_only", [False, True])
@pytest.mark.parametrize("chunk", [1, 64])
def test_a_class_keeps_what_is_above_its_own_threshold(network, image, best_only, chunk):
    settings = dataclasses.replace(LOW, one_class_per_proposal=False, class_chunk=chunk)
    words = network.vocabulary
    everything = pairs(network.detect([image], words, settings=settings)[0])
    scores = sorted(everything.values())
    own = np.full(len(words), np.nan)
    own[0], own[1] = 0.0, 1.0
    # Nothing is above the general threshold of best_only: what is found is above its own.
    threshold = scores[-1] if best_only else scores[len(scores) // 2]
    general = dataclasses.replace(
        settings, score_threshold=threshold, one_class_per_proposal=best_only
    )
    found = pairs(network.detect([image], words.with_scorers(threshold=own), settings=general)[0])
    limits = np.where(np.isnan(own), threshold, own)
    assert found == {key: s for key, s in everything.items() if s > limits[key[1]]}
    kinds = {kind for _, kind in found}
    assert 0 in kinds
    assert kinds == {0} if best_only else len(kinds) > 1
    assert any(score <= threshold for score in found.values())


@pytest.mark.parametrize("chunk", [1, 64])
def test_background_takes_regions_and_is_not_reported(network, image, chunk):
    words = network.vocabulary
    everything = pairs(network.detect([image], words, settings=LOW)[0])
    hidden = np.zeros(len(words), bool)
    hidden[[2, 4]] = True
    settings = dataclasses.replace(LOW, class_chunk=chunk)
    asked = words.with_scorers(background=hidden)
    assert asked.reported == tuple(
        name for name, own in zip(words.names, hidden, strict=True) if not own
    )
    found = pairs(network.detect([image], asked, settings=settings)[0])
    floor: dict[tuple[float, ...], float] = {}
    for (box, kind), score in everything.items():
        if hidden[kind]:
            floor[box] = max(floor.get(box, 0.0), score)
    expected = {
        (box, kind): score
        for (box, kind), score in everything.items()
        if not hidden[kind] and score > floor.get(box, 0.0)
    }
    assert found == expected
    assert 0 < len(found) < len(everything)
    # One label a region: where background scores best, there is none.
    best = dataclasses.replace(settings, one_class_per_proposal=True)
    alone = pairs(network.detect([image], asked, settings=best)[0])
    assert set(alone) <= set(found)
    assert {box for box, _ in alone} == {box for box, _ in found}


def test_embedding_regions_is_what_detection_does_before_the_classes(network, tiny):
    images = [tiny.image(96, 128, 0), tiny.image(64, 64, 1), tiny.image(96, 128, 2)]
    regions = network.embed(images)
    words = network.vocabulary
    text = ClassText(text_DC=torch.tensor(words.normalised()).T, base_C=network.base_C)
    found = detect_classes([regions], text, network.classifiers(), LOW)
    scores = found.scores_L.split(found.counts)
    for own, prediction in zip(scores, network.detect(images, words, settings=LOW), strict=True):
        torch.testing.assert_close(own[: len(prediction)], prediction.scores_N, atol=0, rtol=0)


def test_given_boxes_are_embedded_as_they_are(network, tiny):
    images = [tiny.image(96, 128, 0), tiny.image(64, 64, 1), tiny.image(96, 128, 2)]
    boxes = [
        torch.tensor([[10.0, 10, 60, 70], [5, 5, 20, 20]]),
        torch.zeros(0, 4),
        torch.tensor([[30.0, 20, 90, 90]]),
    ]
    regions = network.embed(images, boxes)
    assert regions.valid_BR.sum(dim=1).tolist() == [2, 0, 1]
    for image, own in enumerate(boxes):
        torch.testing.assert_close(regions.boxes_BR4[image][: len(own)], own)
        if len(own):
            alone = network.embed([images[image]], [own])
            for first, second in zip(
                (*regions.detection, regions.mixup_BRD),
                (*alone.detection, alone.mixup_BRD),
                strict=True,
            ):
                torch.testing.assert_close(
                    first[image][: len(own)], second[0], atol=1e-5, rtol=1e-4
                )
    scores = class_scores(
        regions,
        ClassText(text_DC=network.class_table().text_DC1[:, :-1], base_C=network.base_C),
        network.classifiers(),
        LOW,
    )
    assert scores.shape == (6, 6)
    with pytest.raises(ValueError, match="boxes of 2"):
        network.embed(images, boxes[:2])
