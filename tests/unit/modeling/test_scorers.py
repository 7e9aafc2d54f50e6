"""Classes as linear scorers: bias, scale, thresholds of their own, background; and embeddings of regions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from proxydet.errors import VocabularyError
from proxydet.modeling.config import InferenceConfig
from proxydet.modeling.network import ImageView, ProxyDetNetwork
from proxydet.modeling.postprocess import (
    ClassText,
    best_scores_above,
    class_scores,
    detect_classes,
)

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


@pytest.mark.parametrize("one_label", [False, True])
@pytest.mark.parametrize("chunk", [1, 64])
def test_a_class_keeps_what_is_above_its_own_threshold(network, image, one_label, chunk):
    words = network.vocabulary
    every = dataclasses.replace(LOW, nms_iou=0.5, class_chunk=chunk, agnostic_nms=one_label)
    everything = pairs(network.detect([image], words, settings=every)[0])
    scores = sorted(everything.values())
    (_, lowest), (_, other) = (
        min(everything, key=everything.get),
        max(everything, key=everything.get),
    )
    own = np.full(len(words), np.nan)
    own[other], own[lowest] = 1.0, 0.0
    # Behind NMS: what a lower threshold finds can be filtered.
    general = dataclasses.replace(every, score_threshold=scores[len(scores) // 2])
    found = pairs(network.detect([image], words.with_scorers(threshold=own), settings=general)[0])
    limits = np.where(np.isnan(own), general.score_threshold, own)
    assert found == {key: s for key, s in everything.items() if s > limits[key[1]]}
    kinds = {kind for _, kind in found}
    assert lowest in kinds
    assert len(kinds) > 1
    assert any(score <= general.score_threshold for score in found.values())
    few = dataclasses.replace(general, max_detections=3)
    best = pairs(network.detect([image], words.with_scorers(threshold=own), settings=few)[0])
    assert sorted(best.values()) == sorted(found.values())[-3:]


def named(prediction, vocabulary):
    """Detections by box and class name."""
    found = pairs(prediction)
    return {(box, vocabulary.names[kind]): score for (box, kind), score in found.items()}


@pytest.mark.parametrize("chunk", [1, 64])
def test_background_takes_regions_and_is_not_reported(network, image, chunk):
    words = network.vocabulary
    everything = named(network.detect([image], words, settings=LOW)[0], words)
    hidden = np.isin(np.arange(len(words)), [2, 4])
    background = {words.names[2], words.names[4]}
    settings = dataclasses.replace(LOW, class_chunk=chunk)
    asked = words.with_scorers(background=hidden)
    assert asked.reported == tuple(name for name in words.names if name not in background)
    found = named(network.detect([image], asked, settings=settings)[0], asked)
    floor: dict[tuple[float, ...], float] = {}
    for (box, name), score in everything.items():
        if name in background:
            floor[box] = max(floor.get(box, 0.0), score)
    expected = {
        (box, name): score
        for (box, name), score in everything.items()
        if name not in background and score > floor.get(box, 0.0)
    }
    assert found == pytest.approx(expected)
    assert 0 < len(found) < len(everything)


@pytest.mark.parametrize("views", [1, 2])
def test_with_one_label_a_box_background_is_a_class_that_is_left_out_at_the_end(
    network, image, views
):
    words = network.vocabulary
    hidden = np.isin(np.arange(len(words)), [2, 4])
    settings = dataclasses.replace(LOW, nms_iou=0.5, agnostic_nms=True)
    asked = words.with_scorers(background=hidden)

    def detect(vocabulary):
        if views == 1:
            return network.detect([image], vocabulary, settings=settings)[0]
        seen = [ImageView(image=image), ImageView(image=image.flip(2), mirrored=True)]
        size = (image.shape[1], image.shape[2])
        return network.detect_views(seen, vocabulary, original_size=size, settings=settings)

    everything = named(detect(words), words)
    found = named(detect(asked), asked)
    expected = {key: s for key, s in everything.items() if key[1] in asked.reported}
    assert found == pytest.approx(expected)
    assert 0 < len(found) < len(everything)


def test_a_network_of_classes_that_are_not_plain_text_is_refused(tiny, network):
    for scorer in ({"bias": np.ones(6)}, {"threshold": np.ones(6)}, {"background": [1] + [0] * 5}):
        with pytest.raises(VocabularyError, match=next(iter(scorer))):
            ProxyDetNetwork(network.config, network.vocabulary.with_scorers(**scorer))


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


@pytest.mark.parametrize("mixup", [True, False])
@pytest.mark.parametrize("general", [0.0, 0.1, 0.3, 1.0])
def test_the_regions_above_a_threshold_are_those_of_all_scores(network, image, mixup, general):
    regions = network.embed([image])
    classifiers = network.classifiers()
    if not mixup:
        regions, classifiers = dataclasses.replace(regions, mixup_BRD=None), classifiers[:-1]
    classes = ClassText(
        text_DC=network.class_table().text_DC1[:, :-1],
        base_C=network.base_C,
        bias_C=torch.linspace(-1, 2, 6),
    )
    threshold_C = torch.tensor([general, torch.inf, *[general + 0.05] * 4])
    scores_NC = class_scores(regions, classes, classifiers, LOW)
    expected_N = scores_NC.masked_fill(scores_NC <= threshold_C, -1.0).amax(dim=1)
    found_K, best_K = best_scores_above(regions, classes, classifiers, LOW, threshold_C)
    assert found_K.tolist() == (expected_N >= 0).nonzero()[:, 0].tolist()
    torch.testing.assert_close(best_K, expected_N[found_K], atol=1e-6, rtol=1e-5)
    assert len(found_K) > 0 or general == 1.0
