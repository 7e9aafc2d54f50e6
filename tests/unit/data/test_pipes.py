"""A named pipe where a file is expected is refused, and not waited for."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxydet.data.check import check_path
from proxydet.data.images import read_image
from proxydet.data.init import init_dataset
from proxydet.errors import DataError, InputError
from tests.unit.data.test_formats import WRITERS, write_cvat, write_labelme, write_via, write_yolo
from tests.unit.data.test_init import write_coco, write_voc

LIMIT = 60
"""Seconds after which a reader counts as waiting for the pipe."""


def voc_lists(root: Path) -> None:
    write_voc(root / "Annotations", "abc")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name, stems in (("train", "a\nb\n"), ("val", "c\n")):
        (lists / f"{name}.txt").write_text(stems)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "COCO": (lambda root: write_coco(root, "abc"), "instances.json"),
    "COCO, gzipped": (lambda root: write_coco(root, "abc"), "instances.json.gz"),
    "part of COCO": (
        lambda root: [write_coco(root / part, "ab", "ann.json") for part in ("train", "val")],
        "val/ann.json",
    ),
    "YOLO, classes.txt": (lambda root: write_yolo(root, "plain", {"": "abc"}), "classes.txt"),
    "YOLO, rows": (lambda root: write_yolo(root, "plain", {"": "abc"}), "labels/a.txt"),
    "YOLO, list": (lambda root: write_yolo(root, "cvat", {"train": "abc"}), "train.txt"),
    "YOLO, data.yaml": (
        lambda root: write_yolo(root, "ultralytics", {"train": "ab", "val": "c"}),
        "data.yaml",
    ),
    "YOLO, image": (lambda root: write_yolo(root, "plain", {"": "abc"}), "images/a.jpg"),
    "Pascal VOC": (lambda root: write_voc(root, "abc"), "a.xml"),
    "Pascal VOC, list": (voc_lists, "ImageSets/Main/val.txt"),
    "labelme": (lambda root: write_labelme(root, "abc"), "a.json"),
    "VGG VIA": (lambda root: write_via(root, "abc"), "via.json"),
    "CVAT XML": (lambda root: write_cvat(root, "abc"), "annotations.xml"),
    "Label Studio": (lambda root: WRITERS["Label Studio JSON"](root, "abc"), "export.json"),
}


@contextlib.contextmanager
def limited(pipe: Path) -> Iterator[None]:
    def stop(*_: object) -> None:
        with contextlib.suppress(OSError):  # lets go of a thread that waits for a writer
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        raise TimeoutError(f"waited for {pipe}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("place", PLACES)
def test_a_pipe_is_not_waited_for(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PROXYDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write, name = PLACES[place]
    root, pipe = tmp_path / "export", tmp_path / "export" / name
    write(root)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with limited(pipe):
        for source in (root, pipe):
            with contextlib.suppress(InputError):
                init_dataset(source, Path("pets.toml"), closed=True, overwrite=True)
            if source == pipe and place not in ("Pascal VOC, list", "YOLO, image"):
                assert not all(report.sound for report in check_path(source))
            else:
                check_path(source)


def test_an_image_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with limited(tmp_path / "pipe.jpg"), pytest.raises(DataError, match=r"pipe\.jpg.*regular file"):
        read_image(tmp_path / "pipe.jpg")
