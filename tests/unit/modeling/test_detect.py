"""Inference: batches, vocabularies, settings, and every kind of empty result."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close
from torchvision.ops import box_iou

from proxydet.errors import ConfigError, DataError, NumericsError, VocabularyError
from proxydet.modeling import postprocess
from proxydet.modeling.config import (
    BackboneConfig,
    CascadeConfig,
    ClassifierConfig,
    InferenceConfig,
    ProposalConfig,
    SwinConfig,
)
from proxydet.modeling.network import ImageView, ProxyDetNetwork
from proxydet.modeling.postprocess import ClassText, Prediction, masks, to_host
from proxydet.modeling.roi_heads import RegionEmbeddings, ZeroShotClassifier
from proxydet.vocabulary.vocabulary import Vocabulary

LOW = InferenceConfig(score_threshold=0.0)


@pytest.fixture(scope="module")
def network(tiny) -> ProxyDetNetwork:
    return tiny.lively(tiny.network())


def assert_same(first: Prediction, second: Prediction, *, exact: bool = True) -> None:
    tolerance = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-5, "rtol": 1e-4}
    assert first.image_size == second.image_size
    assert torch.equal(first.classes_N, second.classes_N)
    assert torch.equal(first.mask_index_N, second.mask_index_N)
    for name in ("boxes_N4", "scores_N", "mask_probs_MSS"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), **tolerance)


def test_a_prediction_is_well_formed(network, tiny):
    (found,) = network.detect([tiny.image(90, 120)], settings=LOW)
    assert 10 < len(found) <= 300
    assert found.image_size == (90, 120)
    assert (found.scores_N.diff() <= 0).all()
    assert (found.boxes_N4 >= 0).all()
    assert (found.boxes_N4[:, 2] <= 120).all()
    assert (found.boxes_N4[:, 3] <= 90).all()
    assert (found.boxes_N4[:, 2:] > found.boxes_N4[:, :2]).all()
    assert set(found.classes_N.tolist()) <= set(range(6))
    assert found.mask_probs_MSS.shape[1:] == (14, 14)
    assert len(found.mask_index_N.unique()) == len(found.mask_probs_MSS)


def test_detections_that_share_a_box_share_a_mask(network, tiny):
    (found,) = network.detect([tiny.image(96, 96)], settings=LOW)
    boxes = {}
    for box, mask in zip(found.boxes_N4.tolist(), found.mask_index_N.tolist(), strict=True):
        assert boxes.setdefault(mask, box) == box
    assert len(found.mask_probs_MSS) < len(found)


def test_a_batch_finds_what_its_images_alone_do(network, tiny):
    sizes = [(96, 128), (64, 64), (90, 120), (33, 65), (96, 128)]
    images = [tiny.image(*size, seed) for seed, size in enumerate(sizes)]
    together = network.detect(images, settings=LOW)
    for image, found in zip(images, together, strict=True):
        (alone,) = network.detect([image], settings=LOW)
        # Different batch sizes may sum in different orders.
        assert_same(found, alone, exact=False)


def test_images_of_another_size_change_nothing_at_all(network, tiny):
    images = [tiny.image(96, 128, 0), tiny.image(64, 64, 1)]
    assert_same(
        network.detect(images, settings=LOW)[0], network.detect(images[:1], settings=LOW)[0]
    )


def test_predictions_on_the_host_are_the_same(network, tiny):
    images = [tiny.image(96, 128, 0), torch.zeros(3, 64, 64), tiny.image(64, 64, 1)]
    found = network.detect(images, settings=LOW)
    for moved, original in zip(to_host(found), found, strict=True):
        assert_same(moved, original)
    assert to_host([]) == []


def test_detect_of_no_images_is_an_empty_list(network):
    assert network.detect([]) == []


def test_float_and_uint8_images_are_the_same(network, tiny):
    image = tiny.image(64, 96)
    assert_same(
        network.detect([image], settings=LOW)[0], network.detect([image.float()], settings=LOW)[0]
    )


def test_boxes_are_in_pixels_of_the_original(network, tiny):
    image = tiny.image(64, 96)
    (small,) = network.detect([image], settings=LOW)
    (large,) = network.detect([image], original_sizes=[(128, 288)], settings=LOW)
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(large.boxes_N4, small.boxes_N4 * scale)
    assert large.image_size == (128, 288)
    assert masks(large).shape[1:] == (128, 288)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (7, 3)])
def test_images_of_a_few_pixels(network, tiny, size):
    (found,) = network.detect([tiny.image(*size)], settings=LOW)
    assert found.image_size == size
    assert masks(found).shape == (len(found), *size)


def test_a_threshold_that_nothing_reaches(network, tiny):
    settings = InferenceConfig(score_threshold=1.0)
    (found,) = network.detect([tiny.image(64, 64)], settings=settings)
    assert len(found) == 0
    assert found.boxes_N4.shape == (0, 4)
    assert found.mask_probs_MSS.shape[0] == 0
    assert masks(found).shape == (0, 64, 64)


def test_no_proposal_at_all(tiny):
    network = tiny.network()
    with torch.no_grad():
        network.proposal_generator.centernet_head.agn_hm.bias.fill_(-40.0)
    empty, _ = network.detect([tiny.image(64, 64), tiny.image(64, 64, 1)], settings=LOW)
    assert len(empty) == 0


def test_one_image_of_a_batch_without_proposals(network, tiny):
    (blank,) = network.detect([torch.zeros(3, 64, 64)], settings=LOW)
    pair = network.detect([torch.zeros(3, 64, 64), tiny.image(64, 64)], settings=LOW)
    assert len(pair[0]) == len(blank)
    assert len(pair[1]) > 0


def test_a_network_without_a_mask_head_gives_boxes_whatever_is_asked(tiny):
    network = tiny.lively(tiny.network(tiny.model_config(masks=None)))
    for threshold in (LOW.score_threshold, 1.0):
        settings = dataclasses.replace(LOW, masks=True, score_threshold=threshold)
        (found,) = network.detect([tiny.image(64, 64)], settings=settings)
        assert not found.has_masks
        views = [ImageView(image=tiny.image(64, 64))]
        seen = network.detect_views(views, original_size=(64, 64), settings=settings)
        assert not seen.has_masks
        assert torch.equal(seen.boxes_N4, found.boxes_N4)
    (with_masks,) = tiny.lively(tiny.network()).detect([tiny.image(64, 64)], settings=LOW)
    (boxes,) = network.detect([tiny.image(64, 64)], settings=LOW)
    assert torch.equal(with_masks.boxes_N4, boxes.boxes_N4)


def test_masks_only_when_asked_for(network, tiny):
    settings = dataclasses.replace(LOW, masks=False)
    (found,) = network.detect([tiny.image(64, 64)], settings=settings)
    assert len(found) > 0
    assert found.mask_index_N.tolist() == [-1] * len(found)
    with pytest.raises(ValueError, match="no masks"):
        masks(found)


def test_limits(network, tiny):
    image = tiny.image(96, 96)
    (everything,) = network.detect([image], settings=LOW)
    (five,) = network.detect([image], settings=dataclasses.replace(LOW, max_detections=5))
    assert len(five) == 5
    assert torch.equal(five.scores_N, everything.scores_N[:5])
    middle = float(everything.scores_N[len(everything) // 2])
    settings = InferenceConfig(score_threshold=middle)
    (above,) = network.detect([image], settings=settings)
    assert len(above) == int((everything.scores_N > middle).sum())


def test_one_class_per_proposal(network, tiny):
    settings = dataclasses.replace(LOW, one_class_per_proposal=True, nms_iou=1.0)
    (found,) = network.detect([tiny.image(96, 96)], settings=settings)
    (every,) = network.detect([tiny.image(96, 96)], settings=dataclasses.replace(LOW, nms_iou=1.0))
    assert len(found) == len(found.mask_probs_MSS)
    best: dict[tuple[float, ...], float] = {}
    for box, score in zip(every.boxes_N4.tolist(), every.scores_N.tolist(), strict=True):
        best[tuple(box)] = max(best.get(tuple(box), 0.0), score)
    for box, score in zip(found.boxes_N4.tolist(), found.scores_N.tolist(), strict=True):
        assert score == best[tuple(box)]


@pytest.mark.parametrize("chunk", [1, 100])
def test_agnostic_nms_keeps_the_best_of_overlapping_detections(network, tiny, chunk):
    image, iou = tiny.image(96, 96), 0.3
    free = dataclasses.replace(LOW, nms_iou=1.0, max_detections=100_000)
    (every,) = network.detect([image], settings=free)
    order = every.scores_N.argsort(descending=True, stable=True)
    kept: list[int] = []
    for place in order.tolist():
        overlaps = box_iou(every.boxes_N4[place][None], every.boxes_N4[kept])
        if not (overlaps > iou).any():
            kept.append(place)
    settings = dataclasses.replace(LOW, agnostic_nms=True, nms_iou=iou, class_chunk=chunk)
    (found,) = network.detect([image], settings=settings)
    assert 1 < len(kept) < len(every)
    assert_close(found.boxes_N4, every.boxes_N4[kept])
    assert found.classes_N.tolist() == every.classes_N[kept].tolist()
    assert_close(found.scores_N, every.scores_N[kept])


@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 100])
@pytest.mark.parametrize("one", [False, True])
def test_scoring_in_chunks_changes_nothing(network, tiny, chunk, one):
    images = [tiny.image(96, 96), tiny.image(96, 96, 1)]
    settings = dataclasses.replace(LOW, one_class_per_proposal=one)
    chunked = dataclasses.replace(settings, class_chunk=chunk)
    for whole, part in zip(
        network.detect(images, settings=settings),
        network.detect(images, settings=chunked),
        strict=True,
    ):
        assert_same(whole, part, exact=False)


def test_own_vocabulary_and_none_agree_on_the_training_classes(network, tiny):
    image = tiny.image(64, 96)
    (own,) = network.detect([image], tiny.vocabulary(), settings=LOW)
    (training,) = network.detect([image], settings=LOW)
    assert_same(own, training, exact=False)


def test_fusion_weights_follow_the_base_mask(network, tiny):
    image = tiny.image(64, 96)
    vocabulary = tiny.vocabulary()
    both = InferenceConfig(score_threshold=0.0, alpha=0.2, beta=0.6)
    swapped = InferenceConfig(score_threshold=0.0, alpha=0.6, beta=0.2)
    (first,) = network.detect([image], vocabulary, settings=both)
    (second,) = network.detect([image], vocabulary.with_base(~vocabulary.base), settings=swapped)
    assert_same(first, second)


def test_fusion_is_the_published_formula(network, tiny):
    captured = {}
    original = postprocess.detect_classes

    def capture(views, classes, classifiers, settings):
        (regions,) = views
        captured.update(regions=regions, classes=classes, classifiers=classifiers)
        return original(views, classes, classifiers, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxydet.modeling.network.detect_classes", capture)
        (found,) = network.detect([tiny.image(64, 64)], settings=LOW)
    regions, classes = captured["regions"], captured["classes"]
    text = classes.text_DC
    detection = sum((50 * e[0] @ text).sigmoid() for e in regions.detection) / 3
    mixup = (regions.mixup_BRD[0] @ text).sigmoid()
    weight = torch.where(classes.base_C, 0.15, 0.35)
    scores = (
        detection ** (1 - weight) * mixup**weight * regions.proposal_scores_BR[0][:, None]
    ) ** 0.5
    for box, score, label in zip(found.boxes_N4, found.scores_N, found.classes_N, strict=True):
        region = (regions.boxes_BR4[0] - box).abs().sum(dim=1).argmin()
        assert float(scores[region, label]) == pytest.approx(float(score), abs=1e-5)


def test_one_class(network, tiny):
    (found,) = network.detect([tiny.image(64, 64)], tiny.vocabulary(1), settings=LOW)
    assert set(found.classes_N.tolist()) == {0}


def test_ten_thousand_classes_stay_within_the_chunks_memory(network, tiny):
    vocabulary = tiny.vocabulary(10_000)
    widths = []
    original = postprocess._Scorer.scores

    def watch(self, columns):
        scores = original(self, columns)
        widths.append(scores.shape[1])
        return scores

    settings = InferenceConfig(score_threshold=0.05, class_chunk=1500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess._Scorer, "scores", watch)
        (found,) = network.detect([tiny.image(64, 64)], vocabulary, settings=settings)
    assert max(widths) == 1536  # 1500, in steps of 64
    assert sum(widths) == 10_000
    assert len(found) == 300
    (whole,) = network.detect(
        [tiny.image(64, 64)], vocabulary, settings=dataclasses.replace(settings, class_chunk=10_000)
    )
    assert_same(found, whole)


@pytest.mark.parametrize("one_class", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_chunks_change_no_bit(network, tiny, threshold, one_class):
    # More candidates in each chunk than suppression takes at once, so that chunks are pruned.
    settings = InferenceConfig(
        score_threshold=threshold, max_detections=20, one_class_per_proposal=one_class
    )
    vocabulary = tiny.vocabulary(301)
    images = [tiny.image(64, 96), tiny.image(64, 96, 1)]
    whole = network.detect(images, vocabulary, settings=settings)
    for chunk in (64, 65, 128, 300):
        parts = network.detect(
            images, vocabulary, settings=dataclasses.replace(settings, class_chunk=chunk)
        )
        for one, other in zip(parts, whole, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("one_label", [False, True])
@pytest.mark.parametrize("own", [None, "bias_C", "threshold_C"])
def test_a_large_list_is_searched_in_two_stages_with_the_same_result(one_label, own):
    """What cannot score above the threshold is left out before all branches are computed: here nearly everything."""
    torch.manual_seed(0)
    classes, shape = 400, (2, 30)
    common = normalize(torch.randn(16), dim=0)
    seen = [normalize(torch.randn(*shape, 16) + 8 * common, dim=2) for _ in range(4)]
    corners = torch.rand(*shape, 2) * 500
    boxes = torch.cat([corners, corners + torch.rand(*shape, 2) * 200 + 1], dim=2)
    regions = RegionEmbeddings(
        detection=tuple(seen[:3]),
        mixup_BRD=seen[3],
        mixup_boxes_BR4=boxes,
        boxes_BR4=boxes,
        proposal_scores_BR=torch.rand(shape),
        valid_BR=torch.ones(shape, dtype=torch.bool),
    )
    words = torch.randn(classes, 16)
    words -= (words @ common + 1.2)[:, None] * common  # all classes lie as far from the regions
    text = ClassText(
        text_DC=normalize(words, dim=1).T.contiguous(),
        base_C=torch.rand(classes) > 0.5,
        **({} if own is None else {own: 0.3 + 0.2 * torch.rand(classes)}),
    )
    config = ClassifierConfig(embedding_dim=16)
    classifiers = [
        ZeroShotClassifier(config, 8, torch.zeros(16, 2), t) for t in (50.0, 50.0, 50.0, 1.0)
    ]
    settings = InferenceConfig(score_threshold=0.3, agnostic_nms=one_label)
    parts = []
    original = postprocess._Scorer.scores_above

    def watch(self, columns, least):
        parts.append((original(self, columns, least) >= 0).float().mean().item())
        return original(self, columns, least)

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess._Scorer, "scores_above", watch)
        whole = postprocess.detect_classes([regions], text, classifiers, settings)
        assert not parts
        chunked = dataclasses.replace(settings, class_chunk=64)
        found = postprocess.detect_classes([regions], text, classifiers, chunked)
    assert found.counts == whole.counts
    assert min(found.counts) > 2
    assert_close(found.scores_L, whole.scores_L)
    assert_close(found.boxes_L4, whole.boxes_L4)
    assert found.classes_L.tolist() == whole.classes_L.tolist()
    # With thresholds of their own and several labels, nothing is too low to be compared with its class's.
    assert len(parts) == 7
    assert min(parts) < 0.2 or (own == "threshold_C" and not one_label)


def test_pruned_chunks_keep_little(network, tiny):
    kept = []
    original = postprocess._Search._prune

    def watch(self, part):
        pruned = original(self, part)
        kept.append((len(part.score_K), len(pruned.score_K)))
        return pruned

    settings = InferenceConfig(score_threshold=0.0, class_chunk=512, max_detections=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess._Search, "_prune", watch)
        network.detect([tiny.image(64, 64)], tiny.vocabulary(1500), settings=settings)
    assert len(kept) == 3
    assert all(before > 10_000 for before, _ in kept)
    assert all(after == 20 for _, after in kept)


def test_chunks_of_few_candidates_are_not_pruned(network, tiny):
    """Suppression of few boxes looks at their places in float32, which depend on all of them: once, at the end."""
    kept = []
    original = postprocess._Search._prune

    def watch(self, part):
        pruned = original(self, part)
        kept.append((len(part.score_K), pruned is part))
        return pruned

    limit = 5000
    settings = InferenceConfig(score_threshold=0.0, class_chunk=64, max_detections=limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess._Search, "_prune", watch)
        network.detect([tiny.image(64, 64)], tiny.vocabulary(150), settings=settings)
    assert len(kept) == 3
    assert all(0 < count <= 4 * limit and untouched for count, untouched in kept)


def test_of_equal_classes_the_first_is_taken_in_any_chunks(network, tiny):
    half = np.random.default_rng(0).normal(size=(64, tiny.DIMENSIONS))
    twice = Vocabulary.from_arrays(
        [f"class {n}" for n in range(128)], np.tile(half, (2, 1)), np.ones(128, bool)
    )
    settings = InferenceConfig(score_threshold=0.0, one_class_per_proposal=True)
    for chunk in (64, 128):
        chosen = dataclasses.replace(settings, class_chunk=chunk)
        (found,) = network.detect([tiny.image(64, 96)], twice, settings=chosen)
        assert len(found) > 10
        assert int(found.classes_N.max()) < 64


def test_two_vocabularies_in_two_threads(network, tiny):
    image = tiny.image(96, 96)
    vocabularies = [tiny.vocabulary(4, seed=5), tiny.vocabulary(9, seed=6)]
    alone = [network.detect([image], vocabulary, settings=LOW)[0] for vocabulary in vocabularies]
    results: dict[int, list[Prediction]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(4):
            results[index] += network.detect([image], vocabularies[index], settings=LOW)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 4
        for found in results[index]:
            assert_same(found, alone[index])


def test_a_vocabulary_leaves_no_trace(network, tiny):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    (first,) = network.detect([tiny.image(64, 64)], settings=LOW)
    network.detect([tiny.image(64, 64)], tiny.vocabulary(50, seed=3), settings=LOW)
    (again,) = network.detect([tiny.image(64, 64)], settings=LOW)
    assert_same(first, again)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_a_mixup_branch(tiny):
    network = tiny.lively(tiny.network(tiny.model_config(mixup_branch=False)))
    assert not any("cmm" in name for name in network.state_dict())
    image = tiny.image(64, 64)
    (found,) = network.detect([image], settings=LOW)
    unfused = InferenceConfig(score_threshold=0.0, alpha=0.0, beta=0.0)
    (same,) = network.detect([image], settings=unfused)
    assert_same(found, same)


def test_swin_and_one_step_and_a_bias(tiny):
    config = tiny.model_config(
        "swin",
        cascade=CascadeConfig(
            hidden=(16,), iou_thresholds=(0.5,), delta_weights=((10.0, 10.0, 5.0, 5.0),)
        ),
        classifier=ClassifierConfig(embedding_dim=tiny.DIMENSIONS, bias=-2.0),
    )
    (found,) = tiny.lively(tiny.network(config)).detect([tiny.image(50, 70)], settings=LOW)
    assert len(found) > 0


def test_wrong_images_are_named(network):
    with pytest.raises(DataError, match="image 1 has the shape"):
        network.detect([torch.zeros(3, 8, 8), torch.zeros(8, 8, 3)])
    with pytest.raises(DataError, match="image 0"):
        network.detect([torch.zeros(3, 0, 8)])


def test_sizes_must_be_as_many_as_images(network, tiny):
    with pytest.raises(ValueError, match="1 images but 2"):
        network.detect([tiny.image(32, 32)], original_sizes=[(1, 1), (2, 2)])


def test_a_vocabulary_of_another_encoder(network, tiny):
    with pytest.raises(VocabularyError, match="have 8 dimensions"):
        network.detect([tiny.image(32, 32)], tiny.vocabulary(dimensions=8))
    with pytest.raises(VocabularyError, match="dimensions"):
        ProxyDetNetwork(tiny.model_config(), tiny.vocabulary(dimensions=8))


def test_image_counts_must_fit(tiny):
    with pytest.raises(ConfigError, match="image counts"):
        ProxyDetNetwork(tiny.model_config(), tiny.vocabulary(), np.ones(5))


def test_detect_needs_eval_mode(tiny):
    with pytest.raises(RuntimeError, match="eval"):
        tiny.network().train().detect([tiny.image(32, 32)])


@pytest.mark.parametrize(
    "damaged",
    [
        "backbone.fpn_output3.weight",
        "proposal_generator.centernet_head.bbox_pred.bias",
        "roi_heads.box_head.1.fc1.weight",
        "roi_heads.box_predictor.2.bbox_pred.2.bias",
        "roi_heads.box_head_cmm.0.fc1.weight",
    ],
)
def test_values_that_are_not_finite_are_an_error_not_an_empty_result(tiny, damaged):
    network = tiny.lively(tiny.network())
    with torch.no_grad():
        network.get_parameter(damaged).fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        network.detect([tiny.image(64, 64)])


def test_precision_is_that_of_the_settings_whatever_the_network_trains_in(tiny, monkeypatch):
    monkeypatch.setenv("PROXYDET_ALLOW_SLOW_PRECISION", "1")
    network = tiny.lively(tiny.network())
    image = tiny.image(64, 64)
    (full,) = network.detect([image], settings=LOW)
    (half,) = network.detect([image], settings=dataclasses.replace(LOW, precision="bf16"))
    network.backbone_precision = network.heads_precision = "bf16"
    for one in (network, network.prepared()):
        (found,) = one.detect([image], settings=LOW)
        torch.testing.assert_close(found.scores_N, full.scores_N)
    assert half.scores_N.dtype == torch.float32
    assert not torch.equal(half.scores_N[:5], full.scores_N[:5])
    torch.testing.assert_close(half.scores_N[:5], full.scores_N[:5], atol=0.1, rtol=0)


def test_more_proposals_than_cells(tiny):
    config = tiny.model_config(
        proposals=ProposalConfig(convs=0, candidates_test=10_000, keep_test=10_000)
    )
    (found,) = tiny.lively(tiny.network(config)).detect([tiny.image(32, 32)], settings=LOW)
    assert len(found) > 0


def test_swin_default_is_swin_b():
    swin = BackboneConfig(kind="swin").swin
    assert swin == SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))


def test_a_base_mask_is_the_vocabularys(network):
    vocabulary = Vocabulary.from_arrays(["a", "b"], np.eye(2, 16), [True, False])
    assert network._class_text(vocabulary).base_C.tolist() == [True, False]


def test_a_network_laid_out_for_inference_has_the_same_weights_and_finds_the_same(tiny):
    plain, laid_out = tiny.lively(tiny.network()), tiny.lively(tiny.network())
    laid_out.load_state_dict(plain.state_dict())
    laid_out.train()
    assert laid_out.for_inference(torch.device("cpu")) is laid_out
    assert not laid_out.training
    for name, values in plain.state_dict().items():
        assert torch.equal(laid_out.state_dict()[name], values), name
    kernels = [m.weight for m in laid_out.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    image = tiny.image(90, 120)
    (first,), (second,) = (each.detect([image], settings=LOW) for each in (plain.eval(), laid_out))
    assert_same(first, second, exact=False)
