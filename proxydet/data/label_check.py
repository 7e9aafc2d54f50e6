"""Whether the images that have a class and no boxes can be read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proxydet.data.images import find_image, read_image
from proxydet.data.labelled_images import FolderImages, LabelledImages, TarImages
from proxydet.errors import DataError
from proxydet.reporting import SILENT, Progress

_READERS = 8
_AT_ONCE = 64


def unusable_label_images(
    images: LabelledImages, *, decode: bool, progress: Progress = SILENT
) -> list[str]:
    """Look for images that training would stop at.

    Args:
        images: The images. That the members of a tar are images at all, its index knows.
        decode: Read every image through; else only see whether the files are there.
        progress: Where to show how far it is.

    Returns:
        What is wrong with each image that cannot be used.
    """
    if isinstance(images, TarImages) and not decode:
        return []
    found: list[str] = []
    with (
        progress.task("checking images of image_labels", total=len(images), unit="images") as task,
        ThreadPoolExecutor(_READERS) as pool,
    ):
        # In portions: a pool would otherwise take the bytes of all images into memory at once.
        for start in range(0, len(images), _AT_ONCE):
            rows = range(start, min(start + _AT_ONCE, len(images)))
            sources = [_source(images, row) for row in rows]
            names = [images.name(row) for row in rows]
            for problem in pool.map(_problem, sources, names, [decode] * len(names)):
                task.advance()
                if problem:
                    found.append(problem)
    return found


def _source(images: LabelledImages, row: int) -> Path | bytes | DataError:
    """Return what to decode. Tars are read in one thread only: their open files are shared."""
    try:
        if isinstance(images, TarImages):
            return images.index.read(row)
        roots = images.roots if isinstance(images, FolderImages) else ()
        return find_image(images.name(row), roots)
    except DataError as error:
        return error


def _problem(source: Path | bytes | DataError, name: str, decode: bool) -> str:
    if isinstance(source, DataError):
        return source.message
    if decode:
        try:
            read_image(source, name=name)
        except DataError as error:
            return error.message
    return ""
