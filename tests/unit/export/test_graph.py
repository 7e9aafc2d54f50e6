"""The graph finds what the network finds; run as plain torch, which traces nothing and is quick."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from proxydet.errors import InputError
from proxydet.export.graph import DetectorGraph, ExportPooler, TorchvisionSuppression
from proxydet.export.runtime import SCORER_INPUTS, Found, to_image
from proxydet.modeling.config import CascadeConfig, InferenceConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.postprocess import Prediction
from proxydet.modeling.roi_heads import RegionPooler
from proxydet.vocabulary.vocabulary import Vocabulary


def graph_of(network: ProxyDetNetwork, settings: InferenceConfig) -> DetectorGraph:
    return DetectorGraph(network, settings, TorchvisionSuppression())


def run(
    graph: DetectorGraph, image_3HW: torch.Tensor, words: Vocabulary, threshold: float
) -> Found:
    outputs = graph(
        image_3HW.permute(1, 2, 0).contiguous(),
        torch.from_numpy(words.embeddings.copy()),
        torch.from_numpy(words.base.copy()),
        torch.tensor(threshold),
        *(torch.from_numpy(words.scorers[name].copy()) for name in SCORER_INPUTS),
    )
    assert bool(outputs["finite"])
    arrays = {name: tensor.numpy() for name, tensor in outputs.items()}
    size = tuple(image_3HW.shape[1:])
    return to_image(arrays, size, size, words.reported)


def paired(found: Found, wanted: Prediction) -> list[int]:
    """Return for each detection of the network the graph's: the nearest box of its class among those that tie with it.

    Scores that differ by rounding alone may change places; everything else keeps its order.
    """
    assert len(found.scores) == len(wanted)
    left = list(range(len(wanted)))
    order = []
    for score, box, label in zip(
        wanted.scores_N.tolist(), wanted.boxes_N4.numpy(), wanted.classes_N.tolist(), strict=True
    ):
        ties = [
            row for row in left
            if abs(found.scores[row] - score) <= 1e-5 and found.class_ids[row] == label
        ]  # fmt: skip
        assert ties, f"the graph has no detection of class {label} with a score of {score}"
        order.append(min(ties, key=lambda row: np.abs(found.boxes_xyxy[row] - box).max()))
        left.remove(order[-1])
    return order


def assert_same(found: Found, wanted: Prediction) -> None:
    order = paired(found, wanted)
    np.testing.assert_allclose(found.scores[order], wanted.scores_N, atol=1e-5)
    np.testing.assert_allclose(found.boxes_xyxy[order], wanted.boxes_N4, atol=1e-3)
    assert found.has_masks == wanted.has_masks
    if found.has_masks:
        np.testing.assert_allclose(
            found.mask_probs[found.mask_index][order],
            wanted.mask_probs_MSS[wanted.mask_index_N],
            atol=1e-5,
        )


@pytest.mark.parametrize("kind", ["resnet", "swin"])
@pytest.mark.parametrize(
    ("size", "classes", "threshold"),
    [((96, 128), 7, 0.02), ((61, 200), 1, 0.02), ((200, 61), 80, 0.3), ((33, 32), 1203, 0.02)],
)
def test_the_graph_finds_what_the_network_finds(tiny, kind, size, classes, threshold):
    network = tiny.lively(tiny.network(tiny.model_config(kind)))
    words = tiny.vocabulary(classes, seed=classes)
    # Twice as many as are compared: boxes that end up empty are dropped after the best were chosen.
    settings = InferenceConfig(score_threshold=threshold)
    image = tiny.image(*size, seed=3)
    (wanted,) = network.detect([image], words, settings=settings)
    assert len(wanted) > 5
    assert_same(run(graph_of(network, settings), image, words, threshold), wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"one_class_per_proposal": True},
        {"agnostic_nms": True},
        {"max_detections": 5},
        {"nms_iou": 0.2},
        {"alpha": 0.9, "beta": 0.1},
        {"rescore": True},
    ],
    ids=str,
)
def test_the_detectors_settings_go_into_the_graph(tiny, changes):
    network = tiny.lively(tiny.network())
    settings = dataclasses.replace(InferenceConfig(), **changes)
    image, words = tiny.image(96, 128), tiny.vocabulary(7)
    (wanted,) = network.detect([image], words, settings=settings)
    (usual,) = network.detect([image], words)
    assert len(wanted) != len(usual) or not torch.equal(wanted.scores_N, usual.scores_N)
    assert_same(run(graph_of(network, settings), image, words, settings.score_threshold), wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"agnostic_nms": True},
        {"one_class_per_proposal": True},
        {"agnostic_nms": True, "max_detections": 4},
    ],
    ids=str,
)
def test_the_classes_of_the_graph_can_have_scorers_of_their_own(tiny, changes):
    network = tiny.lively(tiny.network())
    settings = dataclasses.replace(InferenceConfig(score_threshold=0.3), **changes)
    image, words = tiny.image(96, 128), tiny.vocabulary(7)
    (plain,) = network.detect([image], words, settings=settings)
    scored = words.with_scorers(
        bias=np.linspace(-0.5, 0.5, 7),
        scale=np.linspace(0.8, 1.2, 7),
        threshold=[0.1, np.nan, 0.9, *[np.nan] * 4],
        background=[0, 0, 0, 0, 0, 1, 1],
    )
    (wanted,) = network.detect([image], scored, settings=settings)
    assert len(wanted) > 1
    assert len(wanted) != len(plain) or not torch.equal(wanted.scores_N, plain.scores_N)
    assert_same(run(graph_of(network, settings), image, scored, 0.3), wanted)


def test_a_model_without_mixup_branch(tiny):
    network = tiny.lively(tiny.network(tiny.model_config(mixup_branch=False)))
    image, words = tiny.image(96, 128), tiny.vocabulary(7)
    (wanted,) = network.detect([image], words)
    assert len(wanted) > 5
    assert_same(run(graph_of(network, InferenceConfig()), image, words, 0.02), wanted)


@pytest.mark.parametrize("head", [True, False])
def test_boxes_only_where_there_is_no_mask_head_or_no_masks_are_wanted(tiny, head):
    changes = {} if head else {"masks": None}
    network = tiny.lively(tiny.network(tiny.model_config(**changes)))
    settings = InferenceConfig(masks=not head)
    image, words = tiny.image(96, 128), tiny.vocabulary(7)
    (wanted,) = network.detect([image], words, settings=settings)
    assert len(wanted) > 5
    graph = graph_of(network, settings)
    assert not [name for name, _ in graph.named_parameters() if "mask" in name]
    found = run(graph, image, words, 0.02)
    assert_same(found, wanted)
    assert not found.has_masks
    with pytest.raises(InputError, match="boxes only"):
        _ = found.masks


def test_nothing_found_and_an_image_of_one_pixel(tiny):
    network = tiny.lively(tiny.network())
    graph = graph_of(network, InferenceConfig())
    found = run(graph, tiny.image(64, 64), tiny.vocabulary(3), 0.9999)
    assert len(found) == 0
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.masks.shape == (0, 64, 64)
    (wanted,) = network.detect([tiny.image(1, 1)], tiny.vocabulary(3))
    assert_same(run(graph, tiny.image(1, 1), tiny.vocabulary(3), 0.02), wanted)


def test_embeddings_of_any_length_are_the_same_classes(tiny):
    words = tiny.vocabulary(4)
    longer = Vocabulary.from_arrays(words.names, words.embeddings * 7.0, words.base)
    graph = graph_of(tiny.lively(tiny.network()), InferenceConfig())
    first, second = (run(graph, tiny.image(64, 96), text, 0.02) for text in (words, longer))
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-6)


@pytest.mark.parametrize("place", ["backbone", "roi_heads.box_head"])
def test_damaged_weights_are_reported(tiny, place):
    network = tiny.lively(tiny.network())
    parameter = next(network.get_submodule(place).parameters())
    with torch.no_grad():
        parameter.fill_(float("nan"))
    words = tiny.vocabulary(3)
    outputs = graph_of(network, InferenceConfig())(
        torch.zeros(64, 64, 3, dtype=torch.uint8),
        torch.from_numpy(words.embeddings.copy()),
        torch.from_numpy(words.base.copy()),
        torch.tensor(0.02),
        *(torch.from_numpy(words.scorers[name].copy()) for name in SCORER_INPUTS),
    )
    assert not bool(outputs["finite"])


def test_the_network_is_left_as_it_was(tiny):
    network = tiny.network()
    before = {name: values.clone() for name, values in network.state_dict().items()}
    graph = graph_of(network, InferenceConfig())
    assert type(network.roi_heads.box_pooler) is RegionPooler
    assert any(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_equals_the_detectors_on_odd_boxes(sampling_ratio):
    pooler = RegionPooler(CascadeConfig(canonical_size=64.0, sampling_ratio=sampling_ratio), side=7)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 4, 96 // s, 128 // s, generator=generator) for s in (8, 16, 32)]
    odd = [
        [0, 0, 0, 0],
        [10, 10, 10, 10],
        [-50, -40, 30, 20],
        [0, 0, 128, 96],
        [300, 300, 400, 400],
    ]
    corners = torch.rand(60, 2, 2, generator=generator) * 150 - 10
    drawn = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    boxes = torch.cat([torch.tensor(odd, dtype=torch.float32), drawn])
    index = torch.zeros(len(boxes), dtype=torch.int64)
    torch.testing.assert_close(
        ExportPooler(pooler)(features, boxes, index), pooler(features, boxes, index)
    )
