"""Many images at once: order, failures, and the files that are saved."""

from __future__ import annotations

import csv
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from proxydet.detector import Detector
from proxydet.errors import ConfigError, DiskFullError, JobInterruptedError
from proxydet.inference.jobs import ImageResult, PredictionSummary, predict_files
from proxydet.inference.pipeline import Writer
from proxydet.inference.sources import find_images
from proxydet.inference.writers import KINDS, make_writers, safe_name
from proxydet.vocabulary.vocabulary import Vocabulary


def run(
    detector: Detector,
    sources: list[Path],
    output: Path | None = None,
    *,
    batch_size: int = 2,
    kinds: tuple[str, ...] = KINDS,
) -> tuple[PredictionSummary, list[ImageResult]]:
    results: list[ImageResult] = []
    names = detector.vocabulary.names
    summary = predict_files(
        detector,
        find_images(sources),
        vocabulary=detector.vocabulary,
        settings=detector.settings(score_threshold=0.02, max_detections=5),
        batch_size=batch_size,
        writers=make_writers(kinds, output, names) if output else (),
        on_result=results.append,
    )
    return summary, results


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_results_come_in_order_and_equal_single_predictions(detector, folder, batch_size):
    summary, results = run(detector, [folder], batch_size=batch_size)
    assert [r.image.path.name for r in results] == [
        "a0.png",
        "a1.png",
        "a2.png",
        "b3.png",
        "b4.png",
    ]
    assert summary.images == 5
    assert summary.detections == sum(len(r.found) for r in results) > 0
    for result in results:
        alone = detector.predict(
            result.image.path, score_threshold=0.02, max_detections=5, one_label=False
        )
        assert alone.labels == result.found.labels
        np.testing.assert_allclose(alone.scores, result.found.scores, atol=1e-5)


def test_a_batch_of_only_unreadable_images_is_passed_over(detector, tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"")
    summary, results = run(detector, [tmp_path])
    assert (summary.images, len(summary.unreadable), results) == (0, 3, [])


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # inside pycocotools
def test_every_kind_is_saved_and_says_the_same(detector, folder, tmp_path):
    output = tmp_path / "out"
    summary, results = run(detector, [folder], output)
    assert all(path.exists() for path in summary.saved)
    for result in results:
        name = result.image.path.relative_to(folder).with_suffix("")
        with Image.open((output / name).with_suffix(".png")) as drawn:
            assert drawn.width >= result.found.image_size[1]
        content = json.loads((output / name).with_suffix(".json").read_text())
        assert content == json.loads(json.dumps(result.to_dict()))
    coco = COCO(str(output / "coco.json"))
    assert len(coco.imgs) == 5
    rows = [row for r in results for row in r.found.to_coco(0)]
    assert [a["score"] for a in coco.dataset["annotations"]] == [row["score"] for row in rows]
    mask = coco.annToMask(coco.dataset["annotations"][0])
    assert mask.shape == results[0].found.image_size
    assert mask.sum() == coco.dataset["annotations"][0]["area"]
    with (output / "detections.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    labels = [label for r in results for label in r.found.labels]
    assert [row["label"] for row in table] == labels
    crops = list((output / "crops").rglob("*.jpg"))
    assert len(crops) == len(labels)
    assert {crop.parent.name for crop in crops} == {label.replace(" ", "_") for label in labels}
    assert not list(output.rglob(".*"))


def test_crops_of_images_whose_names_join_alike_are_kept_apart(detector, folder, tmp_path):
    place = tmp_path / "alike"
    (place / "a").mkdir(parents=True)
    data = (folder / "a0.png").read_bytes()
    (place / "a" / "b.png").write_bytes(data)
    (place / "a_b.png").write_bytes(data)
    summary, _ = run(detector, [place], tmp_path / "out", kinds=("crops",))
    assert len(list((tmp_path / "out" / "crops").rglob("*.jpg"))) == summary.detections > 1


def test_nothing_found_still_saves_an_image(detector, folder, tmp_path):
    summary = predict_files(
        detector,
        find_images([folder / "a0.png"]),
        vocabulary=detector.vocabulary,
        settings=detector.settings(score_threshold=1.0, max_detections=5),
        writers=make_writers(KINDS, tmp_path / "out", detector.vocabulary.names),
    )
    assert summary.detections == 0
    assert (tmp_path / "out" / "a0.png").exists()
    assert json.loads((tmp_path / "out" / "coco.json").read_text())["annotations"] == []


def test_a_drawn_image_never_replaces_the_one_that_was_read(detector, folder):
    before = (folder / "a0.png").read_bytes()
    with pytest.raises(ConfigError, match="replace"):
        run(detector, [folder / "a0.png"], folder, kinds=("images",))
    assert (folder / "a0.png").read_bytes() == before


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("../../etc", "etc"),
        ("knife/fork", "knife_fork"),
        ("..", "class"),
        ("犬", "犬"),
        ("a" * 300, "a" * 80),
    ],
)
def test_class_names_make_safe_folder_names(label, name):
    assert safe_name(label) == name


def test_the_network_waits_where_saving_is_far_behind(detector, folder):
    seen, at_first_save, more = [], [], threading.Event()
    # Two batches of one image, one image for each of two preparing threads, and one in hand.
    bound = 5

    class Slow(Writer):
        def add(self, *_: object) -> None:
            if not at_first_save:
                more.wait(0.5)
                at_first_save.append(len(seen))

        def finish(self) -> list[Path]:
            return []

    def count(result: ImageResult) -> None:
        seen.append(result.image.path)
        if len(seen) > bound:
            more.set()

    summary = predict_files(
        detector,
        find_images([folder]),
        vocabulary=detector.vocabulary,
        settings=detector.settings(score_threshold=0.02, max_detections=5),
        batch_size=1,
        writers=[Slow()],
        on_result=count,
    )
    assert summary.images == 5
    assert at_first_save[0] <= bound


def test_ctrl_c_keeps_what_was_done_and_reports_it(detector, folder, tmp_path):
    def stop(result: ImageResult) -> None:
        if result.image.path.name == "b3.png":
            raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(JobInterruptedError, match=r"3 of 6 images.*out") as caught:
        predict_files(
            detector,
            find_images([folder]),
            vocabulary=detector.vocabulary,
            settings=detector.settings(score_threshold=0.02, max_detections=5),
            batch_size=1,
            writers=make_writers(["images", "coco"], output, detector.vocabulary.names),
            on_result=stop,
        )
    assert caught.value.exit_code == 130
    assert {path.name for path in output.iterdir()} == {"a0.png", "a1.png", "a2.png", "coco.json"}
    assert len(json.loads((output / "coco.json").read_text())["images"]) == 3


def test_names_from_outside_are_harmless_in_files(detector, folder, tmp_path):
    hostile = folder / os.fsdecode(b"=1+1\n\x1b[31m\xff.png")
    hostile.write_bytes((folder / "a0.png").read_bytes())
    names = ["=HYPERLINK(1)", "@SUM(1)", "\x1b]0;title\x07", "-1"]
    vocabulary = Vocabulary.from_arrays(names, detector.vocabulary.embeddings)
    output = tmp_path / "out"
    predict_files(
        detector,
        find_images([hostile]),
        vocabulary=vocabulary,
        settings=detector.settings(score_threshold=0.0, max_detections=50),
        writers=make_writers(KINDS, output, names),
    )
    table = (output / "detections.csv").read_bytes().decode()
    rows = list(csv.reader(table.splitlines()))
    assert {row[1] for row in rows[1:]} == {
        "'=HYPERLINK(1)",
        "'@SUM(1)",
        "\\x1b]0;title\\x07",
        "'-1",
    }
    assert "\x1b" not in table
    content = json.loads((output / "coco.json").read_bytes().decode())
    assert content["images"][0]["file_name"] == str(hostile)
    assert [entry["name"] for entry in content["categories"]] == names


def test_an_error_in_saving_is_raised_and_leaves_no_half_table(detector, folder, tmp_path):
    class Full(Writer):
        def add(self, *_: object) -> None:
            raise DiskFullError("no room left")

        def finish(self) -> list[Path]:
            return []

    output = tmp_path / "out"
    table = make_writers(["csv"], output, detector.vocabulary.names)
    with pytest.raises(DiskFullError):
        predict_files(
            detector,
            find_images([folder]),
            vocabulary=detector.vocabulary,
            settings=detector.settings(score_threshold=0.02, max_detections=5),
            writers=[*table, Full()],
        )
    assert not list(output.glob("*"))
