"""Matches, resamples and the intervals made of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxydet.errors import ConfigError
from proxydet.evaluation.bootstrap import (
    Resamples,
    WeightedPrecision,
    differences,
    drawn_weights,
    resample,
    widening,
)
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import Evaluation, run_evaluation
from proxydet.evaluation.report import difference_rows
from proxydet.evaluation.scoring import Curves, measures, summary

WITHOUT = EvaluationConfig(bootstrap=0, iou_types=("bbox", "segm"))


def engine_precision(curves: Curves) -> np.ndarray:
    precision_ATC = curves.precision_TRCA.mean(axis=1).transpose(2, 0, 1)
    return np.where(precision_ATC < 0, np.nan, precision_ATC)


def weighted(evaluation: Evaluation, kind: str) -> WeightedPrecision:
    return WeightedPrecision(evaluation.scored[kind].matches, len(evaluation.truth.category_ids))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    federated=st.booleans(),
    per_image=st.integers(1, 120),
    flags=st.booleans(),
)
def test_without_resampling_matches_give_the_engines_precision(
    make_set, seed, federated, per_image, flags
):
    truth, detections = make_set(
        seed, images=5, categories=4, per_image=per_image, federated=federated, crowds=True
    )
    for index, row in enumerate(truth["annotations"]):
        row["ignore"] = int(flags and index % 4 == 0)
    evaluation = run_evaluation(detections, truth, config=WITHOUT)
    for kind, part in evaluation.scored.items():
        ours = weighted(evaluation, kind).precision(
            np.ones(len(evaluation.truth.image_ids), dtype=np.int64)
        )
        np.testing.assert_allclose(ours, engine_precision(part.curves), atol=1e-12)


def test_coco_counts_100_detections_of_a_category_in_an_image():
    """The 101st would find the object; neither the engine nor our own matches look at it."""
    size = {"height": 200, "width": 200}
    truth = {
        "images": [{"id": 1, **size}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [150, 150, 40, 40]}],
    }
    for wrong, ap in ((99, 0.01), (100, 0)):
        detections = [
            {"image_id": 1, "category_id": 1, "bbox": [index, 0, 5, 5], "score": 0.9}
            for index in range(wrong)
        ]
        detections += [{**detections[0], "bbox": [150, 150, 40, 40], "score": 0.1}]
        evaluation = run_evaluation(detections, truth, config=EvaluationConfig(bootstrap=0))
        assert evaluation.report.ap == pytest.approx(ap)
        assert weighted(evaluation, "bbox").precision(np.ones(1, dtype=np.int64))[
            0, 0, 0
        ] == pytest.approx(ap)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("federated", [True, False])
def test_weights_are_copies_of_images(make_set, seed, federated):
    """An image of weight 3 counts as three copies of it would, and one of weight 0 as if it were not there."""
    truth, detections = make_set(seed, images=6, per_image=40, federated=federated)
    for index, row in enumerate(detections):
        row["score"] = (index + 1) / (len(detections) + 1)
    weights = np.random.default_rng(seed).integers(0, 4, 6)
    evaluation = run_evaluation(detections, truth, config=WITHOUT)
    ids = evaluation.truth.image_ids
    copied, copied_detections = copies(truth, detections, dict(zip(ids, weights, strict=True)))
    expected = run_evaluation(copied_detections, copied, config=WITHOUT)
    for kind in ("bbox", "segm"):
        ours = weighted(evaluation, kind).precision(weights)
        theirs = engine_precision(expected.scored[kind].curves)
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def copies(
    truth: dict[str, Any], detections: list[Any], weights: dict[int, int]
) -> tuple[dict[str, Any], list[Any]]:
    new: dict[str, Any] = {"images": [], "annotations": [], "categories": truth["categories"]}
    copied_detections = []
    for row in truth["images"]:
        for number in range(weights[row["id"]]):
            new_id = row["id"] * 100 + number
            new["images"].append({**row, "id": new_id, "file_name": f"{new_id}.jpg"})
            for source, target in (
                (truth["annotations"], new["annotations"]),
                (detections, copied_detections),
            ):
                for item in source:
                    if item["image_id"] == row["id"]:
                        target.append({**copy.deepcopy(item), "image_id": new_id})
    for index, row in enumerate(new["annotations"]):
        row["id"] = index + 1
    return new, copied_detections


def test_annotations_found_are_named(make_set):
    truth, detections = make_set(3, images=6, per_image=30)
    evaluation = run_evaluation(detections, truth, config=WITHOUT)
    matches = evaluation.scored["bbox"].matches
    selection = matches.selection
    found = matches.annotation_N >= 0
    assert found.any()
    annotations = evaluation.truth
    for near, annotation, iou in zip(
        matches.near_N[found], matches.annotation_N[found], matches.iou_N[found], strict=True
    ):
        assert annotations.ann_image_A[annotation] == selection.image_S[near]
        assert annotations.ann_category_A[annotation] == selection.category_S[near]
        assert 0.5 <= iou <= 1 + 1e-9
    assert len(set(matches.annotation_N[found])) == found.sum()


def test_intervals_are_around_the_metrics_and_repeatable(make_set):
    truth, detections = make_set(12, images=30, categories=6, per_image=30)
    novel = np.array([True, False] * 3)
    options = {"groups": {"novel": novel}}
    report = run_evaluation(
        detections, truth, config=EvaluationConfig(bootstrap=50), **options
    ).report
    part = report.types["segm"]
    assert {"AP", "AP50", "AP75", "APs", "APm", "APr", "APc", "APf"} <= set(part.intervals)
    for name in ("AP", "AP50", "APr"):
        interval = part.intervals[name]
        assert 0 <= interval.low < part.metrics[name] < interval.high <= 1
    group = part.intervals["novel/AP50"]
    assert group.low < part.group("novel").ap50 < group.high
    again = run_evaluation(
        detections, truth, config=EvaluationConfig(bootstrap=50), **options
    ).report
    assert again.to_dict() == report.to_dict()
    other = EvaluationConfig(bootstrap=50, seed=1)
    assert (
        run_evaluation(detections, truth, config=other).report.types["segm"].intervals
        != part.intervals
    )
    narrow = EvaluationConfig(bootstrap=50, confidence=0.5)
    half = run_evaluation(detections, truth, config=narrow).report.types["segm"].intervals["AP"]
    assert part.intervals["AP"].low < half.low < half.high < part.intervals["AP"].high


def test_resamples_that_differ_by_rounding_give_no_interval():
    drawn = Resamples(
        names=("APr", "AP"),
        values_M=np.array([0.7, 0.5]),
        resampled_RM=np.array([[0.7, 0.4], [0.7 + 1e-16, 0.6], [0.7 - 1e-16, 0.5]]),
        rare=(1, 0.6),
    )
    assert set(drawn.intervals(0.95)) == {"AP"}


def test_a_category_of_two_images_is_widened_in_every_resample():
    size = {"height": 99, "width": 99}
    box = {"category_id": 1, "bbox": [9, 9, 40, 40]}
    truth = {
        "images": [{"id": index, **size} for index in range(1, 6)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": index, "image_id": index, **box} for index in (1, 2)],
    }
    detections = [{"image_id": 1, "score": 0.5, **box}]
    evaluation = run_evaluation(detections, truth, config=EvaluationConfig(bootstrap=0))
    precision = weighted(evaluation, "bbox")
    widened = resample(precision, evaluation.truth, {}, number=30).resampled_RM[:, 0]
    plain = [
        measures(summary(precision.precision(drawn_weights(5, 0, index))), None, {})["AP"]
        for index in range(30)
    ]
    whole = evaluation.report.ap
    expected = whole + widening(2) * (np.array(plain) - whole)
    np.testing.assert_allclose(widened, expected)
    assert np.nanstd(plain) > 0


def test_how_rare_categories_come_and_go_is_told(make_set):
    truth, detections = make_set(12, images=20, categories=9, per_image=10)
    report = run_evaluation(detections, truth, config=EvaluationConfig(bootstrap=30)).report
    scored, average = report.types["bbox"].resampling.rare
    assert scored == report.types["bbox"].group("rare").scored
    assert 0 < average < scored


def compared(
    truth: dict[str, Any], first: list[Any], second: list[Any], number: int = 100
) -> dict[str, Any]:
    both = []
    for detections in (first, second):
        evaluation = run_evaluation(detections, truth, config=EvaluationConfig(bootstrap=0))
        drawn = weighted(evaluation, "bbox")
        both.append(resample(drawn, evaluation.truth, evaluation.groups, number=number))
    return {row.metric: row for row in differences(*both, confidence=0.95)}


def test_a_detector_does_not_differ_from_itself(make_set):
    truth, detections = make_set(12, images=15, per_image=20)
    rows = compared(truth, detections, copy.deepcopy(detections))
    assert rows["AP"].difference == 0
    assert rows["AP"].chance == 1
    assert not rows["AP"].clear


def test_chance_counts_differences_either_way():
    """Resampled differences of standard deviation 0.1; a difference of 0.1 either way is one sigma: 31.7 %."""
    spread = np.array([[0.4], [0.6], [0.5]])
    nothing = Resamples(
        names=("AP",), values_M=np.zeros(1), resampled_RM=np.zeros((3, 1)), rare=None
    )
    for value in (0.1, -0.1):
        other = Resamples(names=("AP",), values_M=np.array([value]), resampled_RM=spread, rare=None)
        (row,) = differences(nothing, other, confidence=0.95)
        assert row.chance == pytest.approx(0.3173, abs=1e-4)
        assert row.interval.high - row.difference == pytest.approx(0.196, abs=1e-3)
        assert not row.clear


def test_a_much_better_detector_is_clearly_better(make_set):
    truth, detections = make_set(12, images=40, per_image=25)
    perfect = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for row in truth["annotations"]
    ]
    for row in detections:
        del row["segmentation"]
    rows = compared(truth, detections, perfect)
    assert rows["AP"].clear
    assert rows["AP"].interval.low > 0
    assert rows["AP"].chance < 1e-3
    backwards = compared(truth, perfect, detections)
    assert backwards["AP"].difference == -rows["AP"].difference
    assert backwards["AP"].interval.high < 0


def test_a_single_class_of_a_single_image_is_not_called_clear(make_set):
    """It is in a resample as it is or not at all: no resample shows how far the difference varies."""
    truth, _ = make_set(12, images=15)
    only = truth["annotations"][0]
    truth["annotations"] = [only]
    found = [{key: only[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}]
    row = compared(truth, [], found)["AP"]
    assert row.difference == pytest.approx(1, abs=1e-12)
    assert row.interval is None
    assert row.chance is None
    assert not row.clear
    assert difference_rows([row])[0]["verdict"] == "too few images"


def test_pairs_narrow_the_interval(make_set):
    """Two detectors that err on the same images differ more surely than their own intervals tell."""
    truth, detections = make_set(12, images=40, per_image=25)
    slightly = copy.deepcopy(detections)
    for row in slightly[::10]:
        row["score"] *= 0.9
    rows = compared(truth, detections, slightly)
    own = run_evaluation(detections, truth, config=EvaluationConfig(iou_types=("bbox",))).report
    own_width = own.types["bbox"].intervals["AP"].high - own.types["bbox"].intervals["AP"].low
    assert rows["AP"].interval.high - rows["AP"].interval.low < own_width / 2


def test_metrics_of_resamples_are_the_official_ones(make_set):
    truth, detections = make_set(7, images=25, categories=6, per_image=20)
    evaluation = run_evaluation(
        detections, truth, config=EvaluationConfig(bootstrap=2), groups={"odd": [True, False] * 3}
    )
    for kind, part in evaluation.scored.items():
        values = dict(zip(part.resamples.names, part.resamples.values_M, strict=True))
        expected = evaluation.report.types[kind]
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"):
            value = expected.metrics[name]
            assert values[name] == pytest.approx(np.nan if value is None else value, nan_ok=True)
        assert values["odd/AP50"] == pytest.approx(expected.group("odd").ap50)
        ap_C = part.curves.summary_A3C[0, 0]
        assert values["odd/AP"] == pytest.approx(np.nanmean(ap_C[[0, 2, 4]]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bootstrap": 1},
        {"bootstrap": -1},
        {"confidence": 1.0},
        {"seed": -1},
        {"engine": "fast"},
        {"iou_types": ("keypoints",)},
        {"iou_types": ("bbox", "bbox")},
        {"max_detections": 0},
        {"batch_size": 0},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EvaluationConfig(**wrong)
