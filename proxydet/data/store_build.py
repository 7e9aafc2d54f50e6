"""Building an annotation store from JSON."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proxydet.data.annotation_json import read_annotations
from proxydet.data.columns import ColumnWriter
from proxydet.data.store_annotations import AnnotationTable
from proxydet.data.store_report import StoreReport
from proxydet.data.store_tables import read_categories, read_images
from proxydet.reporting import SILENT, Progress

STORE_KIND = "annotations"
STORE_VERSION = 1

_CHUNK = 16384


def build_store(source: Path, target: Path, *, progress: Progress = SILENT) -> None:
    """Convert an annotation file.

    Args:
        source: COCO, LVIS or image-label JSON.
        target: The store to write; moved into place when whole.
        progress: Where to show how far it is.

    Raises:
        DataError: the file cannot be read, or its categories are not usable.
    """
    with _no_garbage_collection(), ColumnWriter(target) as writer:
        document = read_annotations(source)
        report = StoreReport(annotations_in=len(document.annotations))
        categories = read_categories(document.categories, source)
        row_of_category = {category.id: row for row, category in enumerate(categories)}
        images = read_images(document.images, report)
        annotations = AnnotationTable(images, row_of_category, writer, report)
        total = report.annotations_in
        with progress.task(f"reading {source.name}", total=total, unit="annotations") as task:
            for start in range(0, total, _CHUNK):
                chunk = document.annotations[start : start + _CHUNK]
                annotations.add(chunk, start)
                task.advance(len(chunk))
        annotations.write()
        images.write(writer, row_of_category, report)
        writer.finish(
            kind=STORE_KIND,
            version=STORE_VERSION,
            meta={"categories": categories, "report": report, "source": source.name},
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of small containers without cycles: looking for cycles among them takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
