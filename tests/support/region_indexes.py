"""Makes region indexes for tests, and lists what is in them."""

from __future__ import annotations

from pathlib import Path

from proxydet.detector import Detector
from proxydet.index.build import index_images
from proxydet.index.store import StoredIndex


def made(path: Path, detector: Detector, photos: Path, most_regions: int | None = None) -> Path:
    """Index all files of a folder."""
    index_images(detector, [photos], path, most_regions=most_regions)
    return path


def paths(index: Path) -> list[str]:
    """Return the images of an index."""
    return sorted(part.path_of(row) for part, row in StoredIndex(index).rows())
