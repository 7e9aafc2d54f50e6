"""Kinds of errors, calibration, recall of boxes, OpenImages."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxydet.errors import ConfigError, DataError
from proxydet.evaluation.analysis import (
    analyse,
    box_recall,
    break_down_errors,
    calibrate,
    one_label_a_box,
    operating_point,
    right_and_wrong,
)
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import Evaluation, run_evaluation
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.matching import FOUND, match
from proxydet.evaluation.openimages import ancestors_in, score_openimages
from proxydet.evaluation.results import read_results
from proxydet.evaluation.scoring import hotcoco_data, select
from proxydet.vocabulary.vocabulary import Vocabulary

BOXES = EvaluationConfig(bootstrap=0, iou_types=("bbox",))
SIZE = {"height": 200, "width": 200}


def coco(boxes: dict[int, list[tuple[int, list[float]]]], categories: int = 3) -> dict[str, Any]:
    """COCO annotations: for each image id, (category id, box) pairs."""
    rows = [(image, *pair) for image, pairs in boxes.items() for pair in pairs]
    return {
        "images": [{"id": image, **SIZE} for image in boxes],
        "categories": [{"id": c, "name": f"c{c}"} for c in range(1, categories + 1)],
        "annotations": [
            {"id": index + 1, "image_id": image, "category_id": category, "bbox": box}
            for index, (image, category, box) in enumerate(rows)
        ],
    }


def found(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def evaluated(truth: dict[str, Any], detections: list[dict[str, Any]]) -> Evaluation:
    return run_evaluation(detections, truth, config=BOXES)


HERE, SHIFTED, NEAR, FAR = [10, 10, 40, 40], [12, 10, 40, 40], [35, 10, 40, 40], [140, 140, 40, 40]


@pytest.mark.parametrize(
    ("detection", "kind"),
    [
        (found(1, 1, NEAR, 0.9), "localisation"),
        (found(1, 2, SHIFTED, 0.9), "classification"),
        (found(1, 2, NEAR, 0.9), "classification and localisation"),
        (found(1, 1, FAR, 0.9), "background"),
        (found(1, 1, SHIFTED, 0.1), "duplicate"),
    ],
)
def test_each_kind_of_error_is_told(detection, kind):
    truth = coco({1: [(1, HERE)], 2: [(2, HERE)]})
    right = [found(1, 1, HERE, 0.5), found(2, 2, HERE, 0.5)]
    evaluation = evaluated(truth, [*right, detection])
    errors = break_down_errors(evaluation.scored["bbox"])
    assert {name for name, count in errors.counts.items() if count} == {kind}
    assert errors.ap50 == pytest.approx(evaluation.report.ap50)
    assert all(cost >= 0 for cost in errors.costs.values())
    if detection["score"] > 0.5:
        assert errors.costs[kind] == pytest.approx(1 - errors.ap50)


def overlap(first: list[float], second: list[float]) -> float:
    width, height = (
        min(first[at] + first[at + 2], second[at] + second[at + 2]) - max(first[at], second[at])
        for at in (0, 1)
    )
    both = width * height if min(width, height) > 0 else 0.0
    union = first[2] * first[3] + second[2] * second[3] - both
    return both / union if union else 0.0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1), federated=st.booleans(), kind=st.sampled_from(["bbox", "segm"])
)
def test_kinds_of_errors_and_their_costs_are_those_of_hotcoco(make_set, seed, federated, kind):
    truth, detections = make_set(
        seed, per_image=30, federated=federated, crowds=True, steps=1_000_000
    )
    config = EvaluationConfig(bootstrap=0, iou_types=(kind,))
    scored = run_evaluation(detections, truth, config=config).scored[kind]
    errors = break_down_errors(scored)
    if not len(scored.selection):  # nothing that hotcoco would take
        assert errors.counts["missed"] == sum(errors.counts.values())
        return
    data = hotcoco_data(scored.truth, scored.results, scored.matches.selection, kind)
    evaluator = hotcoco.COCOeval(*data, kind, lvis_style=federated)
    evaluator.params.max_dets = [1000]
    evaluator.evaluate()
    theirs = evaluator.tide_errors(pos_thr=0.5, bg_thr=0.1)
    names = {
        "Cls": "classification",
        "Loc": "localisation",
        "Both": "classification and localisation",
        "Dupe": "duplicate",
        "Bkg": "background",
        "Miss": "missed",
    }
    assert errors.ap50 == pytest.approx(theirs["ap_base"], abs=1e-9)
    assert errors.counts == {name: theirs["counts"].get(key, 0) for key, name in names.items()}
    for key, name in names.items():
        assert errors.costs[name] == pytest.approx(theirs["delta_ap"].get(key, 0), abs=1e-9), name


def test_calibration_compares_scores_with_hits():
    truth = coco({image: [(1, HERE)] for image in range(1, 11)})
    detections = [found(image, 1, HERE if image <= 8 else FAR, 0.85) for image in range(1, 11)]
    detections += [found(1, 1, FAR, 0.15)]
    calibration = calibrate(evaluated(truth, detections).scored["bbox"].matches)
    assert calibration.count_B[[1, 8]].tolist() == [1, 10]
    assert calibration.precision_B[[1, 8]] == pytest.approx([0, 0.8])
    assert calibration.score_B[[1, 8]] == pytest.approx([0.15, 0.85])
    assert calibration.error == pytest.approx((10 * 0.05 + 0.15) / 11)
    assert np.isnan(calibration.score_B[0])


def test_scores_outside_of_the_unit_interval_are_counted():
    truth = coco({1: [(1, HERE)]})
    matches = (
        evaluated(truth, [found(1, 1, HERE, 7.0), found(1, 1, FAR, -3)]).scored["bbox"].matches
    )
    assert calibrate(matches).count_B.tolist() == [1, *[0] * 8, 1]


def test_ignored_detections_are_neither_right_nor_wrong(make_set):
    truth, detections = make_set(5, images=8, per_image=30)
    evaluation = run_evaluation(detections, truth, config=BOXES)
    matches = evaluation.scored["bbox"].matches
    right, wrong = right_and_wrong(matches)
    assert not (right & wrong).any()
    assert (~right & ~wrong).any()
    recall = evaluation.scored["bbox"].curves.recall_TCAM[0, :, 0, 0]
    annotations = np.array([row.annotations for row in evaluation.report.per_class()])
    assert right.sum() == pytest.approx((recall * annotations)[recall >= 0].sum())


def test_recall_of_boxes_leaves_classes_aside():
    truth = coco({1: [(1, HERE), (2, FAR)], 2: [(3, HERE)]})
    detections = [found(1, 3, HERE, 0.5), found(1, 3, SHIFTED, 0.9), found(2, 1, NEAR, 0.4)]
    evaluation = evaluated(truth, detections)
    best, all_of_them = box_recall(evaluation.truth, evaluation.results, limits=(1, 10))
    assert best.at_50 == pytest.approx(1 / 3)
    assert 0 < best.average < best.at_50
    assert all_of_them.at_50 == pytest.approx(1 / 3)
    # Where the shifted box is too far off, the exact one, which scores less, takes the annotation.
    assert all_of_them.average == pytest.approx(all_of_them.at_50, abs=1e-12)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), federated=st.booleans(), per_image=st.integers(1, 60))
def test_recall_of_boxes_is_that_of_our_own_matches(make_set, seed, federated, per_image):
    """The slow way: all classes as one, matched here; boxes that cover nothing take their place among the best."""
    drawn, detections = make_set(
        seed, images=5, per_image=per_image, federated=federated, crowds=True, steps=1000
    )
    for index, row in enumerate(drawn["annotations"]):
        row["ignore"] = int(index % 5 == 0)
    truth = GroundTruth.load(drawn)
    results = read_results(detections, truth)
    one_class = replace(
        truth,
        protocol="lvis",
        category_ids=(0,),
        ann_category_A=np.zeros_like(truth.ann_category_A),
        ann_ignore_A=truth.ann_ignore_A | truth.ann_crowd_A,
        negatives_N2=np.column_stack([np.arange(len(truth.image_ids)), [0] * len(truth.image_ids)]),
        unexhaustive_N2=np.zeros((0, 2), dtype=np.int64),
    )
    boxes = replace(results, category_D=np.zeros_like(results.category_D))
    for measured in box_recall(truth, results, limits=(3, 20, 300)):
        selection = select(boxes, one_class, iou_type="bbox", per_image=measured.limit)
        matches = match(one_class, boxes, selection, "bbox")
        to_find = int(matches.counts_GA[:, 0].sum())
        found_T = np.count_nonzero(matches.state_NAT[:, 0] == FOUND, axis=0)
        if not to_find:
            assert measured.average is None
            continue
        assert measured.average == pytest.approx(found_T.mean() / to_find, abs=1e-12)
        assert measured.at_50 == pytest.approx(found_T[0] / to_find, abs=1e-12)


# -- OpenImages -----------------------------------------------------------------------------------------------------


def openimages(annotations: list[dict[str, Any]]) -> dict[str, Any]:
    labels = ["/m/animal", "/m/dog", "/m/cat", "/m/car"]
    for index, row in enumerate(annotations):
        row.setdefault("image_id", 1)
        row["id"] = index + 1
    positive = sorted({row["category_id"] for row in annotations})
    return {
        "images": [{"id": 1, **SIZE, "pos_category_ids": positive, "neg_category_ids": [4]}],
        "categories": [
            {"id": index + 1, "name": label[3:], "freebase_id": label}
            for index, label in enumerate(labels)
        ],
        "annotations": annotations,
    }


def scored(truth: dict[str, Any], detections: list[dict[str, Any]], **options: Any) -> np.ndarray:
    loaded = GroundTruth.load(truth)
    return score_openimages(loaded, read_results(detections, loaded), **options).ap50_C


def test_openimages_area_under_the_curve():
    truth = openimages([{"category_id": 2, "bbox": HERE}, {"category_id": 2, "bbox": FAR}])
    detections = [
        found(1, 2, HERE, 0.9),
        found(1, 2, [90, 20, 10, 10], 0.8),
        found(1, 2, FAR, 0.7),
        found(1, 2, SHIFTED, 0.6),
    ]
    ap50_C = scored(truth, detections)
    assert ap50_C[1] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert np.isnan(ap50_C[[0, 2, 3]]).all()


def test_openimages_categories_do_not_mix():
    truth = openimages([{"category_id": 2, "bbox": HERE}, {"category_id": 3, "bbox": HERE}])
    detections = [found(1, 2, FAR, 0.9), found(1, 2, HERE, 0.8), found(1, 3, HERE, 0.1)]
    assert scored(truth, detections)[1:3].tolist() == [0.5, 1.0]


def test_openimages_unverified_categories_do_no_harm():
    truth = openimages([{"category_id": 2, "bbox": HERE}])
    assert scored(truth, [found(1, 2, HERE, 0.5), found(1, 3, HERE, 0.9)])[1] == 1
    report = run_evaluation([found(1, 2, HERE, 0.5), found(1, 4, FAR, 0.9)], truth).report
    assert report.ap is None
    assert report.ap50 == 1
    assert report.protocol == "openimages"


def test_openimages_group_boxes_are_one_hit_with_the_best_score():
    group = {"category_id": 2, "bbox": [100, 100, 80, 80], "iscrowd": 1}
    truth = openimages([{"category_id": 2, "bbox": HERE}, group])
    inside = [found(1, 2, [100 + 20 * k, 110, 15, 15], 0.5 + k / 10) for k in range(3)]
    # The three in the group are one hit at 0.7; the object is found at 0.6; a stray at 0.65 lies between.
    detections = [*inside, found(1, 2, HERE, 0.6), found(1, 2, [10, 150, 20, 20], 0.65)]
    assert scored(truth, detections)[1] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_openimages_only_the_annotation_overlapped_most_counts():
    """Two boxes on one object: the second is false even though it overlaps another object by half."""
    truth = openimages(
        [{"category_id": 2, "bbox": HERE}, {"category_id": 2, "bbox": [22, 10, 40, 40]}]
    )
    detections = [found(1, 2, HERE, 0.9), found(1, 2, SHIFTED, 0.8)]
    assert scored(truth, detections)[1] == pytest.approx(0.5)


def test_openimages_half_an_overlap_is_enough():
    truth = openimages([{"category_id": 2, "bbox": [0, 0, 10, 10]}])
    assert scored(truth, [found(1, 2, [0, 0, 10, 5], 0.9)])[1] == 1
    assert scored(truth, [found(1, 2, [0, 0, 10, 4.99], 0.9)])[1] == 0


@pytest.mark.parametrize(("score", "ap50"), [(0.0, 0), (1e-6, 1)])
def test_openimages_a_group_is_not_found_by_a_score_of_zero(score, ap50):
    truth = openimages([{"category_id": 2, "bbox": [100, 100, 80, 80], "iscrowd": 1}])
    assert scored(truth, [found(1, 2, [110, 110, 15, 15], score)])[1] == ap50


@pytest.mark.parametrize("seed", range(4))
def test_openimages_weights_are_copies_of_images(seed):
    """An image of weight n counts like n images of the same content, one of weight 0 like none."""
    draw = np.random.default_rng(seed)
    weights = draw.integers(0, 4, 6)
    alone: dict[str, Any] = {"images": [], "annotations": []}
    copied: dict[str, Any] = {"images": [], "annotations": []}
    detections: dict[str, list[Any]] = {"alone": [], "copied": []}
    for image, weight in enumerate(weights.tolist(), 1):
        boxes = [
            (int(draw.integers(1, 4)), [*draw.integers(0, 100, 2).tolist(), 40, 40])
            for _ in range(3)
        ]
        crowd = int(draw.integers(0, 2))
        guesses = [
            (
                category,
                [*(np.array(box[:2]) + draw.integers(-12, 12, 2)).clip(0, 120).tolist(), 40, 40],
            )
            for category, box in boxes
        ]
        scores = draw.random(3).tolist()
        for target, key, ids in (
            (alone, "alone", [image]),
            (copied, "copied", [10 * image + copy for copy in range(weight)]),
        ):
            for image_id in ids:
                target["images"].append(
                    {"id": image_id, **SIZE, "pos_category_ids": [1, 2, 3], "neg_category_ids": []}
                )
                target["annotations"] += [
                    {"image_id": image_id, "category_id": category, "bbox": box, "iscrowd": crowd}
                    for category, box in boxes
                ]
                detections[key] += [
                    found(image_id, category, box, score)
                    for (category, box), score in zip(guesses, scores, strict=True)
                ]
    categories = [{"id": index, "name": f"c{index}"} for index in (1, 2, 3)]
    one = GroundTruth.load({**alone, "categories": categories})
    score = score_openimages(one, read_results(detections["alone"], one))
    many = GroundTruth.load({**copied, "categories": categories})
    results = read_results(detections["copied"], many)
    expected = score_openimages(many, results).ap50_C
    assert score.hits.ap50(weights.astype(float), 3) == pytest.approx(expected, nan_ok=True)
    assert np.nanmax(expected) > 0


def test_openimages_has_intervals():
    truth = openimages([])
    truth["images"] = [
        {**truth["images"][0], "id": index, "pos_category_ids": [2]} for index in range(1, 21)
    ]
    truth["annotations"] = [
        {"image_id": index, "category_id": 2, "bbox": HERE} for index in range(1, 21)
    ]
    detections = [found(index, 2, HERE, 0.5) for index in range(1, 11)]
    report = run_evaluation(detections, truth, config=EvaluationConfig(bootstrap=200)).report
    part = report.types["bbox"]
    assert part.metrics["AP50"] == 0.5
    # The share of 20 images that were found: its standard error is sqrt(0.25 / 20).
    interval = part.intervals["AP50"]
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * 0.1118, rel=0.15)
    assert part.resampling.number == 200
    again = run_evaluation(detections, truth, config=EvaluationConfig(bootstrap=0)).report
    assert again.types["bbox"].resampling is None


@pytest.mark.parametrize("option", [{"fixed": True}, {"engine": "lvis"}])
def test_openimages_has_no_fixed_ap_and_one_engine(option):
    truth = openimages([{"category_id": 2, "bbox": HERE}])
    with pytest.raises(ConfigError, match=f"--{next(iter(option))}"):
        run_evaluation([found(1, 2, HERE, 0.5)], truth, config=EvaluationConfig(**option))


@pytest.fixture
def hierarchy(tmp_path) -> Path:
    animals = [{"LabelName": "/m/dog"}, {"LabelName": "/m/cat"}]
    tree = {
        "LabelName": "/m/entity",
        "Subcategory": [
            {"LabelName": "/m/animal", "Subcategory": animals},
            {"LabelName": "/m/car"},
        ],
    }
    path = tmp_path / "hierarchy.json"
    path.write_text(json.dumps(tree))
    return path


def test_openimages_expansion_lets_a_dog_be_an_animal(hierarchy):
    truth = openimages([{"category_id": 1, "bbox": HERE}, {"category_id": 2, "bbox": HERE}])
    detections = [found(1, 2, HERE, 0.9)]
    loaded = GroundTruth.load(truth)
    ancestors = ancestors_in(hierarchy, loaded)
    assert ancestors == {1: (0,), 2: (0,)}
    assert scored(truth, detections)[:2].tolist() == [0, 1]
    assert scored(truth, detections, ancestors=ancestors)[:2].tolist() == [1, 1]
    config = EvaluationConfig(hierarchy=hierarchy)
    metrics = run_evaluation(detections, truth, config=config).report.types["bbox"].metrics
    assert metrics == {"AP50": 0.5, "AP50 expanded": 1.0}


def test_openimages_expansion_goes_all_the_way_up(tmp_path):
    tree: dict[str, Any] = {"LabelName": "/m/cat"}
    for label in ("/m/dog", "/m/animal", "/m/entity"):
        tree = {"LabelName": label, "Subcategory": [tree]}
    path = tmp_path / "hierarchy.json"
    path.write_text(json.dumps(tree))
    truth = openimages([{"category_id": category, "bbox": HERE} for category in (1, 2, 3)])
    loaded = GroundTruth.load(truth)
    ancestors = ancestors_in(path, loaded)
    assert ancestors == {1: (0,), 2: (0, 1)}
    best = scored(truth, [found(1, 3, HERE, 0.9)], ancestors=ancestors)
    assert best[:3].tolist() == [1, 1, 1]


def test_openimages_a_hierarchy_of_other_labels_is_told(hierarchy, make_set):
    truth = GroundTruth.load(make_set(1)[0])
    with pytest.raises(DataError, match="none of its labels is a category"):
        ancestors_in(hierarchy, truth)


def test_an_operating_point_counts_what_is_above_the_thresholds():
    truth = coco({1: [(1, HERE), (2, FAR)], 2: [(2, HERE)], 3: []})
    detections = [
        found(1, 1, HERE, 0.9),
        found(1, 2, FAR, 0.4),
        found(1, 2, NEAR, 0.6),
        found(2, 2, FAR, 0.7),
        found(2, 1, HERE, 0.35),
        found(3, 1, HERE, 0.5),
        found(3, 3, HERE, 0.2),
    ]
    evaluation = evaluated(truth, detections)
    names = ["c1", "c2", "c3"]
    own = Vocabulary.from_arrays(names, np.eye(3), threshold=[0.6, np.nan, 0.1])
    general, calibrated = analyse(evaluation, vocabulary=own, score_threshold=0.3).operating_points
    assert (general.right, general.wrong, general.objects) == (2, 4, 3)
    assert (general.precision, general.recall) == (2 / 6, 2 / 3)
    assert (general.false_positives_per_image, general.false_positives_per_empty_image) == (
        4 / 3,
        1,
    )
    # In image 3 the third class is not the label of its box, whose best one is not above its own threshold.
    assert (calibrated.right, calibrated.wrong, calibrated.empty_images) == (2, 2, 1)
    # Image 2 has no object of the first class: it is empty where that is all that is asked for.
    first = operating_point(
        evaluation.scored["bbox"], np.full(7, 0.3), "", classes=np.array([True, False, False])
    )
    assert (first.right, first.wrong, first.objects, first.empty_images) == (1, 2, 1, 2)
    assert first.false_positives_per_empty_image == 1
    assert len(analyse(evaluation).operating_points) == 1


def test_an_operating_point_counts_one_label_a_box_as_predict_reports_them():
    """The other labels of a box, and worse boxes on it, count nowhere; average precision sees them."""
    truth = coco({1: [(1, HERE), (2, FAR)]})
    detections = [
        found(1, 1, HERE, 0.9),
        found(1, 2, HERE, 0.8),
        found(1, 3, SHIFTED, 0.7),
        found(1, 3, FAR, 0.6),
        found(1, 2, FAR, 0.5),
        found(1, 2, NEAR, 0.4),
    ]
    (point,) = analyse(evaluated(truth, detections)).operating_points
    assert (point.right, point.wrong, point.recall) == (1, 2, 0.5)
    # With another overlap that NMS allows, the box beside the first object goes too.
    (point,) = analyse(evaluated(truth, detections), nms_iou=0.2).operating_points
    assert (point.right, point.wrong) == (1, 1)
    # A better box that lost itself takes no other with it.
    chain = [found(1, 1, [10 + 15 * k, 10, 40, 40], 0.9 - k / 10) for k in range(3)]
    (point,) = analyse(evaluated(truth, chain), nms_iou=0.4).operating_points
    assert (point.right, point.wrong) == (1, 1)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), iou=st.floats(0.05, 0.95), least=st.floats(0, 1))
def test_one_label_a_box_is_what_a_plain_loop_leaves(make_set, seed, iou, least):
    drawn, detections = make_set(seed, images=4, per_image=40)
    truth = GroundTruth.load(drawn)
    results = read_results(detections, truth)
    left: list[int] = []
    for index in np.argsort(-results.score_D, kind="stable").tolist():
        box, image = results.box_D4[index].tolist(), results.image_D[index]
        of_image = [at for at in left if results.image_D[at] == image]
        if results.score_D[index] > least and not any(
            overlap(box, results.box_D4[at].tolist()) > iou for at in of_image
        ):
            left.append(index)
    ours = np.flatnonzero(one_label_a_box(results, least, iou))
    # Boxes without extent overlap nothing, not even themselves: of equal ones all are left there, one here.
    has_extent_D = results.box_D4[:, 2:].prod(axis=1) > 0
    assert set(ours[has_extent_D[ours]].tolist()) == {at for at in left if has_extent_D[at]}


@pytest.mark.parametrize("count", [4_000, 30_000])
def test_one_label_a_box_of_tens_of_thousands_in_one_image_fits_in_memory(count):
    random = np.random.default_rng(0)
    boxes = np.concatenate(
        [random.integers(0, 1200, (count, 2)), random.integers(80, 300, (count, 2))], 1
    )
    scores = random.permutation(count) / count
    content = coco({1: [(1, HERE)]})
    content["images"][0].update(height=1500, width=1500)
    truth = GroundTruth.load(content)
    results = read_results(
        [found(1, 1, b, s) for b, s in zip(boxes.tolist(), scores.tolist(), strict=True)], truth
    )
    tracemalloc.start()
    ours = np.flatnonzero(one_label_a_box(results, 0.0, 0.5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250e6
    if count > 10_000:  # a plain loop takes seconds
        return
    left = []
    low_D2, high_D2 = results.box_D4[:, :2], results.box_D4[:, :2] + results.box_D4[:, 2:]
    area_D = results.box_D4[:, 2:].prod(axis=1)
    waiting = np.array([at for at in np.argsort(-results.score_D) if results.score_D[at] > 0])
    while len(waiting):
        best = waiting[0]
        left.append(best)
        sides = np.minimum(high_D2[best], high_D2[waiting]) - np.maximum(
            low_D2[best], low_D2[waiting]
        )
        shared = sides.clip(0).prod(axis=1)
        waiting = waiting[shared / (area_D[best] + area_D[waiting] - shared) <= 0.5]
    assert len(left) > 256
    assert ours.tolist() == sorted(left)
