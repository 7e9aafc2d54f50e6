"""Test-time augmentation: the same view changes nothing, mirrored pictures give mirrored results."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from proxydet.detector import Detector
from proxydet.errors import ConfigError
from proxydet.modeling.boxes import Regions
from proxydet.modeling.config import InferenceConfig, ProposalConfig
from proxydet.modeling.network import ImageView, ViewFeatures, _merged
from proxydet.modeling.postprocess import Prediction
from proxydet.modeling.roi_heads import FeatureBatch

LOW = InferenceConfig(score_threshold=0.05, max_detections=30)


@pytest.fixture(scope="module")
def lively_network(tiny):
    return tiny.lively(tiny.network())


def mean_iou(first: torch.Tensor, second: torch.Tensor) -> float:
    both = (first & second).flatten(1).sum(dim=1)
    either = (first | second).flatten(1).sum(dim=1).clamp(min=1)
    return float((both / either).mean())


def assert_equal(one: Prediction, other: Prediction) -> None:
    assert len(one) == len(other) > 0
    for field in ("boxes_N4", "scores_N", "classes_N", "mask_probs_MSS", "mask_index_N"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


@pytest.mark.parametrize("times", [1, 2, 4])
def test_the_same_view_again_changes_no_bit(lively_network, tiny, times):
    image = tiny.image(96, 128)
    (plain,) = lively_network.detect([image], original_sizes=[(150, 200)], settings=LOW)
    again = lively_network.detect_views(
        [ImageView(image=image)] * times, original_size=(150, 200), settings=LOW
    )
    assert_equal(again, plain)


def test_a_mirrored_view_alone_is_the_mirrored_picture(lively_network, tiny):
    image = tiny.image(96, 128)
    (plain,) = lively_network.detect([image], settings=LOW)
    turned = lively_network.detect_views(
        [ImageView(image=image, mirrored=True)], original_size=(96, 128), settings=LOW
    )
    # Boxes that were mirrored there and back have lost their last bits.
    torch.testing.assert_close(turned.scores_N, plain.scores_N, atol=1e-6, rtol=0)
    x0, y0, x1, y1 = plain.boxes_N4.unbind(1)
    expected = torch.stack([128 - x1, y0, 128 - x0, y1], dim=1)
    torch.testing.assert_close(turned.boxes_N4, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        turned.mask_probs_MSS[turned.mask_index_N],
        plain.mask_probs_MSS[plain.mask_index_N].flip(2),
        atol=1e-4,
        rtol=0,
    )


def test_a_mirrored_picture_gives_mirrored_results(lively_network, tiny):
    image = tiny.image(96, 128)
    flipped = image.flip(2)
    views = [
        [ImageView(image=a), ImageView(image=b, mirrored=True)]
        for a, b in ((image, flipped), (flipped, image))
    ]
    one, other = (
        lively_network.detect_views(pair, original_size=(96, 128), settings=LOW) for pair in views
    )
    torch.testing.assert_close(one.scores_N, other.scores_N, atol=1e-5, rtol=0)
    mirrored = other.boxes_N4[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor(
        [128.0, 0, 128, 0]
    )
    torch.testing.assert_close(one.boxes_N4, mirrored, atol=1e-2, rtol=0)


def test_views_of_other_sizes_are_brought_to_one_frame(lively_network, tiny):
    # Twice as large, the same content: boxes of both views must meet in the pixels of the picture.
    image = tiny.image(96, 128)
    larger = torch.nn.functional.interpolate(
        image[None].float(), scale_factor=1.5, mode="bilinear"
    )[0]
    for order in ([image, larger], [larger, image]):
        found = lively_network.detect_views(
            [ImageView(image=view) for view in order], original_size=(96, 128), settings=LOW
        )
        assert len(found) > 0
        assert float(found.boxes_N4[:, 2].max()) <= 128
        assert float(found.boxes_N4[:, 3].max()) <= 96
        assert float(found.boxes_N4[:, 2].max()) > 100


def test_scores_are_means_over_the_views(lively_network, tiny):
    """With one proposal a detection's score is the mean of its scores in either view."""
    config = dataclasses.replace(lively_network.config.proposals, keep_test=1)
    one, two = tiny.image(64, 64, 1), tiny.image(64, 64, 2)
    settings = dataclasses.replace(LOW, score_threshold=0.0, nms_iou=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lively_network.proposal_generator, "config", config)
        alone = {}
        from proxydet.modeling import postprocess

        original = postprocess._Scorer.scores

        def watch(self, columns):
            values = original(self, columns)
            alone.setdefault(len(alone), values.clone())
            return values

        patch.setattr(postprocess._Scorer, "scores", watch)
        patch.setattr(
            lively_network, "config", dataclasses.replace(lively_network.config, proposals=config)
        )
        found = lively_network.detect_views(
            [ImageView(image=one), ImageView(image=two)], original_size=(64, 64), settings=settings
        )
    assert len(alone) == 2
    expected = ((alone[0] + alone[1]) / 2)[0].sort(descending=True).values
    torch.testing.assert_close(found.scores_N, expected[: len(found)])


def test_the_detector_uses_it_only_when_asked(lively_network, monkeypatch):
    detector = Detector(lively_network, shortest=64, longest=96)
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    seen = []
    original = lively_network.detect_views
    monkeypatch.setattr(
        lively_network,
        "detect_views",
        lambda views, *a, **k: seen.append(views) or original(views, *a, **k),
    )
    detector.predict(picture, score_threshold=0.02)
    assert seen == []
    augmented = detector.with_settings(flip=True, scales=(0.5, 1.0))
    found = augmented.predict(picture, score_threshold=0.02)
    assert found.image_size == (50, 70)
    (views,) = seen
    assert [tuple(view.image.shape[1:]) for view in views] == [
        (32, 45),
        (32, 45),
        (64, 90),
        (64, 90),
    ]
    assert [view.mirrored for view in views] == [False, True, False, True]
    assert torch.equal(views[1].image, views[0].image.flip(2))


def test_without_masks_there_are_none(lively_network, tiny):
    settings = dataclasses.replace(LOW, masks=False)
    view = ImageView(image=tiny.image(64, 64))
    found = lively_network.detect_views([view, view], original_size=(64, 64), settings=settings)
    assert not found.has_masks


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, 9.0)])
def test_scales_out_of_range_are_refused(scales):
    with pytest.raises(ConfigError, match="scales"):
        InferenceConfig(scales=scales)


def test_half_precision_needs_a_gpu(lively_network, tiny):
    settings = dataclasses.replace(LOW, precision="fp16")
    with pytest.raises(ConfigError, match="needs a GPU"):
        lively_network.detect([tiny.image(64, 64)], settings=settings)


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_go_into_a_view_and_back(mirrored):
    reference, own = (
        FeatureBatch(features=[], sizes_B2=torch.tensor([size]))
        for size in ([100.0, 200.0], [50.0, 80.0])
    )
    look = ViewFeatures(batch=own, proposals=None, mirrored=mirrored)
    boxes = torch.tensor([[20.0, 10.0, 60.0, 90.0]])
    inside = look.from_reference(boxes, reference)
    across = [56.0, 72.0] if mirrored else [8.0, 24.0]
    torch.testing.assert_close(inside, torch.tensor([[across[0], 5.0, across[1], 45.0]]))
    torch.testing.assert_close(look.to_reference(inside, reference), boxes)


def test_the_best_proposals_of_all_views_are_kept():
    """Of two views without a common box, the better scores are in the second."""
    scene = FeatureBatch(features=[], sizes_B2=torch.tensor([[100.0, 400.0]]))
    left_P = torch.arange(20) * 20.0
    boxes_P4 = torch.stack([left_P, left_P * 0, left_P + 10, left_P * 0 + 10], dim=1)
    looks = [
        ViewFeatures(
            batch=scene,
            proposals=Regions(
                boxes_BR4=boxes_P4[own][None],
                objectness_BR=torch.linspace(best, best - 0.2, 10)[None],
                valid_BR=torch.ones(1, 10, dtype=torch.bool),
            ),
            mirrored=False,
        )
        for own, best in ((slice(0, 10), 0.5), (slice(10, 20), 0.6))
    ]
    merged = _merged(looks, ProposalConfig(keep_test=3))
    scores_P = torch.cat([look.proposals.objectness_BR[0] for look in looks])
    best = scores_P.argsort(descending=True, stable=True)[:3]
    assert (best >= 10).any()
    assert torch.equal(merged.boxes_BR4[0], boxes_P4[best])
    assert torch.equal(merged.objectness_BR[0], scores_P[best])
