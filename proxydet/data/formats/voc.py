"""Reading Pascal VOC: one XML file an image, boxes with both corners, classes by name.

Layout: ``Annotations/*.xml``, ``JPEGImages/``, and lists of image names in ``ImageSets/Main/*.txt``. A data set is named
by its folder, by a folder of XML files, or by one of the lists.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from proxydet.data.formats.collected import Objects, number, numbers, read_xml, size_of
from proxydet.data.images import readable_suffixes
from proxydet.data.records import AnnotationSource, Document, StoreReport
from proxydet.errors import DataError
from proxydet.files import open_regular, read_errors, read_text
from proxydet.wording import first_of, printable

_LARGEST_FILE = 2 << 20
"""Bytes of an XML file: room for some ten thousand objects. The tree of a file takes up to 40 times as much."""
_LARGEST_LIST = 32 << 20
_MOST_LISTED = 1_000_000
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_LOW_CORNER = re.compile(rb"<[xy]min>\s*([-+.\dEe]+)\s*<")
_HINT = "Pascal VOC has one XML file an image in Annotations/, with size and object/bndbox"


def image_folder(source: Path) -> Path | None:
    """Return the ``JPEGImages`` folder that belongs to annotations, else the folder of XML files where images lie in it."""
    for folder in (source, *source.resolve().parents[:4]):
        if (folder / "JPEGImages").is_dir():
            return folder / "JPEGImages"
    own = source if source.is_dir() else source.parent
    ends = tuple(readable_suffixes())
    there = own.iterdir() if own.is_dir() else ()
    return own if any(path.name.lower().endswith(ends) for path in there) else None


def coco_files(folder: Path) -> list[str]:
    """Return the JSON files in a folder and in ``annotations`` inside it, for hints."""
    found = (*folder.glob("*.json"), *folder.glob("*.json.gz"), *folder.glob("annotations/*.json"))
    return [path.as_posix() for path in sorted(found)]


def files(source: Path) -> list[Path]:
    """Return the XML files that a path names, in the order of the list, or of their names.

    Raises:
        DataError: there are none, or a listed one is absent.
    """
    if source.suffix.lower() == ".xml" and source.is_file():
        return [source]
    if source.is_dir():
        inner = source / "Annotations"
        folder = inner if inner.is_dir() else source
        found = sorted(path for path in folder.glob("*.xml") if not path.name.startswith("._"))
        if not found:
            named = coco_files(source)
            hint = f"name the annotation file: {first_of(named)}" if named else _HINT
            raise DataError(f"there are no annotations (*.xml) in {folder}", hint=hint, path=source)
        return found
    above = [f / "Annotations" for f in source.resolve().parents[:4]]
    folder = next((f for f in above if f.is_dir()), source)
    if folder == source:
        why = "is not an annotation file: a list of images needs a folder Annotations above it"
        raise DataError(f"{source} {why}", hint=_HINT, path=source)
    names: dict[str, None] = {}
    with read_errors(source, error=DataError, hint=_HINT):
        for line in io.StringIO(read_text(source, limit=_LARGEST_LIST)):
            # In the lists of single classes, a second column says whether the class is there.
            names.update(dict.fromkeys(line.split(maxsplit=1)[:1]))
            if len(names) > _MOST_LISTED:
                raise ValueError(f"it lists more than {_MOST_LISTED:,} images")
    absent = [name for name in names if not os.path.isfile(f"{folder}/{name}.xml")]  # noqa: PTH113 - false for a name too long
    if absent or not names:
        what = "it lists no image"
        if absent:
            count = f"{len(absent)} of its {len(names)} images"
            shown = [f"{name[:80]}.xml" for name in absent[:3]]
            what = f"{count} have no XML in {folder}, e.g. {shown}"
        hint = "correct the list, or get the missing files"
        raise DataError(f"{source}: {what}", hint=hint, path=source)
    return [folder / f"{name}.xml" for name in names]


def first_pixel(source: Path) -> int:
    """Return from what number corners are counted: 0 where a corner of any XML file in the folder is less than 1, else 1.

    The lists of a dataset would not agree if each went by its own files. Errors as of `files`.
    """
    for path in files(source)[0].parent.glob("*.xml"):
        try:
            with open_regular(path) as file:
                text = b"" if path.stat().st_size > _LARGEST_FILE else file.read()
        except OSError:
            continue  # refused by name where it is one of the list
        for corner in map(number, map(bytes.decode, _LOW_CORNER.findall(text))):
            if corner is not None and corner < 1:
                return 0
    return 1


def read(source: AnnotationSource, _report: StoreReport) -> Document:
    """Read Pascal VOC annotations.

    Corners are pixel numbers from 1, both inclusive, as the format says: a box from 1 to W covers the image. Where a
    corner of any file in the folder is 0, its writer counted from 0, and all corners are taken as they are. ``difficult``
    objects are marked to be ignored in scoring. An object's ``polygon`` (``x1``, ``y1``, ``x2``, ..., as Roboflow writes it)
    is its outline.

    Raises:
        DataError: a file is not such XML.
    """
    found, first = Objects(), first_pixel(source.annotations)
    for path in files(source.annotations):
        root = read_xml(path, _LARGEST_FILE, "annotation", "Pascal VOC", _HINT)
        name = (root.findtext("filename") or "").strip()
        # Some writers put the whole path there, or the name without its ending, or nothing.
        name = name.replace("\\", "/").rsplit("/", 1)[-1] or path.stem
        size = size_of(root.findtext("size/height"), root.findtext("size/width"))
        found.image(name, size, own_id=path.stem)
        found.begin(path.name)
        for item in root.iter("object"):
            label, difficult = ((item.findtext(f) or "").strip() for f in ("name", "difficult"))
            box = numbers([item.findtext(f"bndbox/{side}") for side in _CORNERS])
            if box is not None:
                box = [box[0] - first, box[1] - first, *box[2:]]
            outlines = [numbers([point.text for point in part]) for part in item.iter("polygon")]
            shifted = [[value - first for value in outline] for outline in outlines if outline]
            found.add(path.stem, label, box=box, polygons=shifted, ignore=difficult == "1")
    return found.document(f"Pascal VOC, pixels from {first}", "object")


def annotation(
    image: str, size: tuple[int, int], objects: Iterable[tuple[str, Sequence[float]]]
) -> str:
    """Return the XML of an image; boxes are rounded to whole pixels.

    Args:
        image: Name of its file.
        size: Its height and width.
        objects: Class and box (left, top, right, bottom in pixels) of each object.
    """
    height, width = size
    lines = [
        "<annotation>",
        f"  <filename>{escape(printable(image))}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for label, (left, top, right, bottom) in objects:
        corners = [min(round(left) + 1, width), min(round(top) + 1, height)]
        corners += [max(round(right), corners[0]), max(round(bottom), corners[1])]
        box = "".join(f"<{s}>{v}</{s}>" for s, v in zip(_CORNERS, corners, strict=True))
        name = f"<name>{escape(printable(label))}</name>"
        lines.append(f"  <object>{name}<difficult>0</difficult><bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])
