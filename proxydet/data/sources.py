"""What a path means as annotations: its format, the files that are read, the folders of its images; one reader a format."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shlex
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from proxydet.data.formats import coco, cvat, label_studio, labelme, via, voc, yolo
from proxydet.data.formats.collected import part_of_word
from proxydet.data.images import images_below, readable_suffixes, stamp
from proxydet.data.records import (
    AnnotationEntry,
    Document,
    Flaw,
    Identifier,
    ImageEntry,
    StoreReport,
    image_name,
)
from proxydet.errors import DataError
from proxydet.files import (
    PlaceholderError,
    open_regular,
    refuse_placeholder,
    remembered_sha256,
    sha256,
)
from proxydet.wording import first_of

Format = Literal[
    "COCO JSON", "Pascal VOC", "YOLO", "labelme", "VGG VIA", "CVAT XML", "Label Studio JSON"
]
_HEAD = 1 << 16
_REMEMBERED = 1 << 20
"""Bytes of a file from which its digest is remembered: labelme's hold the images too."""
_MOST_ROOTS = 64
"""Folders in which the images of a file are looked for."""


@dataclass(frozen=True, kw_only=True)
class AnnotationSource:
    """Annotations, and what of them is meant."""

    path: Path
    """A file or folder of any format that `format_of` knows."""

    images: tuple[Path, ...] = ()
    """Folders of the images, for formats that do not hold their sizes; without any, those that belong to the path."""

    part: str | None = None
    """Of a ``data.yaml`` of YOLO ``train``, ``val`` or ``test``; of a CVAT project a subset, or one of these for all subsets
    with a word for it (``val``: ``Validation`` and ``dev``). None means all of it."""

    share: tuple[float, float] | None = None
    """From and to which fraction of the images, in an order that their names and ``seed`` decide."""

    seed: int = 0
    """Of ``share``."""


def head_of(path: Path) -> bytes:
    """Return the first 64 KB of a file, unpacked where it is gzipped; nothing where it cannot be read."""
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
        if head.startswith(b"\x1f\x8b"):
            with gzip.open(path) as packed:
                head = packed.read(_HEAD)
    except (OSError, EOFError, zlib.error):
        return b""
    return head


def format_of(path: Path) -> Format | None:
    """Return the format of annotations, from names and first bytes; None for a folder that holds none."""
    suffix = path.suffix.lower()
    if suffix in yolo.YAML:
        return "YOLO"
    if path.is_dir():
        if (path / "Annotations").is_dir() or any(path.glob("*.xml")):
            return "Pascal VOC"
        if yolo.is_folder(path):
            return "YOLO"
        files = labelme.files(path)[:_SNIFFED] if any(path.rglob("*.json")) else []
        return "labelme" if any(labelme.is_file(head_of(file)) for file in files) else None
    if suffix == ".txt":
        return "YOLO" if yolo.is_list(path) else "Pascal VOC"
    if suffix == ".gz":
        return "COCO JSON"
    head = head_of(path)
    if suffix == ".xml":
        return "CVAT XML" if cvat.is_file(head) else "Pascal VOC"
    for found, reader in (
        ("labelme", labelme),
        ("VGG VIA", via),
        ("Label Studio JSON", label_studio),
    ):
        if reader.is_file(head):
            return found  # type: ignore[return-value]
    return "COCO JSON"


def image_folders(path: Path) -> tuple[Path, ...]:
    """Return the folders in which the format has its images; none where it has no rule for it."""
    found = format_of(path)
    if found == "YOLO":
        if path.suffix.lower() in yolo.YAML:
            return _folders_of([place for part in yolo.parts(path).values() for place in part])
        return (yolo.folders(path)[1],) if path.is_dir() else yolo.list_roots(path)
    if found == "Pascal VOC":
        folder = voc.image_folder(path)
        return () if folder is None else (folder,)
    return (path,) if path.is_dir() else ()


def with_folders(source: AnnotationSource) -> AnnotationSource:
    """Return a source with the folders of its images, for formats that may not hold their sizes and without a rule for them."""
    if source.images or format_of(source.path) not in ("labelme", "VGG VIA", "Label Studio JSON"):
        return source
    return replace(source, images=_near(source.path))


def _near(path: Path) -> tuple[Path, ...]:
    own = path if path.is_dir() else path.parent
    return tuple(folder for folder in (own, own / "images") if folder.is_dir())


def digest(source: AnnotationSource, memory: Path) -> str:
    """Return a digest of what `read` reads.

    Args:
        source: The annotations, as of `with_folders`.
        memory: Folder of remembered digests.

    Raises:
        DataError: a file cannot be read, or there is none.
    """
    found = format_of(source.path)
    images: list[tuple[str, Path]] = []
    files = [source.path]
    if found in ("Pascal VOC", None):
        files = voc.files(source.path)
    elif found == "labelme":
        files, images = labelme.files(source.path), _below(source.images)
    elif found in ("VGG VIA", "Label Studio JSON"):
        images = _below(source.images)
    elif found == "YOLO":
        files, images = yolo.files(source.path, source.images, source.part)
    if len(files) == 1 and not images:
        hint = "check the path"
        whole = remembered_sha256(files[0], memory, hint=hint, error=DataError)
    else:
        digests = []
        for file in files:
            try:
                digests.append(f"{_called(file, source.path)} {_sha256(file, memory)}")
            except OSError as error:
                raise DataError(
                    f"cannot read {file}: {error.strerror or error}",
                    hint="check that it is a file that you may read",
                    path=file,
                ) from error
        listed = "\n".join(digests)
        listed += f"\nimages {stamp(images)}" if images else ""
        whole = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
    if found == "Pascal VOC" and voc.first_pixel(source.path) == 0:  # which other files decide
        whole = hashlib.sha256(f"{whole} from 0".encode()).hexdigest()
    if source.part is None and source.share is None:
        return whole
    return hashlib.sha256(
        f"{whole} {source.part} {source.share} {source.seed}".encode()
    ).hexdigest()


def _called(file: Path, above: Path) -> str:
    inside = file != above and file.is_relative_to(above)
    return file.relative_to(above).as_posix() if inside else file.name


def _sha256(file: Path, memory: Path) -> str:
    if file.stat().st_size < _REMEMBERED:
        return sha256(file)
    return remembered_sha256(file, memory, error=DataError)


def _below(roots: Sequence[Path]) -> list[tuple[str, Path]]:
    return [
        (image.relative_to(root).as_posix(), image)
        for root in roots
        for image in images_below(root)
    ]


def read(source: AnnotationSource, name: str, report: StoreReport) -> Document:
    """Read annotations; the readers say what they raise.

    Args:
        source: The annotations, as of `with_folders`.
        name: What to call them in messages.
        report: Where deviations of the file are counted.
    """
    found = format_of(source.path)
    if found in ("Pascal VOC", None):
        document = voc.read(source.path)
    elif found == "YOLO":
        document = yolo.read(source.path, source.images, source.part, report)
    elif found == "labelme":
        document = labelme.read(source.path, source.images)
    elif found == "VGG VIA":
        document = via.read(source.path, source.images)
    elif found == "CVAT XML":
        document = cvat.read(source.path, source.part, report)
    elif found == "Label Studio JSON":
        document = label_studio.read(source.path, source.images, report)
    else:
        document = coco.read(source.path, name, report)
    return document if source.share is None else _share_of(document, source.share, source.seed)


def share_positions(names: list[str], seed: int) -> dict[str, float]:
    """Return where each name stands in the order that ``share`` cuts: fractions between 0 and 1.

    The order is that of a hash of seed and name, so it is the same on every machine and for any order of the file.
    """
    ordered = sorted(
        dict.fromkeys(names),
        key=lambda name: hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest(),
    )
    return {name: (place + 0.5) / len(ordered) for place, name in enumerate(ordered)}


def _share_of(document: Document, share: tuple[float, float], seed: int) -> Document:
    """Return a document of a share of the images, and of their annotations."""

    def key(image: ImageEntry) -> str:
        return image_name(image) or str(image.id)

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


# --- Data sets found in a folder -----------------------------------------------------------------------------------------

_OTHER_TASKS = ("captions", "person_keypoints", "image_info", "panoptic", "stuff")
"""Beginnings of COCO's annotation files that hold no objects to detect."""
_DEEPEST = 6
_MOST_FOLDERS = 20_000
_SNIFFED = 20
"""Files of a folder that are opened to see their format."""


@dataclass(frozen=True, kw_only=True)
class FoundData:
    """The annotations that a path holds.

    Attributes:
        format: Their format.
        parts: What belongs to ``train``, ``val`` and ``test``, or to ``""`` where nothing is split.
        left_out: Annotations that belong to no part while others do: files, folders, subsets of a CVAT project.
        damaged: Files that cannot be annotations, by their first bytes, each with the reason.
    """

    format: Format
    parts: dict[str, AnnotationSource]
    left_out: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()


def look(path: Path, images: Sequence[Path] = ()) -> FoundData:
    """Find the annotations of a file or folder, their format, parts and image folders.

    Args:
        path: A folder that holds a data set somewhere below it, or a file of any format.
        images: Folders of the images; without any, all that hold images are candidates, the nearest first.

    Raises:
        DataError: there are none, several formats, or several files for one part, or a file that is damaged would be a
            part that nothing else is.
    """
    if not path.is_dir():
        found = format_of(path)
        if found is None or not path.exists():
            raise DataError(f"there is no file or folder {path}", hint="check the path", path=path)
        held, rest = _parts_of_file(path, found, path.parent, images)
        return FoundData(format=found, parts=held, left_out=rest)
    candidates, damaged = _candidates(path)
    if damaged and not candidates:
        raise _damaged(next(iter(damaged.items())))
    if not candidates and (kind := format_of(path)) is not None:
        candidates = [(kind, path)]
    if not candidates:
        raise DataError(
            f"{path} holds no annotations of a known format: {', '.join(get_args(Format))}",
            hint="name the folder of the export, with its .json, .xml, .txt, .yaml or .csv files",
            path=path,
        )
    formats = list(dict.fromkeys(found for found, _ in candidates))
    if len(formats) > 1:
        first = dict(reversed(candidates))
        listed = ", ".join(f"{found} ({first[found]})" for found in formats)
        commands = [f"proxydet data init {shlex.quote(str(place))}" for place in first.values()]
        hint = f"name the annotations that are meant: {', or '.join(dict.fromkeys(commands))}"
        if len(set(first.values())) < len(formats):
            hint = "move the files of all formats but one into another folder"
        raise DataError(
            f"{path} holds annotations of several formats: {listed}", hint=hint, path=path
        )
    by_part: dict[str, list[Path]] = {}
    for _, place in candidates:
        by_part.setdefault(_part_of(place, path), []).append(place)
    for place, why in damaged.items():
        if (word := _part_of(place, path)) not in ("", "test", *by_part):
            raise _damaged((place, why), word)
    named = {part: places for part, places in by_part.items() if part}
    chosen = named or by_part
    for part, places in chosen.items():
        if len(places) > 1:
            raise DataError(
                f"{path} holds several annotations{f' of {part}' if part else ''}: {first_of(places)}",
                hint=f"name one of them, such as: proxydet data init {shlex.quote(str(places[0]))}; or write a dataset "
                "config that names one for [train] and one for [val]",
                path=path,
            )
    left_out = [str(place) for place in by_part.get("", ())] if named else []
    parts: dict[str, AnnotationSource] = {}
    for part, (place,) in chosen.items():
        inner, rest = _parts_of_file(place, formats[0], path, images)
        left_out += rest
        for name, source in inner.items():
            word = name or part  # a file's own parts go before the word that its folder is called
            if word in parts:
                raise DataError(
                    f"{path} holds several annotations of {word}: {parts[word].path}, {place}",
                    hint=f"name one of them, such as: proxydet data init {shlex.quote(str(place))}",
                    path=path,
                )
            parts[word] = source
    ordered: dict[str, AnnotationSource] = {
        part: parts[part] for part in ("train", "val", "test", "") if part in parts
    }
    return FoundData(
        format=formats[0],
        parts=ordered,
        left_out=tuple(left_out),
        damaged=tuple(f"{place}: {why}" for place, why in damaged.items()),
    )


def _damaged(found: tuple[Path, str], part: str = "") -> DataError:
    place, why = found
    return DataError(
        f"cannot read {place}{f', which would be the part {part}' if part else ''}: {why}",
        hint="get the file again, or remove it",
        path=place,
    )


def holds_annotations(folder: Path) -> bool:
    """Whether a folder holds annotations of any format."""
    return any(_candidates(folder))


def _parts_of_file(
    path: Path, found: Format, root: Path, images: Sequence[Path]
) -> tuple[dict[str, AnnotationSource], tuple[str, ...]]:
    """Return the parts that one file or folder holds: one, or those that a data.yaml or a CVAT project names; and what else."""
    names: list[str] = []
    if path.suffix.lower() in yolo.YAML:
        places = yolo.parts(path)
        of_config: dict[str, AnnotationSource] = {}
        for name, listed in places.items():
            if listed not in [
                places[other] for other in of_config
            ]:  # one folder for both is no split
                roots = tuple(images) or _folders_of(listed)
                of_config[name] = AnnotationSource(path=path, part=name, images=roots)
        if not of_config:
            raise DataError(
                f"{path} names no images: its train, val and test are empty",
                hint="name the folder of each part's images in it, or name the data set's folder: proxydet data init FOLDER",
                path=path,
            )
        return of_config, ()
    if found == "CVAT XML":
        names = cvat.parts(path)
    roots = tuple(images) or image_folders(path) or _image_candidates(path, root)
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(part_of_word(name), []).append(name)
    others = by_word.pop("", [])
    if sum(map(bool, names)) < 2 or not by_word:
        return {"": AnnotationSource(path=path, images=roots)}, ()
    held = {
        word: AnnotationSource(
            path=path, images=roots, part=called[0] if len(called) == 1 else word
        )
        for word, called in by_word.items()
    }
    rest = (
        f"subset {name!r} of {path}" if name else f"what has no subset in {path}" for name in others
    )
    return held, tuple(rest)


def _folders_of(places: Sequence[Path]) -> tuple[Path, ...]:
    """Return the folders of images of a part of a data.yaml."""
    found = [
        folder
        for place in places
        for folder in (yolo.list_roots(place) if place.is_file() else [yolo.folders(place)[1]])
    ]
    return tuple(dict.fromkeys(found))


def _damage(path: Path) -> str:
    """Return why a file of annotations cannot be one, by its first bytes; empty where they do not say."""
    try:
        open_regular(path).close()
        head = head_of(path).lstrip(b"\xef\xbb\xbf \t\r\n")
        refuse_placeholder(head)
    except OSError as error:
        return str(error.strerror or error)
    except PlaceholderError as error:
        return error.what
    if not head:
        return "it is empty, or a damaged gzip file" if path.suffix == ".gz" else "it is empty"
    starts = {".xml": b"<", ".json": b"{[", ".gz": b"{["}.get(path.suffix.lower(), head[:1])
    return "" if head[:1] in (starts[:1], starts[1:]) else "it does not begin as such a file does"


def _candidates(root: Path) -> tuple[list[tuple[Format, Path]], dict[Path, str]]:
    """Return the files and folders below a folder that hold annotations, with their formats, sorted by their path.

    And the files that by their name may hold some and cannot, with the reason.
    """
    damaged: dict[Path, str] = {}
    configs: list[Path] = []
    rows: dict[Path, None] = {}
    shapes: dict[Path, None] = {}
    found: dict[tuple[Format, Path], None] = {}
    for count, (place, folders, names) in enumerate(os.walk(root)):
        folder = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        if len(folder.relative_to(root).parts) >= _DEEPEST or count > _MOST_FOLDERS:
            folders[:] = []
        visible = sorted(name for name in names if not name.startswith("."))
        by_end: dict[str, list[Path]] = {}
        for name in visible:
            by_end.setdefault(Path(name).suffix.lower(), []).append(folder / name)
        configs += [p for end in yolo.YAML for p in by_end.get(end, ()) if yolo.is_config(p)]
        jsons = [
            *by_end.get(".json", ())[:_SNIFFED],
            *[file for file in by_end.get(".gz", ()) if file.name.lower().endswith(".json.gz")],
        ]
        lists = [folder / f"{word}.txt" for word in ("train", "val", "test")]
        of_voc = lists if folder.parts[-2:] == ("ImageSets", "Main") else []
        for file in (
            *by_end.get(".xml", ())[:_SNIFFED],
            *jsons,
            *by_end.get(".csv", ())[:_SNIFFED],
            *[file for file in of_voc if file.name in names],
        ):
            if why := _damage(file):
                damaged[file] = why
        for file in by_end.get(".xml", ())[:_SNIFFED]:
            kind = format_of(file)
            if kind == "CVAT XML":
                found[kind, file] = None
            elif kind is not None and voc.is_file(file):
                for part in _voc_places(folder):
                    found["Pascal VOC", part] = None
                break
        for file in [*by_end.get(".json", ())[:_SNIFFED], *by_end.get(".gz", ())[:_SNIFFED]]:
            kind = format_of(file)
            if kind == "labelme":
                shapes[_group(folder, root) or folder] = None
            elif kind == "COCO JSON":
                if coco.is_file(head_of(file)):
                    found[kind, file] = None
            elif kind is not None:
                found[kind, file] = None
        for file in by_end.get(".csv", ())[:_SNIFFED]:
            if format_of(file) == "VGG VIA":
                found["VGG VIA", file] = None
        if any(map(yolo.are_rows, by_end.get(".txt", ())[:_SNIFFED])):
            rows[_group(folder, root) or folder] = None
    if shapes:  # without parts those of all folders belong together
        split = [place for place in shapes if part_of_word(place.name) and place != root]
        whole = [Path(os.path.commonpath(shapes))]
        found |= {("labelme", place): None for place in (split or whole)}
    found |= {("YOLO", place): None for place in (configs[:1] or rows)}
    instances = [place for _, place in found if place.name.startswith("instances")]
    whole = [place for kind, place in found if kind in ("labelme", "Pascal VOC")]
    kept = {  # what their readers read, they refuse
        file: why
        for file, why in damaged.items()
        if not any(file.is_relative_to(place) for place in whole)
    }
    return sorted(
        (kind, place)
        for kind, place in found
        if not (instances and kind == "COCO JSON" and place.name.startswith(_OTHER_TASKS))
    ), kept


def _group(folder: Path, root: Path) -> Path | None:
    """Return the folder at or above one that a word for a part names, so that those below it belong together."""
    inner = [folder, *folder.parents]
    inner = inner[: inner.index(root)]
    return next((place for place in inner if part_of_word(place.name)), None)


def _voc_places(folder: Path) -> list[Path]:
    """Return the lists of images of a Pascal VOC data set, or the folder of XML files where it has no two of them."""
    lists = folder.parent / "ImageSets" / "Main"
    names = [lists / f"{word}.txt" for word in ("train", "val", "test")]
    there = [path for path in names if path.is_file() and path.stat().st_size]
    return there if len(there) > 1 and folder.name == "Annotations" else [folder]


def _part_of(place: Path, root: Path) -> str:
    """Return which part of a data set the name of a file or folder says, the innermost word first; empty for none."""
    for name in reversed(place.relative_to(root).parts):
        for word in re.split(r"[^a-z]+", name.lower()):
            if part := part_of_word(word):
                return part
    return ""


def _image_candidates(path: Path, root: Path) -> tuple[Path, ...]:
    """Return the folders in which the images of an annotation file may be: its own first, then the nearest that hold images."""
    own = path if path.is_dir() else path.parent
    part = _part_of(path, root) if path.is_relative_to(root) else ""
    holding: list[Path] = []
    ends = tuple(readable_suffixes())
    for count, (place, folders, names) in enumerate(os.walk(root)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if count > _MOST_FOLDERS or len(holding) >= _MOST_ROOTS:
            break
        if any(name.lower().endswith(ends) for name in names):
            holding.append(Path(place))

    def order(folder: Path) -> tuple[bool, int, str]:
        apart = len(Path(os.path.relpath(folder, own)).parts)
        return _part_of(folder, root) not in ("", part), apart, str(folder)

    return tuple(dict.fromkeys([*_near(path), *sorted(holding, key=order)]))
