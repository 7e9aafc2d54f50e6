"""What a path means as annotations: its format, the files that are read, the folders of its images; one reader a format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from proxydet.data.deviations import StoreReport
from proxydet.data.formats import coco, voc, yolo
from proxydet.data.formats.collected import stamp
from proxydet.data.formats.reader import AnnotationEntry, Document, Flaw, Identifier, ImageEntry
from proxydet.errors import DataError
from proxydet.files import remembered_sha256, sha256

Format = Literal["COCO JSON", "Pascal VOC", "YOLO"]


@dataclass(frozen=True, kw_only=True)
class AnnotationSource:
    """Annotations, and what of them is meant."""

    path: Path
    """A file or folder of any format that `format_of` knows."""

    images: tuple[Path, ...] = ()
    """Folders of the images, for formats that do not hold their sizes; without any, those that belong to the path."""

    part: str | None = None
    """Of a ``data.yaml`` of YOLO: ``train``, ``val`` or ``test``. None means all of it."""

    share: tuple[float, float] | None = None
    """From and to which fraction of the images, in an order that their names and ``seed`` decide."""

    seed: int = 0
    """Of ``share``."""


def format_of(path: Path) -> Format | None:
    """Return the format of annotations, from names and first bytes; None for a folder that holds none."""
    suffix = path.suffix.lower()
    if suffix in yolo.YAML:
        return "YOLO"
    if path.is_dir():
        if (path / "Annotations").is_dir() or any(path.glob("*.xml")):
            return "Pascal VOC"
        return "YOLO" if yolo.is_folder(path) else None
    if suffix == ".txt":
        return "YOLO" if yolo.is_list(path) else "Pascal VOC"
    return "Pascal VOC" if suffix == ".xml" else "COCO JSON"


def image_folders(path: Path) -> tuple[Path, ...]:
    """Return the folders in which the images of annotations alone are looked for; none where that is not known."""
    found = format_of(path)
    if found == "YOLO":
        if path.is_dir():
            return (yolo.folders(path)[1],)
        if path.suffix.lower() in yolo.YAML:
            places = [place for part in yolo.parts(path).values() for place in part]
            return tuple(p for p in dict.fromkeys(places) if p.is_dir()) or (path.parent,)
        return yolo.list_roots(path)
    folder = voc.image_folder(path) if found == "Pascal VOC" else None
    return () if folder is None else (folder,)


def digest(source: AnnotationSource, memory: Path) -> str:
    """Return a digest of what `read` reads.

    Args:
        source: The annotations.
        memory: Folder of remembered digests.

    Raises:
        DataError: a file cannot be read, or there is none.
    """
    found = format_of(source.path)
    images: list[Path] = []
    files = [source.path]
    if found in ("Pascal VOC", None):
        files = voc.files(source.path)
    elif found == "YOLO":
        files, images = yolo.files(source.path, source.images, source.part)
    if len(files) == 1 and not images:
        hint = "check the path; paths in a dataset config are relative to its folder"
        whole = remembered_sha256(files[0], memory, hint=hint, error=DataError)
    else:
        try:
            listed = "\n".join(f"{file.name} {sha256(file)}" for file in files)
        except OSError as error:
            raise DataError(
                f"cannot read {error.filename}: {error.strerror}",
                hint="check that it is a file that you may read",
                path=source.path,
            ) from error
        listed += f"\nimages {stamp(images)}" if images else ""
        whole = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
    if source.part is None and source.share is None:
        return whole
    return hashlib.sha256(
        f"{whole} {source.part} {source.share} {source.seed}".encode()
    ).hexdigest()


def read(source: AnnotationSource, name: str, report: StoreReport) -> Document:
    """Read annotations; the readers say what they raise.

    Args:
        source: The annotations.
        name: What to call them in messages.
        report: Where deviations of the file are counted.
    """
    found = format_of(source.path)
    if found == "Pascal VOC":
        document = voc.read(source.path)
    elif found == "YOLO":
        document = yolo.read(source.path, source.images, source.part, report)
    else:
        document = coco.read(source.path, name, report)
    return document if source.share is None else _share_of(document, source.share, source.seed)


def share_positions(names: list[str], seed: int) -> dict[str, float]:
    """Return where each name stands in the order that ``share`` cuts: fractions from 0, below 1.

    The order is that of a hash of seed and name, so it is the same on every machine and for any order of the file.
    """
    ordered = sorted(
        dict.fromkeys(names),
        key=lambda name: hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest(),
    )
    return {name: place / len(ordered) for place, name in enumerate(ordered)}


def _share_of(document: Document, share: tuple[float, float], seed: int) -> Document:
    """Return a document of a share of the images, and of their annotations."""

    def key(image: ImageEntry) -> str:
        return image.file_name or image.coco_url or str(image.id)

    low, high = share
    images = [image for image in document.images if isinstance(image, ImageEntry)]
    place = share_positions([key(image) for image in images], seed)
    kept: list[ImageEntry | Flaw] = [image for image in images if low <= place[key(image)] < high]
    ids: set[Identifier] = {image.id for image in kept if isinstance(image, ImageEntry)}
    outside: set[Identifier] = {image.id for image in images} - ids
    if low == 0:  # what belongs to no image is counted once
        kept += [flaw for flaw in document.images if isinstance(flaw, Flaw)]

    def belongs(entry: AnnotationEntry | Flaw) -> bool:
        if isinstance(entry, Flaw) or entry.image_id not in ids:
            return low == 0 and (isinstance(entry, Flaw) or entry.image_id not in outside)
        return True

    def annotations() -> Iterator[list[AnnotationEntry | Flaw]]:
        for chunk in document.annotations:
            yield [entry for entry in chunk if belongs(entry)]

    return replace(document, images=kept, annotations=annotations())
