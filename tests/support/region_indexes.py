"""Makes region indexes for tests, and lists what is in them."""

from __future__ import annotations

from pathlib import Path

from proxydet.detector import Detector
from proxydet.index.build import index_files, open_writer
from proxydet.index.store import StoredIndex


def made(path: Path, detector: Detector, photos: Path, most_regions: int | None = None) -> Path:
    """Index all files of a folder."""
    with open_writer(detector, path, most_regions=most_regions) as writer:
        index_files(detector, sorted(photos.glob("*")), writer)
    return path


def paths(index: Path) -> list[str]:
    """Return the images of an index."""
    return sorted(part.path_of(row) for part, row in StoredIndex(index).rows())
