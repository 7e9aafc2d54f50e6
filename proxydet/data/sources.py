"""The data set that a path means: a dataset config, or the annotations found below a folder, their parts and image folders."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import get_args

from proxydet.data.dataset import DatasetConfig, names_annotations
from proxydet.data.formats import cvat, voc, yolo
from proxydet.data.formats.collected import part_of_word
from proxydet.data.images import readable_suffixes
from proxydet.data.records import AnnotationSource, Format
from proxydet.data.store import SNIFFED, format_of, head_of, near, recognise
from proxydet.errors import DataError
from proxydet.files import PlaceholderError, open_regular, refuse_placeholder, walk
from proxydet.wording import first_of

_OTHER_TASKS = ("captions", "person_keypoints", "image_info", "panoptic", "stuff")
"""Beginnings of COCO's annotation files that hold no objects to detect."""
_MOST_ROOTS = 64
"""Folders in which the images of a file are looked for, the nearest."""
_KINDS: dict[str, tuple[Format, ...]] = {
    ".xml": ("Pascal VOC", "CVAT XML"),
    ".json": ("labelme", "VGG VIA", "Label Studio JSON", "COCO JSON"),
    ".gz": ("COCO JSON",),
    ".csv": ("VGG VIA",),
}
"""What files of each ending may be."""
_DEEPEST = 6
_MOST_FOLDERS = 20_000


@dataclass(frozen=True, kw_only=True)
class FoundData:
    """The annotations that a path holds.

    Attributes:
        format: Their format.
        parts: What belongs to ``train``, ``val`` and ``test``, or to ``""`` where nothing is split.
        left_out: Annotations that belong to no part while others do: files, folders, subsets of a CVAT project.
        damaged: Files that cannot be annotations, by their first bytes, each with the reason.
        unsearched: What was not searched, because there is too much of it.
    """

    format: Format
    parts: dict[str, AnnotationSource]
    left_out: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    unsearched: tuple[str, ...] = ()


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
        unsearched: dict[str, None] = {}
        held, rest = _parts_of_file(path, found, path.parent, images, unsearched)
        return FoundData(format=found, parts=held, left_out=rest, unsearched=tuple(unsearched))
    candidates, damaged, unsearched = _candidates(path)
    if damaged and not candidates:
        raise _damaged(next(iter(damaged.items())))
    if not candidates and (kind := format_of(path)) is not None:
        candidates = [(kind, path)]
    if not candidates:
        more = f"; not searched: {first_of(list(unsearched))}" if unsearched else ""
        raise DataError(
            f"{path} holds no annotations of a known format: {', '.join(get_args(Format))}{more}",
            hint="name the folder of the export, with its .json, .xml, .txt, .yaml or .csv files",
            path=path,
        )
    formats = list(dict.fromkeys(found for found, _ in candidates))
    if len(formats) > 1:
        first = dict(reversed(candidates))
        listed = ", ".join(f"{found} ({first[found]})" for found in formats)
        # The folder itself, and one that holds two formats, would be refused again.
        times = Counter(first.values())
        places = [place for place in times if times[place] == 1 and place != path]
        commands = [f"proxydet data init {shlex.quote(str(place))}" for place in places]
        hints = [f"name the annotations that are meant: {', or '.join(commands)}"] * bool(commands)
        if len(places) < len(formats):
            hints.append("move the files of all formats but one into another folder")
        what = f"{path} holds annotations of several formats: {listed}"
        raise DataError(what, hint="; or ".join(hints), path=path)

    def several(part: str, places: Sequence[Path]) -> DataError:
        return DataError(
            f"{path} holds several annotations{f' of {part}' if part else ''}: {first_of(places)}",
            hint=f"name one of them, such as: proxydet data init {shlex.quote(str(places[0]))}; or write a dataset config "
            "that names one for [train] and one for [val]",
            path=path,
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
            raise several(part, places)
    left_out = [str(place) for place in by_part.get("", ())] if named else []
    parts: dict[str, AnnotationSource] = {}
    for part, (place,) in chosen.items():
        inner, others = _parts_of_file(place, formats[0], path, images, unsearched)
        left_out += others
        for name, source in inner.items():
            word = name or part  # a file's own parts go before the word that its folder is called
            if word in parts:
                raise several(word, [parts[word].annotations, place])
            parts[word] = source
    return FoundData(
        format=formats[0],
        parts={part: parts[part] for part in ("train", "val", "test", "") if part in parts},
        left_out=tuple(left_out),
        damaged=tuple(f"{place}: {why}" for place, why in damaged.items()),
        unsearched=tuple(unsearched),
    )


def open_config(path: Path | str, images: Sequence[Path] = ()) -> DatasetConfig:
    """Read a dataset config, or take annotations alone as a data set without embeddings.

    Args:
        path: A TOML file, or what `AnnotationStore.open` takes.
        images: Folders of the images, where ``path`` is not a dataset config; by default those that `look` finds.

    Raises:
        DataError: as of `DatasetConfig.from_toml`, and of `look`.
    """
    path = Path(path)
    if not names_annotations(path):
        return DatasetConfig.from_toml(path)
    found = look(path, images).parts if path.exists() else {}
    splits = {name or "train": source for name, source in found.items()}
    # What is absent is reported where it is opened.
    absent = AnnotationSource(annotations=path, images=tuple(images) or path.parent)
    return DatasetConfig(
        name=path.stem,
        train=splits.get("train") if splits else absent,
        val=splits.get("val"),
        test=splits.get("test"),
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
    found, damaged, _ = _candidates(folder)
    return bool(found or damaged)


def _image_folders(path: Path, found: Format) -> tuple[Path, ...]:
    """Return the folders in which a format has its images; none where it has no rule for it."""
    if found == "YOLO":
        return (yolo.folders(path)[1],) if path.is_dir() else yolo.list_roots(path)
    if found == "Pascal VOC":
        folder = voc.image_folder(path)
        return () if folder is None else (folder,)
    return (path,) if path.is_dir() else ()


def _parts_of_file(
    path: Path, found: Format, root: Path, images: Sequence[Path], unsearched: dict[str, None]
) -> tuple[dict[str, AnnotationSource], tuple[str, ...]]:
    """Return the parts that one file or folder holds: one, or those that a data.yaml or a CVAT project names; and what else."""
    if path.suffix.lower() in yolo.YAML:
        places = yolo.parts(path)
        of_config: dict[str, AnnotationSource] = {}
        for name, listed in places.items():
            # One folder for two parts is not a split.
            if all(listed != places[other] for other in of_config):
                used = (folder for place in listed for folder in _image_folders(place, found))
                roots = tuple(images) or tuple(dict.fromkeys(used))
                of_config[name] = AnnotationSource(
                    annotations=path, part=name, images=roots, format=found
                )
        if not of_config:
            raise DataError(
                f"{path} names no images: its train, val and test are empty",
                hint="name the folder of each part's images in it, or name the data set's folder: proxydet data init FOLDER",
                path=path,
            )
        return of_config, ()

    def source(word: str, part: str | None = None) -> AnnotationSource:
        own = tuple(images) or _image_folders(path, found)
        folders = own or _image_candidates(path, root, word, unsearched)
        return AnnotationSource(annotations=path, images=folders, part=part, format=found)

    names = cvat.parts(path) if found == "CVAT XML" else []
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(part_of_word(name), []).append(name)
    others = by_word.pop("", [])
    if sum(map(bool, names)) < 2 or not by_word:
        part = _part_of(path, root) if path.is_relative_to(root) else ""
        return {"": source(part)}, ()
    held = {w: source(w, called[0] if len(called) == 1 else w) for w, called in by_word.items()}
    rest = (f"subset {name!r} of" if name else "what has no subset in" for name in others)
    return held, tuple(f"{what} {path}" for what in rest)


def _damage(path: Path, head: bytes) -> str:
    """Return why a file of annotations cannot be one, by its first bytes (`head_of`); empty where they do not say."""
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    try:
        if not head:
            open_regular(path).close()
        refuse_placeholder(head)
    except OSError as error:
        return str(error.strerror or error)
    except PlaceholderError as error:
        return error.what
    if not head:
        return "it is empty, or a damaged gzip file" if path.suffix == ".gz" else "it is empty"
    starts = {".xml": b"<", ".json": b"{[", ".gz": b"{["}.get(path.suffix.lower(), head[:1])
    return "" if head[:1] in (starts[:1], starts[1:]) else "it does not begin as such a file does"


def _candidates(root: Path) -> tuple[list[tuple[Format, Path]], dict[Path, str], dict[str, None]]:
    """Return the files and folders below a folder that hold annotations, with their formats, sorted by their path.

    And the files that by their name may hold some and cannot, with the reason; and what was not searched.
    """
    unsearched: dict[str, None] = {}
    damaged: dict[Path, str] = {}
    configs: list[Path] = []
    rows: dict[Path, None] = {}
    shapes: dict[Path, None] = {}
    found: dict[tuple[Format, Path], None] = {}
    for count, (folder, folders, names) in enumerate(walk(root)):
        folders[:] = [name for name in folders if not name.startswith("__MACOSX")]
        if folders and len(folder.relative_to(root).parts) >= _DEEPEST:
            unsearched[f"folders more than {_DEEPEST} deep, such as {folder / folders[0]}"] = None
            folders[:] = []
        elif count > _MOST_FOLDERS:
            unsearched[f"folders after the first {_MOST_FOLDERS:,}"] = None
            break
        by_end: dict[str, list[Path]] = {}
        for name in names:
            by_end.setdefault(Path(name).suffix.lower(), []).append(folder / name)
        configs += [p for end in yolo.YAML for p in by_end.get(end, ()) if yolo.is_config(p)]
        if folder.parts[-2:] == ("ImageSets", "Main"):
            lists = [folder / f"{w}.txt" for w in ("train", "val", "test") if f"{w}.txt" in names]
            damaged |= {file: why for file in lists if (why := _damage(file, head_of(file)))}
        for end, kinds in _KINDS.items():
            seen: set[Format | None] = set()
            for file in by_end.get(end, ())[:SNIFFED]:
                head = head_of(file)
                if (end != ".gz" or file.stem.endswith(".json")) and (why := _damage(file, head)):
                    damaged[file] = why
                kind = recognise(head)
                seen.add(kind)
                if kind is None or kind not in kinds:
                    continue
                if kind == "labelme":
                    shapes[_group(folder, root) or folder] = None
                elif kind == "Pascal VOC":
                    found |= {(kind, part): None for part in _voc_places(folder)}
                else:
                    found[kind, file] = None
            count_of_end = len(by_end.get(end, ()))
            if count_of_end > SNIFFED and not seen & {"labelme", "Pascal VOC"}:
                others = f"{count_of_end - SNIFFED} of the {count_of_end} {end} files in {folder}"
                unsearched[others] = None
        texts = by_end.get(".txt", ())
        written = (file for file in texts if file.is_file() and file.stat().st_size)
        if any(map(yolo.are_rows, islice(written, SNIFFED))):
            rows[_group(folder, root) or folder] = None
    if shapes:  # without parts those of all folders belong together
        split = [place for place in shapes if part_of_word(place.name) and place != root]
        whole = [Path(os.path.commonpath(shapes))]
        found |= {("labelme", place): None for place in (split or whole)}
    found |= {("YOLO", place): None for place in (configs[:1] or rows)}
    whole = [place for kind, place in found if kind in ("labelme", "Pascal VOC")]
    # What their readers read, they refuse.
    kept = {f: why for f, why in damaged.items() if not any(map(f.is_relative_to, whole))}
    if any(place.name.startswith("instances") for _, place in found):
        other = [key for key in found if key[1].name.startswith(_OTHER_TASKS)]
        found = {key: None for key in found if key[0] != "COCO JSON" or key not in other}
    return sorted(found), kept, unsearched


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


def _image_candidates(
    path: Path, root: Path, part: str, unsearched: dict[str, None]
) -> tuple[Path, ...]:
    """Return the folders in which the images of a part may be: the annotation file's first, then the nearest that hold images.

    Folders of another part are left out, since an image there may have the name of a missing one. Those above them are
    the last: names may include the folder.
    """
    own = path if path.is_dir() else path.parent
    ends = tuple(readable_suffixes())
    holding = [
        folder
        for folder, _, names in islice(walk(root), _MOST_FOLDERS)
        if any(name.lower().endswith(ends) for name in names)
    ]

    def of_another(folder: Path) -> bool:
        return _part_of(Path(os.path.relpath(folder, own)), Path()) not in ("", part)

    def order(folder: Path) -> tuple[bool, int, str]:
        return of_another(folder), len(Path(os.path.relpath(folder, own)).parts), str(folder)

    above: list[Path] = []
    if part:
        above = [folder.parent for folder in holding if of_another(folder)]
        above = [folder for folder in dict.fromkeys(above) if not of_another(folder)]
        holding = [folder for folder in holding if not of_another(folder)]
    if (over := len(holding) - _MOST_ROOTS) > 0:
        unsearched[f"{over} of the {len(holding)} folders of images below {root}"] = None
    return tuple(dict.fromkeys([*near(path), *sorted(holding, key=order)[:_MOST_ROOTS], *above]))
