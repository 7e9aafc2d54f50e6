"""A reader of one's own in a dataset config: its objects go through the same rules, and its faults are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from proxydet.data.dataset import DatasetConfig
from proxydet.data.store import AnnotationStore
from proxydet.errors import ConfigError, DataError

READER = """
from proxydet.data.formats.collected import Objects

def read(path, images):
    found = Objects()
    for line in path.read_text().split():
        name, label, *box = line.split(",")
        found.image(name, (40, 60))
        found.begin(name)
        found.add(name, label, box=[float(value) for value in box])
    return found.document("lines", "line")

def measured(path, images):
    from PIL import Image
    found = Objects()
    with Image.open(images[0] / "a.png") as image:
        width, height = image.size
    found.image("a.png", (height, width))
    found.begin("a.png")
    found.add("a.png", "cat", box=[0, 0, width, height])
    return found.document("lines", "line")

def linked(path, images):
    return read(path / "link" / "boxes.txt", images)

def shifted(path, images):
    return read(path, images)

def nothing(path, images):
    return [path]

def one(path):
    return path

def later(path, images):
    from dataclasses import replace
    def annotations():
        yield from ()
        raise KeyError("late")
    return replace(read(path, images), annotations=annotations())
"""


@pytest.fixture
def open_with(tmp_path, monkeypatch):
    """Open two boxes by a function of a reader module, whose name is new each time."""
    module = f"own_{tmp_path.name}"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{module}.py").write_text(READER)
    (tmp_path / "boxes.txt").write_text("a.png,cat,1,2,11,22 b.png,dog,0,0,30,-5")

    def open_(function: str, annotations: str = "boxes.txt") -> AnnotationStore:
        config = tmp_path / "own.toml"
        config.write_text(
            f'name = "own"\n[train]\nannotations = "{annotations}"\nimages = "."\nreader = "{module}:{function}"\n'
        )
        split = DatasetConfig.from_toml(config).split("train")
        return AnnotationStore.open(split, cache=tmp_path / "cache", warn=False)

    return open_


def test_its_objects_go_through_the_rules_of_every_format(open_with):
    store = open_with("read")
    assert [category.name for category in store.categories] == ["cat", "dog"]
    assert store.record(0).boxes_A4.tolist() == [[1, 2, 11, 22]]
    assert len(store.record(1).boxes_A4) == 0  # a box without area


def test_another_reader_is_another_store(open_with):
    assert open_with("read").path == open_with("read").path
    assert open_with("read").path != open_with("shifted").path


def test_other_images_are_another_store(open_with, tmp_path):
    for size in ((40, 60), (80, 20)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        assert open_with("measured").record(0).boxes_A4.tolist() == [[0, 0, *size]]


def test_linked_annotations_are_part_of_the_digest(open_with, tmp_path):
    for part in ("own", "shared"):
        (tmp_path / part).mkdir()
    (tmp_path / "own" / "link").symlink_to(tmp_path / "shared")
    stores = []
    for text in ("a.png,cat,1,2,11,22", "a.png,cat,1,2,15,25"):
        (tmp_path / "shared" / "boxes.txt").write_text(text)
        stores.append(open_with("linked", "own").record(0).boxes_A4.tolist())
    assert stores == [[[1, 2, 11, 22]], [[1, 2, 15, 25]]]


@pytest.mark.parametrize(
    ("function", "reason"),
    [("nothing", "Document"), ("one", "one("), ("later", "KeyError"), ("absent", "no absent")],
)
def test_readers_that_cannot_be_used(open_with, function, reason):
    with pytest.raises(ConfigError, match="reader is own_") as caught:
        open_with(function)
    assert reason in caught.value.message


def test_faulty_annotations_are_reported_with_file_and_line(open_with, tmp_path):
    Path(tmp_path / "boxes.txt").write_text("a.png,cat,1,x,11,22")
    with pytest.raises(ConfigError, match=r"boxes\.txt raised ValueError.*line"):
        open_with("read")


def test_a_path_of_another_form_is_refused(tmp_path):
    config = tmp_path / "own.toml"
    config.write_text(
        'name = "own"\n[train]\nannotations = "a"\nimages = "."\nreader = "reader.py"\n'
    )
    with pytest.raises(DataError, match="reader must be a Python path"):
        DatasetConfig.from_toml(config)
