"""``proxydet eval`` as it is typed, and the files that it writes."""

from __future__ import annotations

import csv
import gzip
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from proxydet.artifacts import Catalogue
from proxydet.data.dataset import PUBLISHED_SPLITS, published_split
from proxydet.data.store import AnnotationStore
from proxydet.errors import ConfigError, DataError, InputError
from proxydet.evaluation.analysis import analyse
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.evaluate import run_evaluation
from proxydet.evaluation.page import (
    Example,
    draw_error,
    scatter_svg,
    worst_errors,
    write_files,
)
from proxydet.evaluation.report import category_csv
from proxydet.files import sha256
from proxydet.manifest import read_run_records
from proxydet.runtime.run_comparison import compare_runs
from proxydet.visualization.drawing import COLOURS
from proxydet_cli.app import run
from proxydet_cli.main import main

pytestmark = pytest.mark.usefixtures("unplotted")

Typed = Callable[..., tuple[str, str]]


@pytest.fixture
def typed(capsys, tmp_path, monkeypatch) -> Typed:
    """Type ``proxydet eval`` in an empty folder; gives stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))

    def run_words(*words: str | Path) -> tuple[str, str]:
        with pytest.raises(SystemExit) as done:
            run(["eval", *map(str, words)])
        assert done.value.code == 0
        return tuple(capsys.readouterr())

    return run_words


@pytest.fixture
def files(tmp_path, make_set) -> Path:
    """A folder with annotations, images, a description, and the results of two detectors."""
    truth, detections = make_set(12, images=12, categories=6, per_image=30)
    (tmp_path / "images").mkdir()
    for row in truth["images"]:
        row["file_name"] = f"{row['id']}.png"
        pixels = np.full((row["height"], row["width"], 3), 90, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / row["file_name"])
    (tmp_path / "val.json").write_text(json.dumps(truth))
    (tmp_path / "a.json").write_text(json.dumps(detections))
    better = [{**row, "score": 1 - (1 - row["score"]) / 2} for row in detections[::2]]
    (tmp_path / "b.json").write_text(json.dumps(better))
    np.save(tmp_path / "text.npy", np.eye(6))
    (tmp_path / "set.toml").write_text(
        'name = "drawn"\n[vocabulary]\nembeddings = "text.npy"\nnovel = ["thing 0"]\n'
        '[val]\nannotations = "val.json"\nimages = "images"\n'
    )
    return tmp_path


def test_results_on_an_annotation_file(typed, files):
    out, messages = typed("--results", files / "a.json", "--data", files / "val.json")
    report = run_evaluation(files / "a.json", files / "val.json").report
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert float(lines["AP"][0]) == pytest.approx(
        100 * report.types["bbox"].metrics["AP"], abs=0.006
    )
    assert float(lines["AP"][2]) == pytest.approx(100 * report.ap, abs=0.006)
    assert "95 % confidence, from 200 resamples" in messages
    folder = files / "evaluation" / "a-val"
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        "per_category.csv",
        "report.html",
        "manifest.json",
        "environment.json",
    }


@pytest.mark.parametrize("name", ["val.JSON", "val.gz", "val", "./lvis"])
def test_any_file_that_is_no_dataset_config_is_annotations(typed, files, name):
    """As for ``data check``."""
    content = (files / "val.json").read_bytes()
    (files / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    words = ["--results", files / "a.json", "--bootstrap", "0", "--iou-type", "bbox"]
    assert f"{Path(name).name}: " in typed(*words, "--data", name)[1]


def test_a_bare_name_is_a_prepared_data_set_whatever_is_called_so_here(typed, files):
    (files / "lvis").mkdir()
    (files / "datasets").mkdir()
    config = (files / "set.toml").read_text().replace('= "', '= "../').replace("../drawn", "drawn")
    (files / "datasets" / "lvis.toml").write_text(config)
    words = ["--results", files / "a.json", "--bootstrap", "0", "--iou-type", "bbox"]
    assert "drawn: " in typed(*words, "--data", "lvis")[1]


def test_detections_of_dropped_images_are_dropped(typed, files):
    content = json.loads((files / "val.json").read_text())
    rows = json.loads((files / "a.json").read_text())
    gone = rows[0]["image_id"]
    next(row for row in content["images"] if row["id"] == gone)["width"] = 0
    (files / "val.json").write_text(json.dumps(content))
    count = sum(row["image_id"] == gone for row in rows)
    words = ["--results", files / "a.json", "--data", files / "val.json", "--bootstrap", "0"]
    _, messages = typed(*words)
    assert f"{count} detections dropped: image_id" in messages
    rows[0]["image_id"] = 12345
    (files / "a.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="1 detection refused: image_id"):
        run_evaluation(files / "a.json", files / "val.json")


def test_what_an_evaluation_was_made_from_is_recorded(typed, files):
    words = ["--data", files / "val.json", "--bootstrap", "2"]
    for name in ("a", "b"):
        typed("--results", files / f"{name}.json", *words, "--output", files / name)
    manifest, report = read_run_records(files / "a")
    assert manifest.kind == "evaluation"
    assert manifest.digests == {
        "results": sha256(files / "a.json"),
        "annotations": AnnotationStore.open(files / "val.json").digest(),
    }
    assert manifest.configuration["scoring"]["max_detections"] == 300
    assert manifest.seeds == {"resamples": 0}
    assert report.fields
    found = {row.key: row.suspicion for row in compare_runs(files / "a", files / "b").differences}
    assert found["digests.results"] == "decides results"
    assert found["configuration.results"] == "harmless"


def test_compare_takes_folders_of_results_that_were_scored(typed, files):
    data = ["--data", files / "val.json", "--bootstrap", "20"]
    for name in ("a", "b"):
        typed("--results", files / f"{name}.json", *data, "--output", files / name)
    named, _ = typed("--compare", files / "a.json", files / "b.json", *data)
    assert typed("--compare", files / "a", files / "b", *data)[0] == named
    (files / "b.json").write_text("[]")
    with pytest.raises(InputError, match="has changed since"):
        run(["eval", "--compare", str(files / "a"), str(files / "b"), *map(str, data)])
    (files / "b.json").unlink()
    with pytest.raises(InputError, match="not there any more"):
        run(["eval", "--compare", str(files / "a"), str(files / "b"), *map(str, data)])


def test_json_is_the_whole_result(typed, files):
    words = ["--results", files / "a.json", "--data", files / "val.json", "--bootstrap", "20"]
    out, _ = typed(*words, "--json", "--output", files / "out")
    shown = json.loads(out)
    assert shown == json.loads((files / "out" / "results.json").read_text())
    report = run_evaluation(
        files / "a.json", files / "val.json", config=EvaluationConfig(bootstrap=20)
    ).report
    assert shown["results"] == json.loads(json.dumps(report.to_dict()["results"]))
    assert set(shown["analysis"]) == {"errors", "calibration", "box_recall", "operating_points"}


def test_fixed_ap_says_so(typed, files):
    out, messages = typed(
        "--results", files / "a.json", "--data", files / "val.json", "--fixed", "--bootstrap", "0"
    )
    assert "fixed-AP " in out
    assert "cannot be compared with AP" in messages
    content = json.loads((files / "evaluation" / "a-val" / "results.json").read_text())
    assert content["fixed"] is True
    for part in content["results"].values():
        assert all(name.startswith(("fixed-AP", "fixed-AR")) for name in part["metrics"])
        assert {"fixed-ap", "fixed-ap50", "fixed-ap75"} < set(part["groups"][0])
        assert "ap" not in part["groups"][0]
    header = (files / "evaluation" / "a-val" / "per_category.csv").read_text().splitlines()[0]
    assert "box_fixed-AP" in header
    assert "box_AP" not in header
    page = (files / "evaluation" / "a-val" / "report.html").read_text()
    assert "not comparable with AP" in page
    assert ">AP50<" not in page


def test_masks_that_only_some_detections_have_are_told(typed, files):
    rows = json.loads((files / "a.json").read_text())
    del rows[3]["segmentation"], rows[5]["segmentation"]
    (files / "a.json").write_text(json.dumps(rows))
    words = ["--results", files / "a.json", "--data", files / "val.json", "--bootstrap", "0"]
    _, messages = typed(*words)
    assert f"masks are not scored: 2 of {len(rows)} detections have none" in messages
    with pytest.raises(DataError, match=f"2 of {len(rows)} detections have none"):
        run(["eval", *map(str, words), "--iou-type", "segm"])


def test_the_protocol_is_printed_and_can_be_chosen(typed, files):
    words = ["--results", files / "a.json", "--data", files / "val.json", "--bootstrap", "0"]
    out, messages = typed(*words)
    assert "protocol: LVIS" in messages
    chosen, messages = typed(*words, "--protocol", "coco")
    assert "protocol: COCO" in messages
    assert "AR@300" in out
    assert "AR@100" in chosen
    content = json.loads((files / "evaluation" / "a-val" / "results.json").read_text())
    assert content["protocol"] == "coco"
    assert "Protocol: COCO" in (files / "evaluation" / "a-val" / "report.html").read_text()
    _, messages = typed(*words[:2], "--data", files / "set.toml", *words[4:], "--protocol", "coco")
    assert "protocol: COCO" in messages


def test_boxes_without_masks_are_scored_with_a_line_that_says_so(typed, files):
    truth = json.loads((files / "val.json").read_text())
    for row in truth["annotations"]:
        del row["segmentation"]
    (files / "boxes.json").write_text(json.dumps(truth))
    words = ["--results", files / "a.json", "--data", files / "boxes.json", "--bootstrap", "0"]
    out, messages = typed(*words)
    assert "masks are not scored: the annotations have none" in messages
    assert "mask" not in out
    for engine in ("hotcoco", "lvis"):
        with pytest.raises(DataError, match="the annotations have none"):
            run(["eval", *map(str, words), "--iou-type", "segm", "--engine", engine])


def test_every_class_stands_in_the_results_at_full_precision(typed, files):
    typed("--results", files / "a.json", "--data", files / "val.json", "--bootstrap", "0")
    folder = files / "evaluation" / "a-val"
    content = json.loads((folder / "results.json").read_text())
    unresampled = EvaluationConfig(bootstrap=0)
    report = run_evaluation(files / "a.json", files / "val.json", config=unresampled).report
    for kind in ("bbox", "segm"):
        shown = [(row["name"], row[kind]["ap"], row[kind]["ap50"]) for row in content["categories"]]
        assert shown == [(row.name, row.ap, row.ap50) for row in report.types[kind].categories]


def test_names_in_the_table_are_no_formulas(files):
    truth = json.loads((files / "val.json").read_text())
    truth["categories"][0]["name"] = "=cmd|' /C calc'!A0"
    report = run_evaluation(files / "a.json", truth, config=EvaluationConfig(bootstrap=0)).report
    assert "\n2,'=cmd|" in category_csv(report)


def test_masks_that_only_one_of_two_has_are_not_compared(typed, files):
    rows = json.loads((files / "a.json").read_text())
    for row in rows:
        del row["segmentation"]
    (files / "boxes.json").write_text(json.dumps(rows))
    pair = [files / "a.json", files / "boxes.json"]
    for first, second in (pair, pair[::-1]):
        words = ["--data", files / "val.json", "--bootstrap", "20"]
        out, messages = typed("--compare", first, second, *words)
        assert "boxes" in out
        assert "not every detection of" in messages
        assert "boxes.json has one" in " ".join(messages.split())


def test_compare_two_files_and_two_folders(typed, files):
    data = ["--data", files / "set.toml", "--bootstrap", "20"]
    out, _ = typed("--compare", files / "a.json", files / "b.json", *data)
    assert "verdict" in out
    assert "B - A" in out
    for name in ("a", "b"):
        folder = files / name / "predictions"
        folder.mkdir(parents=True)
        (folder / "predictions.json").write_bytes((files / f"{name}.json").read_bytes())
    again, _ = typed("--compare", files / "a", files / "b", *data)
    assert again == out
    rows = json.loads(typed("--compare", files / "a", files / "b", *data, "--json")[0])
    overall = next(row for row in rows["segm"] if row["metric"] == "AP")
    assert overall["difference"] == pytest.approx(overall["second"] - overall["first"])
    assert overall["interval"]["low"] < overall["difference"] < overall["interval"]["high"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--results", "a.json"], ConfigError, "requires the data set"),
        (
            ["--results", "a.json", "--run", "x", "--data", "val.json"],
            ConfigError,
            "--results cannot be combined with --run",
        ),
        (["--vocabulary", "text.npy"], ConfigError, "requires --data"),
        (["--compare", "a.json", "b.json"], ConfigError, "requires the data set"),
        (["--results", "a.json", "--data", "absent.toml"], DataError, "no dataset config"),
        (["--results", "a.json", "--data", "absent"], DataError, "no dataset config"),
        (["--results", "absent.json", "--data", "val.json"], DataError, "cannot read"),
        (["--compare", "images", "a.json", "--data", "val.json"], InputError, "no finished"),
        (
            ["--compare", "a.json", "b.json", "--data", "val.json", "--bootstrap", "0"],
            ConfigError,
            "needs resamples",
        ),
        (
            ["--results", "a.json", "--data", "val.json", "--hierarchy", "val.json"],
            ConfigError,
            "does not use a class hierarchy",
        ),
        (["--results", "a.json", "--data", "val.json", "--config", "r50"], ConfigError, "--config"),
    ],
)
def test_what_cannot_be_done_is_told(files, monkeypatch, words, error, message):
    monkeypatch.chdir(files)
    monkeypatch.setenv("PROXYDET_CACHE", str(files / "cache"))
    with pytest.raises(error, match=message):
        run(["eval", *words])


def test_files_hold_every_category_and_pictures(files):
    evaluation = run_evaluation(
        files / "a.json", files / "val.json", config=EvaluationConfig(bootstrap=20)
    )
    asked = []

    def read(image_id: Any) -> np.ndarray:
        asked.append(image_id)
        return np.full((48, 64, 3), 90, dtype=np.uint8)

    written = write_files(
        evaluation,
        analyse(evaluation),
        files / "out",
        read=read,
        commands={"proxydet eval <x>": "Again."},
    )
    with written["per_category.csv"].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [f"thing {index}" for index in range(6)]
    for row, score in zip(rows, evaluation.report.per_class(), strict=True):
        if score.ap is not None:
            assert float(row["mask_AP"]) == pytest.approx(100 * score.ap, abs=1e-6)
        else:
            assert row["mask_AP"] == ""
    page = written["report.html"].read_text()
    for title in ("Scores", "Categories", "Precision over recall", "What costs precision"):
        assert title in page
    assert "Do scores mean what they say?" in page
    assert page.count("data:image/jpeg") == len(asked) > 2
    assert "proxydet eval &lt;x&gt;" in page
    assert asked


def test_openimages_has_files_too(files):
    truth = json.loads((files / "val.json").read_text())
    for row in truth["images"]:
        row["pos_category_ids"] = [category["id"] for category in truth["categories"]]
    for category in truth["categories"]:
        del category["frequency"], category["image_count"]
    evaluation = run_evaluation(files / "a.json", truth, config=EvaluationConfig(bootstrap=20))
    written = write_files(evaluation, analyse(evaluation), files / "out")
    assert "AP50" in written["report.html"].read_text()
    assert json.loads(written["results.json"].read_text())["analysis"]["errors"] is None


def test_results_are_scored_on_images_without_names_from_a_config_too(typed, files):
    content = json.loads((files / "val.json").read_text())
    for row in content["images"]:
        del row["file_name"]
    (files / "val.json").write_text(json.dumps(content))
    words = ("--results", files / "a.json", "--bootstrap", "0", "--json")
    of_config, of_file = (
        json.loads(typed(*words, "-o", f"out-{name}", "--data", files / name)[0])["results"]
        for name in ("set.toml", "val.json")
    )
    for kind, scored in of_file.items():
        assert of_config[kind]["metrics"].items() >= scored["metrics"].items()


def test_the_page_says_why_it_has_no_images_of_errors(files):
    evaluation = run_evaluation(
        files / "a.json", files / "val.json", config=EvaluationConfig(bootstrap=0)
    )
    analysis = analyse(evaluation)
    without = write_files(evaluation, analysis, files / "out")["report.html"].read_text()
    assert "No images: only results and annotations were given." in without

    def read(image_id: Any) -> np.ndarray:
        raise DataError(f"{image_id}.jpg is not there", hint="look for it")

    gone = write_files(evaluation, analysis, files / "out", read=read)["report.html"].read_text()
    assert ".jpg is not there" in gone
    assert "data:image" not in gone


def test_header_and_table_round_alike(files):
    evaluation = run_evaluation(
        files / "a.json", files / "val.json", config=EvaluationConfig(bootstrap=0)
    )
    part = evaluation.report.main
    part.metrics["AP"] = 0.343460  # 34.35 with two decimals, which would be 34.4 with one
    page = write_files(evaluation, analyse(evaluation), files / "out")["report.html"].read_text()
    assert "34.3" in page
    assert "34.4" not in page


def test_the_worst_errors_are_what_they_are_called(files):
    evaluation = run_evaluation(
        files / "a.json", files / "val.json", config=EvaluationConfig(bootstrap=0)
    )
    scored, truth, results = evaluation.scored["segm"], evaluation.truth, evaluation.results
    errors = worst_errors(scored, 3)
    assert list(errors) == ["false", "missed", "confused"]
    found = set(scored.matches.annotation_N.tolist())
    for kind, examples in errors.items():
        assert 0 < len(examples) <= 3
        assert len({example.image for example in examples}) == len(examples)
        scores = [results.score_D[example.detection] for example in examples]
        if kind != "missed":
            assert scores == sorted(scores, reverse=True)
    for example in errors["missed"]:
        assert example.detection == -1
        assert example.annotation not in found
    for example in errors["confused"]:
        assert truth.ann_image_A[example.annotation] == example.image
        named = results.category_D[example.detection]
        assert truth.ann_category_A[example.annotation] != named
    right = scored.matches.near_N[scored.matches.annotation_N >= 0]
    right_detections = scored.matches.selection.detection_S[right]
    assert not np.isin([example.detection for example in errors["false"]], right_detections).any()


def test_errors_are_drawn_as_two_bounded_crops(files):
    truth = json.loads((files / "val.json").read_text())
    truth["images"] = [{**truth["images"][0], "height": 900, "width": 1200}]
    truth["annotations"] = [
        {"image_id": truth["images"][0]["id"], "category_id": 2, "bbox": box, "area": 600.0}
        for box in ([1000.0, 700.0, 30.0, 20.0], [100.0, 100.0, 500.0, 400.0])
    ]
    evaluation = run_evaluation([], truth, config=EvaluationConfig(bootstrap=0))
    pixels = np.zeros((900, 1200, 3), dtype=np.uint8)
    pixels[700:720, 1000:1030] = 255
    small, large = (
        draw_error(evaluation, Example(image=0, annotation=index), lambda _: pixels)
        for index in (0, 1)
    )
    assert small.image.size == (2 * 320 + 8, 320)
    truth_side, found_side = np.asarray(small.image)[:, :320], np.asarray(small.image)[:, -320:]
    assert (found_side[140:180, 130:190] == 255).all(), "what was detected: nothing"
    assert (truth_side == COLOURS[1]).all(axis=2).any()
    assert not (found_side == COLOURS[1]).all(axis=2).any()
    assert max(large.image.size) <= 648


def test_the_scatter_plot_is_valid_and_escaped():
    series = {"rare": [(0.0, 10.0, "a <b> & c"), (9.0, 100.0, "d")], "frequent": [(5e4, 0.0, "e")]}
    root = ET.fromstring(scatter_svg(series, ["#111", "#222"]))
    titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "a <b> & c: AP 10.0, 0 training images" in titles
    circles = [
        (float(node.get("cx")), float(node.get("cy")))
        for node in root.iter("{http://www.w3.org/2000/svg}circle")
    ]
    assert all(0 <= x <= 560 and 0 <= y <= 300 for x, y in circles)


def test_processes_get_the_options_as_given(files, monkeypatch):
    """The processes that share the work read the command line itself: each option means the same there."""
    from proxydet.training import launch

    started: list[Any] = []
    monkeypatch.chdir(files)
    (files / "a b.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setattr(launch, "launch", lambda plan, words, logs: started.append(words))
    words = [
        "eval",
        "--weights",
        "a b.safetensors",
        "--data",
        "set.toml",
        "--gpus",
        "2",
        "--device",
        "cpu",
    ]
    words += ["--protocol", "LVIS", "--iou-type", "segm,bbox", "--allow-outside", "--json"]
    monkeypatch.setattr("sys.argv", ["proxydet", *words])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert started == [["-m", "proxydet_cli", *words]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--protocol", "voc"], "Invalid value for '--protocol'"),
        (["eval", "--iou-type", "box"], "Invalid value for '--iou-type'"),
        (["eval", "--iou-type", "bbox,bbox"], "Invalid value for '--iou-type'"),
        (["eval", "--engine", "x"], "Invalid value for '--engine'"),
        (["data", "check", "val.json", "--protocol", "voc"], "Invalid value for '--protocol'"),
    ],
)
def test_a_wrong_choice_is_an_error_of_usage(words, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(words)
    assert message in " ".join(capsys.readouterr().err.split())


def test_choices_are_read_in_any_case(typed, files):
    words = ["--results", files / "a.json", "--data", files / "val.json", "--bootstrap", "0"]
    out = typed(*words, "--protocol", "COCO", "--iou-type", "BBOX", "--json")[0]
    assert (json.loads(out)["protocol"], list(json.loads(out)["results"])) == ("coco", ["bbox"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["data", "check", str(files / "val.json"), "--protocol", "COCO"])


def test_a_split_that_papers_report_needs_no_data_option(typed, files, monkeypatch, capsys):
    root = files / "datasets"
    monkeypatch.setenv("PROXYDET_DATASETS", str(root))
    words = ("--results", files / "a.json", "--split", "minival", "--bootstrap", "0", "--json")
    assert main(["eval", *map(str, words)]) == 3
    missing = capsys.readouterr().err
    assert "lvis_v1_minival_inserted_image_name.json" in missing
    assert "hint: get it with: proxydet download minival" in missing
    split = PUBLISHED_SPLITS["minival"]
    for place in (split.annotations, split.embeddings):
        (root / place).parent.mkdir(parents=True)
    (root / split.annotations).write_bytes((files / "val.json").read_bytes())
    np.save(root / split.embeddings, np.eye(6))
    out, _ = typed(*words)
    wanted = run_evaluation(files / "a.json", files / "val.json").report
    shown = json.loads(out)
    assert (shown["dataset"], shown["results"]["bbox"]["metrics"]["AP"]) == (
        "lvis-minival",
        wanted.types["bbox"].metrics["AP"],
    )
    assert (files / "evaluation" / "a-lvis-minival" / "results.json").exists()
    with pytest.raises(DataError, match="val2017"):
        published_split("minival")
    for folder in split.images:
        (root / folder).mkdir(parents=True)
    val = published_split("minival").split("val")
    assert val.roots == (root / "coco", root / "coco/val2017")


@pytest.mark.parametrize("name", PUBLISHED_SPLITS)
def test_the_downloads_of_a_split_are_its_files(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PROXYDET_DATASETS", str(tmp_path))
    with pytest.raises(DataError) as caught:
        published_split(name)
    command = str(caught.value.hint).partition("proxydet download ")[2].partition(" && ")[0]
    artifacts = Catalogue.load().resolve(command.split())
    split = PUBLISHED_SPLITS[name]
    if split.annotations is not None:
        held = {place for artifact in artifacts for place in [artifact.target]}
        held |= {
            f"{a.unpack.folder}/{part.path}"
            for a in artifacts
            if a.unpack
            for part in a.unpack.provides
        }
        assert {
            f"datasets/{p}" for p in (split.annotations, split.embeddings, *split.images)
        } <= held
