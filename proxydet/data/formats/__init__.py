"""Opening annotations with the reader of their format; each gives the same records, which `proxydet.data.store` turns into columns.

A reader decides nothing about records that deviate: it hands over what the file says, and the store applies
`proxydet.data.deviations`.
"""

from __future__ import annotations

import os
from pathlib import Path

from proxydet.data.deviations import StoreReport
from proxydet.data.formats import coco, voc
from proxydet.data.formats.records import Document
from proxydet.errors import DataError


def read_document(source: Path | bytes, name: str, report: StoreReport) -> Document:
    """Read an annotation file with the reader of its format, found out by looking.

    Args:
        source: A COCO, LVIS or OpenImages JSON file (plain or gzipped) or its bytes; or Pascal VOC: a folder of XML
            files, the data set's folder above it, one XML file, or a list of ``ImageSets``.
        name: What to call it in messages.
        report: Where deviations of the file as a whole are counted.

    Raises:
        DataError: the file cannot be read, or is of no known format.
    """
    if isinstance(source, Path) and not os.path.exists(source):  # noqa: PTH110 - false for a name too long
        raise DataError(
            f"there is no annotation file {source}",
            hint="check the path; paths in a dataset config are relative to its folder",
            path=source,
        )
    if isinstance(source, Path) and voc.is_voc(source):
        return voc.read(source)
    return coco.read(source, name, report)


def source_files(source: Path) -> list[Path]:
    """Return the files that annotations are read from: the file itself, or those of a folder or list."""
    return voc.files(source) if voc.is_voc(source) else [source]
