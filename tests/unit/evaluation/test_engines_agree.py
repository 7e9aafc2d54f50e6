"""The fast engine gives what the official evaluators give."""

from __future__ import annotations

import itertools
import json
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from proxydet.errors import RuntimeEnvironmentError
from proxydet.evaluation import evaluate as evaluate_module
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import run_evaluation
from proxydet.evaluation.report import Report
from proxydet.runtime.lvis_api import LVIS, LVISEval, LVISResults

TOLERANCE = 1e-9
FAST = EvaluationConfig(bootstrap=0)


def largest_difference(first: Report, second: Report) -> float:
    largest = 0.0
    assert first.types.keys() == second.types.keys()
    for kind, part in first.types.items():
        other = second.types[kind]
        assert part.metrics.keys() == other.metrics.keys()
        for name, value in part.metrics.items():
            assert (value is None) == (other.metrics[name] is None), (kind, name)
            if value is not None:
                largest = max(largest, abs(value - other.metrics[name]))
        curves, expected = part.curves, other.curves
        largest = max(largest, np.abs(curves.precision_TRCA - expected.precision_TRCA).max())
        largest = max(largest, np.abs(curves.recall_TCAM - expected.recall_TCAM).max())
    return largest


def both(truth: dict[str, Any], detections: list[dict[str, Any]], **options: Any) -> list[Report]:
    return [
        run_evaluation(
            detections, truth, config=EvaluationConfig(engine=engine, bootstrap=0, **options)
        ).report
        for engine in ("hotcoco", "lvis")
    ]


@pytest.mark.shared
@pytest.mark.parametrize("engine", ["hotcoco", pytest.param("lvis", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["dt_synth.json", "dt_synth_ties.json", "dt_synth_420_per_image.json.gz"]
)
def test_official_numbers_on_real_annotations(sample, name, engine):
    expected = json.loads((sample / "expected.json").read_text())[name.split(".")[0]]
    report = run_evaluation(
        sample / name,
        sample / "lvis_val_100.json",
        config=EvaluationConfig(engine=engine, bootstrap=0),
    ).report
    for kind in ("bbox", "segm"):
        part = report.types[kind]
        assert part.metrics == pytest.approx(expected[kind], abs=TOLERANCE)
        by_id = {str(score.id): score.ap for score in part.categories if score.ap is not None}
        assert by_id == pytest.approx(expected[f"{kind}_per_category_AP"], abs=TOLERANCE)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 8),
    categories=st.integers(1, 9),
    per_image=st.integers(1, 40),
    max_detections=st.sampled_from([3, 10, 300]),
)
def test_equal_on_generated_federated_sets(
    make_set, seed, images, categories, per_image, max_detections
):
    truth, detections = make_set(seed, images=images, categories=categories, per_image=per_image)
    assume(truth["annotations"])  # else there is nothing to score, which is refused
    fast, official = both(
        truth, detections, max_detections=max_detections, iou_types=("bbox", "segm")
    )
    assert largest_difference(fast, official) < TOLERANCE


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), crowds=st.booleans(), per_image=st.integers(1, 150))
def test_equal_on_generated_coco_sets(make_set, seed, crowds, per_image):
    truth, detections = make_set(
        seed, images=4, categories=3, per_image=per_image, federated=False, crowds=crowds
    )
    assume(not all(row["iscrowd"] for row in truth["annotations"]))
    fast, official = both(truth, detections, iou_types=("bbox", "segm"))
    assert fast.protocol == "coco"
    assert largest_difference(fast, official) < TOLERANCE


@pytest.mark.parametrize("federated", [True, False])
def test_objects_without_a_mask_neither_help_nor_harm(make_set, federated):
    truth, detections = make_set(4, images=8, categories=3, per_image=40, federated=federated)
    for row in truth["annotations"][::3]:
        del row["segmentation"]
    fast, official = both(truth, detections)
    assert set(fast.types) == {"bbox", "segm"}
    assert fast.counts.annotations_without_mask == len(truth["annotations"][::3])
    assert largest_difference(fast, official) < TOLERANCE


def test_more_than_300_detections_an_image_with_ties(make_set):
    truth, detections = make_set(5, images=2, categories=4, per_image=700, steps=3)
    fast, official = both(truth, detections)
    assert fast.counts.capped > 0
    assert largest_difference(fast, official) < TOLERANCE


def test_the_limit_counts_detections_of_unjudged_categories(make_set):
    """An image's 300 best are chosen before those of unjudged categories are dropped."""
    truth, detections = make_set(1, images=3, categories=6, per_image=30)
    judged = run_evaluation(
        detections, truth, config=EvaluationConfig(max_detections=5, bootstrap=0)
    ).report
    assert judged.counts.unjudged > 0
    fast, official = both(truth, detections, max_detections=5)
    assert largest_difference(fast, official) < TOLERANCE


@pytest.mark.parametrize("engine", ["hotcoco", "lvis"])
@pytest.mark.parametrize("federated", [True, False])
def test_sizes_of_detections_without_a_box_are_those_of_their_masks(make_set, federated, engine):
    """As the official evaluators take them when they are given such rows; AP of small and medium boxes shows it."""
    truth, detections = make_set(8, images=8, categories=3, per_image=40, federated=federated)
    for row in truth["annotations"]:  # around the limit of small ones
        row["area"] = 1000.0 + row["id"] % 2 * 50
    bare = [{key: row[key] for key in row if key != "bbox"} for row in detections]
    report = run_evaluation(
        bare, truth, config=EvaluationConfig(engine=engine, bootstrap=0, iou_types=("bbox",))
    ).report
    ids = itertools.count(1)
    truth["annotations"] = [{"iscrowd": 0, **row, "id": next(ids)} for row in truth["annotations"]]
    if federated:
        annotations = LVIS.__new__(LVIS)
        annotations.logger = logging.getLogger("lvis")
        annotations.dataset = truth
        annotations._create_index()
        evaluator = LVISEval(annotations, LVISResults(annotations, bare), "bbox")
        evaluator.run()
        expected = evaluator.get_results()
    else:
        annotations = COCO()
        annotations.dataset = truth
        annotations.createIndex()
        evaluator = COCOeval(annotations, annotations.loadRes(bare), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        expected = dict(zip(("AP", "AP50", "AP75", "APs", "APm"), evaluator.stats, strict=False))
    for name in ("AP", "AP50", "APs", "APm"):
        assert report.types["bbox"].metrics[name] == pytest.approx(expected[name], abs=TOLERANCE)


def test_fixed_ap_limits_a_category_and_not_an_image(make_set):
    truth, detections = make_set(3, images=4, categories=3, per_image=400)
    fast, official = both(truth, detections, fixed=True, fixed_detections=40)
    assert largest_difference(fast, official) < TOLERANCE
    assert all(name.startswith("fixed-") for name in fast.to_dict()["results"]["segm"]["metrics"])
    assert max(score.detections for score in fast.per_class()) <= 40
    usual, _ = both(truth, detections)
    assert usual.ap != fast.ap


def test_fixed_ap_takes_the_best_of_each_category(make_set):
    """Chosen here by sorting, over the whole data set and before unjudged detections are dropped."""
    truth, detections = make_set(3, images=4, categories=3, per_image=400)
    best = []
    for category in {row["category_id"] for row in detections}:
        own = [row for row in detections if row["category_id"] == category]
        best += sorted(own, key=lambda row: -row["score"])[:40]
    options = {"fixed": True, "bootstrap": 0}
    limited = EvaluationConfig(fixed_detections=40, **options)
    report = run_evaluation(detections, truth, config=limited).report
    expected = run_evaluation(best, truth, config=EvaluationConfig(engine="lvis", **options)).report
    assert report.counts.capped == len(detections) - len(best) > 0
    assert report.counts.unjudged == expected.counts.unjudged > 0
    for kind in ("bbox", "segm"):
        wanted = expected.types[kind].metrics
        assert report.types[kind].metrics == pytest.approx(wanted, abs=TOLERANCE)


def test_detections_of_unjudged_categories_only(make_set):
    truth, detections = make_set(2, images=3, categories=4)
    present = {(row["image_id"], row["category_id"]) for row in truth["annotations"]}
    for image in truth["images"]:
        image["neg_category_ids"] = []
    unjudged = [row for row in detections if (row["image_id"], row["category_id"]) not in present]
    assert unjudged
    fast, official = both(truth, unjudged)
    assert fast.ap == 0
    assert largest_difference(fast, official) < TOLERANCE


@pytest.mark.parametrize("federated", [True, False])
def test_no_detection_at_all_is_zero_where_there_is_something_to_find(make_set, federated):
    truth, _ = make_set(4, federated=federated)
    report = run_evaluation([], truth, config=FAST).report
    assert report.ap == 0
    assert report.counts.detections == 0
    absent = {row["id"] for row in truth["categories"]} - {
        row["category_id"] for row in truth["annotations"] if row["area"] > 0 or not federated
    }
    assert {score.id for score in report.per_class() if score.ap is None} == absent


def test_a_category_without_annotations_counts_nowhere(make_set):
    truth, detections = make_set(6, categories=4)
    truth["annotations"] = [row for row in truth["annotations"] if row["category_id"] != 2]
    fast, official = both(truth, detections)
    assert next(score for score in fast.per_class() if score.id == 2).ap is None
    assert largest_difference(fast, official) < TOLERANCE


@pytest.mark.parametrize("federated", [True, False])
def test_ignored_annotations_and_crowds(make_set, federated):
    """LVIS's evaluator knows ``ignore`` and not ``iscrowd``; COCO's the other way round."""
    truth, detections = make_set(22, images=8, per_image=20, federated=federated)
    for index, row in enumerate(truth["annotations"]):
        row["ignore"], row["iscrowd"] = int(index % 3 == 0), int(index % 4 == 0)
    fast, official = both(truth, detections)
    assert largest_difference(fast, official) < TOLERANCE


def test_annotation_ids_of_zero_are_no_trap(make_set):
    """The official evaluators take a match with annotation 0 for no match; ids are renumbered from 1 for them."""
    truth, detections = make_set(8)
    expected = run_evaluation(detections, truth, config=FAST).report
    for row in truth["annotations"]:
        row["id"] -= 1
    assert largest_difference(run_evaluation(detections, truth, config=FAST).report, expected) == 0


def test_order_of_images_does_not_matter(make_set):
    truth, detections = make_set(9, images=8, per_image=30)
    expected = run_evaluation(detections, truth, config=FAST).report
    by_image = sorted(detections, key=lambda row: row["image_id"])
    truth["images"].reverse()
    assert largest_difference(run_evaluation(by_image, truth, config=FAST).report, expected) == 0


def test_text_ids_are_fine(make_set):
    truth, detections = make_set(10)
    expected = run_evaluation(detections, truth, config=FAST).report
    for row in [*truth["images"]]:
        row["id"] = f"image {row['id']:05}"
    for row in [*truth["annotations"], *detections]:
        row["image_id"] = f"image {row['image_id']:05}"
    assert largest_difference(run_evaluation(detections, truth, config=FAST).report, expected) == 0


def panic() -> BaseException:
    """What pyo3 raises when Rust code panics; it has its own class in every extension, and exports none."""
    made = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    failure: BaseException = made("index out of bounds")
    return failure


@pytest.mark.parametrize("failure", [ValueError("odd"), panic()])
def test_a_failure_of_the_fast_engine_advises_the_official_one(make_set, monkeypatch, failure):
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("hotcoco.COCOeval", fail)
    truth, detections = make_set(0)
    with pytest.raises(RuntimeEnvironmentError, match="fast evaluation engine failed") as caught:
        run_evaluation(detections, truth, config=FAST)
    assert "--engine lvis" in (caught.value.hint or "")


@pytest.mark.parametrize(("engine", "advice"), [("hotcoco", "--engine lvis"), ("lvis", "report")])
@pytest.mark.parametrize("wrong", [0.5, -1.0])
def test_an_engine_that_is_wrong_is_told(make_set, monkeypatch, engine, advice, wrong):
    """Intervals rest on matches of our own; where these give other numbers, something is wrong and nothing is shown."""
    truth, detections = make_set(5)
    name = "run_hotcoco" if engine == "hotcoco" else "run_official"
    run = getattr(evaluate_module, name)

    def slightly_off(*args: Any, **options: Any) -> Any:
        curves = run(*args, **options)
        present = np.flatnonzero(curves.precision_TRCA[0, 0, :, 0] >= 0)
        curves.precision_TRCA[0, :, present[0], 0] = wrong
        return curves

    monkeypatch.setattr(evaluate_module, name, slightly_off)
    with pytest.raises(RuntimeEnvironmentError, match=r"in 1 categories \(thing \d\)") as caught:
        run_evaluation(detections, truth, config=EvaluationConfig(bootstrap=2, engine=engine))
    assert advice in (caught.value.hint or "")


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), MemoryError(), BaseException("?")]
)
def test_what_is_no_failure_of_the_engine_passes_through(make_set, monkeypatch, stop):
    def fail(*_: Any, **__: Any) -> None:
        raise stop

    monkeypatch.setattr("hotcoco.COCOeval", fail)
    truth, detections = make_set(0)
    with pytest.raises(type(stop)) as caught:
        run_evaluation(detections, truth, config=FAST)
    assert caught.value is stop


def test_groups_of_categories(make_set):
    truth, detections = make_set(11, categories=6)
    novel = np.array([True, False] * 3)
    report = run_evaluation(
        detections, truth, groups={"novel": novel, "base": ~novel}, config=FAST
    ).report
    part = report.types["segm"]
    names = [score.name for score in part.groups]
    assert names == ["rare", "common", "frequent", "novel", "base"]
    scored = [score for score, chosen in zip(part.categories, novel, strict=True) if chosen]
    values = [score.ap50 for score in scored if score.ap50 is not None]
    assert part.group("novel").ap50 == pytest.approx(np.mean(values))
    assert part.group("rare").ap == part.metrics["APr"]
