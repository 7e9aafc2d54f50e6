"""Indexes image files: embeds the regions of those that are new or changed, and puts them into an index."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxydet.data.images import read_image
from proxydet.errors import DataError, JobInterruptedError, NumericsError, VocabularyError
from proxydet.files import read_errors, sha256
from proxydet.index.store import (
    ImageRegions,
    IndexedDetector,
    IndexWriter,
    file_state,
    image_regions,
)
from proxydet.inference.jobs import Unreadable
from proxydet.inference.pipeline import run_images
from proxydet.inference.sources import SourceImage
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.wording import printable

if TYPE_CHECKING:
    from proxydet.detector import Detector, ScaledImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexSummary:
    """What was done with images."""

    added: int
    """Images whose regions were embedded and added; those that had changed replaced what was there."""
    copied: int
    """Images whose content was in the index under another path; where that was gone, they were moved."""
    unchanged: int
    """Images that were in the index as they are."""
    images: int
    """Images in the index."""
    unreadable: tuple[Unreadable, ...]


def open_writer(detector: Detector, path: Path, *, most_regions: int | None = None) -> IndexWriter:
    """Open an index for the images of a detector; it is made where it is not there.

    Args:
        detector: Embeds the regions.
        path: The folder of the index.
        most_regions: Regions kept of an image of a compact index; None: an exact index.

    Raises:
        ConfigError: The detector runs with test-time augmentation.
        DataError: The index is of another detector or damaged, or the folder holds something else.
        LockedError: Another process writes to it.
    """
    identity = IndexedDetector.of(detector, most_regions=most_regions)
    try:
        encoder = detector.encoder
    except VocabularyError:  # CLIP, which is not here
        own = None
    else:
        own = encoder if isinstance(encoder, CompositionalEncoder) else None
    return IndexWriter(path, identity, (detector.vocabulary, own))


def index_files(
    detector: Detector,
    images: Iterable[SourceImage | Path | str],
    writer: IndexWriter,
    *,
    batch_size: int = 4,
    progress: Progress = SILENT,
) -> IndexSummary:
    """Add image files to an index, reading while the network works.

    An image that is in the index and has not changed (bytes and time of change; where a store gives neither, its content) is
    left alone, so the same call continues what was stopped. One that cannot be read is logged, counted and left out.

    Args:
        detector: Embeds the regions.
        images: Files, named in the index by absolute paths, or what `proxydet.inference.sources.stream_images` finds: members of tars,
            objects of stores.
        writer: The index.
        batch_size: Images in the network at once.
        progress: Where progress is shown.

    Raises:
        NumericsError: The network gave values that are not finite.
        DiskFullError: There is no room; what was committed stays.
        JobInterruptedError: Ctrl-C; what was indexed is kept.
    """
    added = copied = unchanged = 0
    unreadable: list[Unreadable] = []

    digests: dict[
        str, bytes | None
    ] = {}  # of images that have no stamp, where they are in the index

    def read(image: SourceImage) -> tuple[dict[str, Any], ScaledImage | None]:
        path, file, tar = _identified(image)
        encoded = image.encoded()
        if isinstance(encoded, bytes):
            digest = hashlib.sha256(encoded).digest()
            if digests.pop(path, None) == digest:
                return {}, None
        scaled = detector.scaled(read_image(encoded, name=image.name))
        if isinstance(encoded, Path):
            with read_errors(encoded, error=DataError):
                digest = bytes.fromhex(sha256(encoded))
        height, width = scaled.views[0].image.shape[1:]
        sizes = (int(height), int(width), *scaled.size)
        named = {"path": path, "file": file or (0, 0), "digest": digest, "sizes": sizes, "tar": tar}
        return named, scaled

    def embed(batch: list[tuple[dict[str, Any], ScaledImage | None]]) -> list[dict[str, Any]]:
        changed = [scaled for _, scaled in batch if scaled is not None]
        if not changed:
            return [{} for _ in batch]
        found = detector.embed(changed).cpu()
        if not all(bool(values.isfinite().all()) for values in (*found.detection, found.boxes_BR4)):
            raise NumericsError(
                "the box heads returned values that are not finite",
                hint="the weights are damaged, or half precision is too narrow for them: use float32",
            )
        places = iter(range(len(changed)))
        return [
            {} if scaled is None else image_regions(found, next(places), writer.detector)
            for _, scaled in batch
        ]

    with progress.task("indexing", unit="images") as task:

        def todo() -> Iterator[SourceImage]:
            nonlocal copied, unchanged
            for given in images:
                image = given if isinstance(given, SourceImage) else SourceImage(str(given))
                path, file, _ = _identified(image)
                known = writer.state(path)
                if file is not None and known == file:
                    unchanged += 1
                elif image.is_file and file and known is None and writer.add_copy(path, file):
                    copied += 1
                else:
                    if file is None and known is not None:
                        digests[path] = writer.digest(path)
                    yield image
                    continue
                task.advance()

        try:
            with closing(run_images(todo(), read, embed, batch_size=batch_size)) as results:
                for image, made in results:
                    task.advance()
                    if isinstance(made, DataError):
                        logger.warning("%s", printable(made.message))
                        unreadable.append(Unreadable(file=image.name, reason=made.message))
                        continue
                    (named, _), regions = made
                    if not regions:
                        unchanged += 1
                        continue
                    writer.add(ImageRegions(**named, **regions))
                    added += 1
        except KeyboardInterrupt as error:
            raise JobInterruptedError(
                f"stopped after {added} new images, which are in {writer.path}",
                hint="run the same command again; it continues where it stopped",
            ) from error
    return IndexSummary(
        added=added,
        copied=copied,
        unchanged=unchanged,
        images=writer.images,
        unreadable=tuple(unreadable),
    )


def _identified(image: SourceImage) -> tuple[str, tuple[int, int] | None, tuple[int, int]]:
    """Return how an image is named in an index, its bytes and time of change, and its place in a tar as `ImageRegions.tar` has it.

    Where a store gives a tag in place of a time, the time is a negative number that changes with the tag.
    """
    place = image.tar or image.name
    path = place if "://" in place else os.path.abspath(place)  # noqa: PTH100 links stay
    if image.is_file:
        return path, file_state(path), (0, 0)
    tar = (len(os.fsencode(path)), image.offset) if image.tar else (0, 0)
    path += image.name[len(place) :]
    if not image.stamp:
        return path, None, tar
    changed = int(image.stamp) if image.stamp.isdigit() and "://" not in place else None
    if changed is None:
        digest = hashlib.blake2b(image.stamp.encode(), digest_size=7).digest()
        changed = -1 - int.from_bytes(digest, "little")
    return path, (image.size or 0, changed), tar
