"""``proxydet index`` and ``proxydet search`` from the command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from shape_detector import random_network

from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import evaluate_index, evaluate_split
from proxydet.evaluation.split import DescribedSplit
from proxydet.index.search import RegionIndex
from proxydet.index.store import IndexWriter
from proxydet.reporting import SilentProgress
from proxydet.vocabulary.encoder import open_encoder
from proxydet_cli import progress


@pytest.fixture
def run(detector, monkeypatch, cli, tmp_path):
    monkeypatch.setattr("proxydet.models.locate_published", Path)
    monkeypatch.setattr("proxydet.detector.open_named", lambda *_, **__: detector)
    monkeypatch.setattr(progress, "show_progress", SilentProgress)
    monkeypatch.chdir(tmp_path)
    return cli


def test_from_photos_to_a_page(run, photos, detector, tmp_path, monkeypatch):
    own = shutil.copytree(photos, tmp_path / "photos")
    (own / "broken.jpg").write_bytes(b"no image")
    ended = run("index", "photos", "-o", "photos.index", "--json")
    assert (ended.code, ended.data["added"], ended.data["images"]) == (3, 4, 4)
    assert "1 of 5 images could not be read" in ended.err
    (own / "broken.jpg").unlink()
    again = run("index", "add", "photos", "-o", "photos.index")
    assert (again.code, again.out) == (0, "photos.index: 4 images; 0 embedded, 4 unchanged\n")
    with monkeypatch.context() as finished:  # the same command again opens no detector
        finished.setattr("proxydet.detector.open_named", lambda *_, **__: pytest.fail("opened"))
        assert run("index", "photos", "-o", "photos.index").out == again.out

    words = ("search", "photos.index", "-v", "red square, blue star", "--score-threshold", "0.2")
    (own / "p3.png").unlink()
    found = run(*words, "--json", "-o", "found.html")
    assert found.code == 0
    first = found.data["images"][0]["file"]
    for image in found.data["images"]:
        if (path := Path(image.pop("file"))).exists():
            wanted = detector.predict(path, ["red square", "blue star"], score_threshold=0.2)
            scores = [item["score"] for item in image["detections"]]
            assert scores == pytest.approx(wanted.scores.tolist(), abs=1e-4)
    page = (tmp_path / "found.html").read_text()
    assert page.count('<img src="data:image/jpeg') == len(found.data["images"]) > 1
    assert "red square" in page
    run(*words, "-o", "found.csv")
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [
        item["label"] for image in found.data["images"] for item in image["detections"]
    ]
    listed = run(*words, "--limit", "1")
    assert len(listed.out.splitlines()) == 1
    assert listed.out.startswith(str(own))
    assert run(*words, "-o", "found.docx").code == 3

    best = found.data["images"][0]["detections"][0]["box_xyxy"]
    box = ",".join(map(str, (best[0], best[1], best[2] - best[0], best[3] - best[1])))
    like = ("search", "photos.index", "--like", first, "--box", box, "--score-threshold", "0.1")
    more = run(*like, "--json", "-o", "like.csv").data
    assert (more["like"]["file"], more["like"]["iou"] > 0.95) == (first, True)
    assert more["images"]
    assert Path("like.csv").read_text().count("\n") > 1
    assert run(*like, "-v", "red square").code == 2
    assert run("search", "photos.index", "--like", "absent.png", "--box", box).code == 3

    info = run("index", "info", "photos.index", "--json").data
    assert (info["images"], info["mode"]) == (4, "exact")
    assert run("index", "verify", "photos.index").out == "sound\n"
    moved = run("index", "verify", "photos.index", "--images", "--json")
    assert (moved.code, len(moved.data["wrong"])) == (3, 1)
    assert run("index", "remove", "photos.index", "--missing", "--json").data["removed"] == 1
    assert run("index", "remove", "photos.index", "photos/p0.png", "--json").data["images"] == 2
    assert run("index", "remove", "photos.index", "elsewhere").code == 3
    with IndexWriter(Path("photos.index")) as writer:
        part, row = next(writer.index.rows())
        writer.copy([(part, row, "s3://bucket/2019/cup.png", (1, 1))])
    far = run("index", "remove", "photos.index", "s3://bucket/2019/", "--json").data
    assert (far["removed"], far["images"]) == (1, 2)

    assert run("index", "photos", "-o", "small.index", "--compact").code == 0
    assert run("index", "merge", "photos.index", "small.index", "-o", "all.index").code == 3
    monkeypatch.setattr("proxydet.index.build.LARGEST_PART", 1)
    shards = [
        run("index", "photos", "-o", "shared.index", "--shard", shard, "--json").data
        for shard in ("0/2", "1/2")
    ]
    assert sorted(half["added"] for half in shards) == [1, 2]
    assert [half["images"] for half in shards] == [0, 3]
    merged = run("index", "merge", "photos.index", "-o", "all.index", "--json")
    assert (merged.data["added"], merged.data["images"]) == (2, 2)


def test_what_makes_no_sense_is_refused(run):
    for words in (
        ("index", "add", "photos"),
        ("index", "photos", "-o", "x.index", "--regions", "9"),
        ("index", "remove", "x.index"),
        ("serve", "--index", "x.index", "--run", "runs/x"),
        ("serve", "--index", "x.index", "--tiles", "800", "--device", "cuda:7"),
        ("serve", "--index", "x.index", "--max-upload", "1"),
        ("search", "x.index", "--eval", "pets", "-o", "found.html"),
        ("search", "x.index", "--eval", "pets", "--limit", "100", "--all-labels"),
        ("search", "x.index", "--split", "val"),
        ("search", "x.index", "--like", "a.jpg"),
        ("search", "x.index", "--like", "a.jpg", "--box", "1,2,3,4", "--base-above", "0.5"),
        ("search", "x.index", "--like", "a.jpg", "--box", "1,2,3"),
        ("index", "inf", "x.index"),
    ):
        assert run(*words).code == 2, words
    Path("empty.txt").write_text("\n")
    empty = run("index", "@empty.txt", "-o", "x.index")
    assert (empty.code, "bug" in empty.err, Path("x.index").exists()) == (3, False, False)
    absent = run("search", "absent.index", "-v", "cup")
    assert (absent.code, "proxydet index" in absent.err) == (3, True)


def test_average_precision_of_an_index_is_that_of_the_detector(run, tmp_path):
    config = SyntheticConfig(images_train=2, images_val=4, image_label_images_per_class=1)
    data = make_dataset(tmp_path / "drawn", config)
    split = DescribedSplit.open(data)
    own = split.data.vocabulary
    encoder = open_encoder(data.parent / "text_encoder.json")
    eyes = Detector(random_network(own), shortest=96, longest=160, encoder=encoder)
    from region_indexes import made

    index = made(tmp_path / "val.index", eyes, split.roots[0])
    scoring = EvaluationConfig(bootstrap=0, iou_types=("bbox",))
    wanted = evaluate_split(eyes.with_settings(masks=False), split, config=scoring)
    got = evaluate_index(RegionIndex(index), split, config=scoring)
    assert wanted is not None
    assert got.report.counts.detections == wanted.report.counts.detections > 100
    metrics = [report.main.metrics for report in (got.report, wanted.report)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3, nan_ok=True)
    shown = run("search", index, "--eval", data, "--json")
    assert json.loads(shown.out)["counts"]["detections"] == wanted.report.counts.detections
    # Class names, not the path of a file.
    words = ("--eval", data, "-v", ", ".join(own.names), "--json")
    assert run("search", index, *words).data["counts"] == shown.data["counts"]
    hidden = run("search", index, *words, "--background", "striped").data
    assert hidden["counts"]["detections"] < shown.data["counts"]["detections"]
    few = run("search", index, "--eval", data, "-v", own.names[0])
    assert (few.code, "not in the vocabulary" in few.err) == (3, True)
    shutil.rmtree(split.roots[0])
    assert evaluate_index(RegionIndex(index), split, config=scoring).report.counts.images == 4
