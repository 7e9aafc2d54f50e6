"""Pascal VOC annotations: read as they are, from a folder or a list, and refused by name where they are not that."""

from __future__ import annotations

import json
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from PIL import Image
from typer.testing import CliRunner

from proxydet.data.check import check_path
from proxydet.data.store import AnnotationStore
from proxydet.errors import DataError
from proxydet_cli.main import main

Box = tuple[str, int, int, int, int]


def write(folder: Path, name: str, boxes: list[Box], *, extra: str = "") -> None:
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "JPEGImages").mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / f"{name}.jpg")
    objects = "".join(
        f"<object><name>{escape(label)}</name>{extra}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, x1, y1, x2, y2 in boxes
    )
    (folder / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><filename>{name}.jpg</filename><size><width>40</width><height>30</height>"
        f"</size>{objects}</annotation>"
    )


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    write(tmp_path / "voc", "a", [("dog", 1, 1, 40, 30), ("cat & co", 5, 6, 9, 20)])
    write(tmp_path / "voc", "b", [("dog", 2, 3, 10, 12)])
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\n")
    return tmp_path / "voc"


def test_corners_count_from_one_and_classes_are_sorted_by_name(voc, tmp_path):
    store = AnnotationStore.open(voc, cache=tmp_path / "c")
    assert store.report.counts == {}
    assert [category.name for category in store.categories] == ["cat & co", "dog"]
    assert store.image_ids == ("a", "b")
    assert store.record(0).boxes_A4.tolist() == [[0, 0, 40, 30], [4, 5, 9, 20]]
    assert store.record(0).file_name == "a.jpg"
    assert not store.has_masks


def test_a_corner_of_zero_means_that_all_count_from_zero(voc, tmp_path):
    write(voc, "c", [("dog", 0, 2, 10, 12)])
    store = AnnotationStore.open(voc, cache=tmp_path / "c")
    assert store.record(1).boxes_A4.tolist() == [[2, 3, 10, 12]]


def test_lists_of_a_folder_count_from_the_same_pixel(voc, tmp_path):
    """A corner of 0 in a file of another list decides, also where a store was made before."""
    train, cache = voc / "ImageSets" / "Main" / "train.txt", tmp_path / "c"
    assert AnnotationStore.open(train, cache=cache).record(0).boxes_A4.tolist() == [[1, 2, 10, 12]]
    (voc / "Annotations" / "d.xml").write_text("<annotation><object><bndbox><xmin> 0 </xmin>")
    for source in (train, voc / "Annotations" / "b.xml"):
        store = AnnotationStore.open(source, cache=cache)
        assert store.record(0).boxes_A4.tolist() == [[2, 3, 10, 12]]
        assert "from 0" in store.format


def test_a_list_chooses_images_and_a_changed_file_makes_another_store(voc, tmp_path):
    source = voc / "ImageSets" / "Main" / "train.txt"
    store = AnnotationStore.open(source, cache=tmp_path / "c")
    assert store.image_ids == ("b",)
    write(voc, "b", [("dog", 2, 3, 10, 13)])
    assert AnnotationStore.open(source, cache=tmp_path / "c").path != store.path


def test_check_stats_and_preview_need_no_other_file(voc, tmp_path):
    from proxydet_cli.commands.data import app

    (report,) = check_path(voc)
    assert report.sound
    assert "all 2 images" in report.findings[-1].text
    runner = CliRunner()
    counted = runner.invoke(app, ["stats", str(voc), "--json"])
    assert counted.exit_code == 0, counted.output
    assert json.loads(counted.stdout)["parts"][0]["annotations"] == 3
    results = tmp_path / "results.json"
    results.write_text(
        json.dumps([{"image_id": "a", "category_id": 2, "bbox": [0, 0, 40, 30], "score": 0.9}])
    )
    scoring = ["eval", "--results", str(results), "--data", str(voc), "-o", str(tmp_path / "e")]
    with pytest.raises(SystemExit) as ended:
        main([*scoring, "--bootstrap", "0"])
    assert ended.value.code == 0
    assert json.loads((tmp_path / "e" / "results.json").read_text())["protocol"] == "coco"
    sheet = tmp_path / "sheet.png"
    drawn = runner.invoke(app, ["preview", str(voc), "--output", str(sheet)])
    assert drawn.exit_code == 0, drawn.output
    with Image.open(sheet) as image:
        assert image.size[0] > 40
    (voc / "JPEGImages" / "a.jpg").unlink()
    assert runner.invoke(app, ["check", str(voc)]).exit_code == 3


def test_what_is_missing_in_an_object_costs_that_object(voc, tmp_path):
    path = voc / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<xmax>9</xmax>", "<xmax>x</xmax>"))
    path = voc / "Annotations" / "b.xml"
    nameless = "<object><name></name></object>"
    path.write_text(path.read_text().replace("</annotation>", f"{nameless}</annotation>"))
    report = AnnotationStore.open(voc, cache=tmp_path / "c").report
    assert report.counts == {"annotation.bbox": 1, "annotation.category_id": 1}
    of_box, of_name = report.lines()
    assert of_box.startswith("1 object dropped: bndbox")
    assert of_box.endswith("e.g. object 2 of a.xml")
    assert of_name.startswith("1 object dropped: name")
    assert of_name.endswith("e.g. object 2 of b.xml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("<annotation>", "not XML"),
        ("<html></html>", "web page"),
        ("<data></data>", "not Pascal VOC"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "entities"),
        ("", "empty"),
        ("\0", "one byte"),
    ],
)
def test_what_is_not_voc_is_refused_by_its_file(voc, text, match):
    (voc / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        AnnotationStore.open(voc, cache=voc / "c")
    assert "a.xml" in caught.value.message


def test_files_and_lists_are_bounded(voc, tmp_path):
    path, source = voc / "Annotations" / "a.xml", voc / "ImageSets" / "Main" / "train.txt"
    path.write_text(path.read_text() + " " * (2 << 20))
    with pytest.raises(DataError, match=r"a\.xml is larger than 2 MB"):
        AnnotationStore.open(voc, cache=tmp_path / "c")
    source.write_text("".join(f"{n}\n" for n in range(1_000_001)))
    with pytest.raises(DataError, match=r"train\.txt: it lists more than"):
        AnnotationStore.open(source, cache=tmp_path / "c")
    source.write_bytes(b"b" + b" " * (32 << 20))
    with pytest.raises(DataError, match=r"train\.txt: it is larger than"):
        AnnotationStore.open(source, cache=tmp_path / "c")


def test_a_folder_of_json_names_the_json(voc, tmp_path):
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances.json").write_text("{}")
    with pytest.raises(DataError, match="no annotations") as caught:
        AnnotationStore.open(folder, cache=tmp_path / "c")
    (report,) = check_path(folder)
    for hint in (caught.value.hint or "", report.findings[0].advice):
        assert "coco/annotations/instances.json" in hint


def test_lists_and_folders_without_annotations_are_refused(voc, tmp_path):
    source = voc / "ImageSets" / "Main" / "train.txt"
    source.write_text("b\nabsent\n")
    with pytest.raises(DataError, match=r"absent\.xml"):
        AnnotationStore.open(source, cache=voc / "c")
    (tmp_path / "names.txt").write_text("dog\n")
    with pytest.raises(DataError, match=r"names\.txt"):
        AnnotationStore.open(tmp_path / "names.txt", cache=voc / "c")
    (tmp_path / "empty" / "Annotations").mkdir(parents=True)
    with pytest.raises(DataError, match="no annotations"):
        AnnotationStore.open(tmp_path / "empty", cache=voc / "c")


@pytest.mark.parametrize("filename", ["<filename>a</filename>", "<filename></filename>", ""])
def test_an_ending_that_is_left_out_is_found_when_the_image_is_opened(voc, tmp_path, filename):
    """Also after the folder changed, with the store that was made before."""
    path, images = voc / "Annotations" / "a.xml", voc / "JPEGImages"
    path.write_text(path.read_text().replace("<filename>a.jpg</filename>", filename))
    cache = tmp_path / "c"
    assert check_path(voc, cache=cache)[0].sound
    Image.open(images / "a.jpg").save(images / "a.PNG")
    (report,) = check_path(voc, cache=cache)
    assert not report.sound
    assert "a.jpg, a.PNG" in report.findings[-1].text
    (images / "a.jpg").unlink()
    assert check_path(voc, cache=cache)[0].sound


def test_a_name_with_and_one_without_its_ending_are_one_image(voc, tmp_path):
    path = voc / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("b.jpg", "a"))
    (report,) = check_path(voc, cache=tmp_path / "c")
    assert any("are one file" in finding.text for finding in report.findings)
    assert not report.sound
