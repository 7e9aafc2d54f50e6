"""Reading and writing YOLO: one text file an image, one object a line, numbers as fractions of the image.

A row is ``class cx cy w h``, or ``class x1 y1 x2 y2 x3 y3 ...``, the outline of an object. Layouts: Ultralytics
(``images/train``, ``labels/train``), Roboflow (``train/images``, ``train/labels``), Darknet and CVAT (labels next to images, and
lists of images). Names of the classes are in ``data.yaml``, ``classes.txt`` or ``obj.names``.
"""

from __future__ import annotations

import io
import itertools
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from proxydet.config import parse_yaml
from proxydet.data.formats.collected import Objects, number, scaled
from proxydet.data.images import (
    MOST_FILES,
    files_below,
    found_image,
    images_below,
    readable_suffixes,
    sizes_of,
)
from proxydet.data.records import MOST_CATEGORIES, AnnotationSource, Document, StoreReport, refused
from proxydet.errors import ConfigError, DataError
from proxydet.files import open_regular, read_errors, read_text
from proxydet.wording import first_of, json_text

YAML = (".yaml", ".yml")
NAMES_FILES = ("classes.txt", "obj.names", "_darknet.labels")
_LARGEST_FILE = 8 << 20
"""Bytes of the rows of one image: room for a hundred thousand boxes."""
_LARGEST_YAML = 2 << 20
_LARGEST_LIST = 256 << 20
_FOLDERS_ABOVE = 4
_MOST_BEYOND = 0.5
"""Share of rows with numbers above 1 from which a data set holds pixels."""
_BEYOND = 1.5
_HINT = (
    "YOLO has one .txt file an image in labels/ (next to images/), with rows 'class cx cy w h' or outlines, as fractions "
    "of the image"
)


def is_list(source: Path) -> bool:
    """Whether a text file lists images, as YOLO's train.txt does."""
    try:
        with io.TextIOWrapper(open_regular(source), encoding="utf-8", errors="replace") as file:
            line = next((line.strip() for line in file if line.strip()), "")
    except OSError:
        return False
    return PurePosixPath(line.replace("\\", "/")).suffix.lower() in readable_suffixes()


def are_rows(path: Path) -> bool:
    """Whether a text file begins with a row of YOLO."""
    try:
        with open_regular(path) as file:
            words = file.read(4096).split(b"\n", 1)[0].split()
    except OSError:
        return False
    return (
        len(words) >= 5
        and words[0].isdigit()
        and all(number(word.decode("utf-8", "replace")) is not None for word in words[:5])
    )


def _content(path: Path) -> dict[str, Any]:
    """Return what a YAML file holds, nothing where it is not a mapping; of a damaged ``data.yaml`` what makes its reader refuse it."""
    try:
        content = parse_yaml(read_text(path, limit=_LARGEST_YAML), str(path), path)
    except (OSError, ValueError, ConfigError):
        content = (
            {"names": (), "train": "."} if path.name in ("data.yaml", "dataset.yaml") else None
        )
    return content if isinstance(content, dict) else {}


def is_config(path: Path) -> bool:
    """Whether a YAML file is a ``data.yaml``: it names classes and parts."""
    content = _content(path)
    return "names" in content and bool(content.get("train") or content.get("val"))


def is_folder(folder: Path) -> bool:
    """Whether a folder holds rows: files that begin with one, or any text files in a folder called ``labels``."""
    rows = folders(folder)[0]
    found = label_files(rows)[:20] if any(rows.glob("**/*.txt")) else []
    return any(map(are_rows, found)) or (bool(found) and "labels" in rows.parts[-3:])


def label_files(folder: Path) -> list[Path]:
    """Return the files of rows below a folder, those with names of classes and lists of images left out."""
    other = ("train.txt", "val.txt", "valid.txt", "test.txt", "notes.txt", *NAMES_FILES)
    found = files_below(folder, (".txt",))
    return [
        path
        for path in found
        if path.name.lower() not in other and not path.name.lower().startswith("readme")
    ]


def folders(source: Path) -> tuple[Path, Path]:
    """Return the folder of the rows and the folder of the images that a folder means, by YOLO's rules."""
    if (source / "labels").is_dir():
        images = source / "images"
        return source / "labels", images if images.is_dir() else source
    for one, other in (("labels", "images"), ("images", "labels")):
        parts = list(source.absolute().parts)
        if one in parts:
            place = len(parts) - 1 - parts[::-1].index(one)
            twin = Path(*parts[:place], other, *parts[place + 1 :])
            if twin.is_dir():
                return (source, twin) if one == "labels" else (twin, source)
    if (source / "obj_train_data").is_dir():
        return source / "obj_train_data", source / "obj_train_data"
    return source, source


def names_file(source: Path) -> Path | None:
    """Return the file with the class names of rows: in their folder, or in one of the nearest above it; None without one.

    Raises:
        DataError: several configs lie there, and which one belongs to the rows is not known.
    """
    if source.suffix.lower() in YAML:
        return source
    start = source.absolute()
    start = start if start.is_dir() else start.parent
    above = [start, *start.parents[:_FOLDERS_ABOVE]]
    for folder in above:
        there = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
        configs = [path for path in there if "names" in _content(path)]
        if len(configs) > 1:
            configs = [path for path in configs if _names_place(path, start)] or configs
        if len(configs) > 1:
            raise DataError(
                f"{source}: which of {first_of(configs)} has its class names is not known",
                hint="name the data.yaml itself: proxydet data init DATA.yaml",
                path=source,
            )
        if configs:
            return configs[0]
        for name in NAMES_FILES:
            if (folder / name).is_file():
                return folder / name
    return None


def _names_place(config: Path, place: Path) -> bool:
    """Whether a part of a ``data.yaml`` is a folder, of rows or of its images."""
    try:
        listed = [image for images in parts(config).values() for image in images]
    except DataError:
        return False
    both = {path.absolute() for image in listed for path in (image, *folders(image))}
    return any(path == place or path.is_relative_to(place) for path in both)


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a ``data.yaml``.

    Raises:
        DataError: it cannot be read, or is not one.
    """
    with read_errors(path, error=DataError, hint="correct the file, or write it again"):
        text = read_text(path, limit=_LARGEST_YAML)
    try:
        content = parse_yaml(text, str(path), path)
    except ConfigError as error:
        raise DataError(error.message, hint="correct that line", path=path) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is not the data.yaml of a YOLO data set", hint="it needs 'names'", path=path
        )
    return content


def _class_names(path: Path, content: dict[str, Any] | None) -> dict[int, str]:
    """Return the class names of a data set by their number; ``content``: what the file holds where it is a ``data.yaml``."""
    names: dict[int, str] = {}
    if content is None:
        with read_errors(path, error=DataError, hint="write one class name a line"):
            lines = read_text(path, limit=_LARGEST_YAML).rstrip().splitlines()
        names = {index: line.strip() for index, line in enumerate(lines)}
    else:
        listed = content.get("names")
        items = enumerate(listed if isinstance(listed, list) else ())
        for key, value in listed.items() if isinstance(listed, dict) else items:
            index = int(key) if str(key).isdecimal() and len(str(key)) < 10 else None
            if index is None or isinstance(value, list | dict) or value is None:
                what = f"{path}: names: {reprlib.repr(key)}: {reprlib.repr(value)} is not a class name by its number"
                hint = "write names as a list, or as numbers with names: {0: cat, 1: dog}"
                raise DataError(what, hint=hint, path=path)
            if index >= MOST_CATEGORIES:
                what = f"{path}: names: {index}: a data set has at most {MOST_CATEGORIES:,} classes"
                raise DataError(what, hint="number the classes from 0, without gaps", path=path)
            names[index] = str(value).strip()
    if not names or not all(names.values()):
        empty = [index for index, name in names.items() if not name]
        why = f"class {empty[0]} has no name" if empty else "it holds no class names"
        raise DataError(
            f"{path}: {why}", hint="name every class, in the order of the numbers", path=path
        )
    first: dict[str, int] = {}
    for index, name in names.items():
        if first.setdefault(name, index) != index:
            twice = f"{name!r}, by {first[name]} and {index}"
            raise refused("category.name.repeated", path, str(path), [twice])
    return names


class Pair(NamedTuple):
    """An image and the file of its rows.

    Attributes:
        name: What the image is called, as `proxydet.data.images.find_image` takes it.
        image: The image; None where it is absent.
        rows: Where its rows are, or would be.
    """

    name: str
    image: Path | None
    rows: Path


def pairs(
    source: Path, roots: Sequence[Path] = (), part: str | None = None
) -> tuple[list[Pair], list[Path]]:
    """Return the images that a source means with their files of rows, and files of rows without an image.

    Args:
        source: A ``data.yaml``, a folder of rows, the folder above it, a folder of images, or a list of images.
        roots: Folders of the images; without any, by YOLO's rules.
        part: Of a ``data.yaml``: ``train``, ``val`` or ``test``; None means all of them.

    Raises:
        DataError: a list or a ``data.yaml`` cannot be read or names what is absent, or a folder holds too many files.
    """
    found: list[Pair] = []
    if source.suffix.lower() in YAML:
        lone: list[Path] = []
        of_part = (places for name, places in parts(source).items() if part in (None, name))
        for place in itertools.chain.from_iterable(of_part):
            if place.is_file():
                more, alone = pairs(place, roots)
            else:
                rows, images = folders(place)
                above = next((root for root in roots if images.is_relative_to(root)), images)
                more = list(_below(images, rows, above))
                alone = _lone(rows, more)
            found += more
            lone += alone
        return found, lone
    if source.is_dir():
        rows, images = folders(source)
        for root in roots or (images,):
            found += _below(root, rows, root)
        return found, _lone(rows, found)
    roots = tuple(roots) or list_roots(source)
    with read_errors(source, error=DataError, hint=_HINT):
        text = read_text(source, limit=_LARGEST_LIST)
    for line in text.splitlines():
        name = line.strip().removeprefix("./")
        if not name:
            continue
        image = found_image(name, roots)
        if image is None:
            found.append(Pair(name, None, source.parent / "absent"))
            continue
        twin = folders(image.parent)[0] / image.with_suffix(".txt").name
        found.append(Pair(name, image, twin if twin.is_file() else image.with_suffix(".txt")))
        if len(found) > MOST_FILES:
            raise DataError(
                f"{source} lists more than {MOST_FILES:,} images", hint="split it", path=source
            )
    return found, []


def _below(images: Path, rows: Path, root: Path) -> Iterator[Pair]:
    for image in images_below(images):
        label = rows / image.relative_to(images).with_suffix(".txt")
        yield Pair(image.relative_to(root).as_posix(), image, label)


def _lone(rows: Path, found: Iterable[Pair]) -> list[Path]:
    taken = {pair.rows for pair in found}
    return [path for path in label_files(rows) if path not in taken]


def parts(config: Path) -> dict[str, list[Path]]:
    """Return the folders of images, or lists of images, of each part that a ``data.yaml`` names: ``train``, ``val``, ``test``.

    Raises:
        DataError: it cannot be read, or names what is absent.
    """
    content = read_config(config)
    above = config.parent
    bases = [above / str(content.get("path") or ""), above]
    found: dict[str, list[Path]] = {}
    for key, name in (("train", "train"), ("val", "val"), ("valid", "val"), ("test", "test")):
        listed = content.get(key)
        for value in listed if isinstance(listed, list) else [listed]:
            if value in (None, "", [], {}) or (name in found and key == "valid"):
                continue
            text = str(value).replace("\\", "/")
            # Roboflow's paths are one folder too high.
            spelt = [text, text.removeprefix("../")]
            tried = [Path(os.path.normpath(base / text)) for base in bases for text in spelt]
            place = next((path for path in tried if os.path.exists(path)), None)  # noqa: PTH110 - false, no error, for a name too long
            if place is not None and place.resolve() == Path(place.resolve().anchor):
                raise DataError(
                    f"{config}: {key}: {text} is {place}, the whole file system",
                    hint="name the folder of the part's images",
                    path=config,
                )
            if place is None:
                if name == "test":  # named by many configs that do without it
                    continue
                raise DataError(
                    f"{config}: {key}: {text} is not there; looked for {first_of(list(dict.fromkeys(tried)))}",
                    hint="correct 'path' or the part's folder in it, or name the data set's folder instead",
                    path=config,
                )
            found.setdefault(name, []).append(place)
    return found


def list_roots(source: Path) -> tuple[Path, ...]:
    """Return the folders in which the images of a list are looked for."""
    beside = (source.parent, *(source.parent / name for name in ("obj_train_data", "images")))
    return tuple(folder for folder in beside if folder.is_dir())


def files(source: AnnotationSource) -> tuple[list[Path], list[tuple[str, Path]]]:
    """Return the files that the annotations are read from, and the images, whose sizes belong to them, with their names."""
    found, lone = pairs(source.annotations, source.roots, source.part)
    named = names_file(source.annotations)
    read = [
        *([named] if named else []),
        *([] if source.annotations.is_dir() else [source.annotations]),
    ]
    rows = [pair.rows for pair in found if pair.image and pair.rows.is_file()]
    return [*read, *rows, *lone], [(pair.name, pair.image) for pair in found if pair.image]


def read(source: AnnotationSource, report: StoreReport) -> Document:
    """Read the rows of a data set.

    Raises:
        DataError: there is no class name, most numbers are pixels, or a file cannot be read.
    """
    path = source.annotations
    named = names_file(path)
    if named is None:
        folder = path if path.is_dir() else path.parent
        raise DataError(
            f"{path}: there is no data.yaml, classes.txt or obj.names with the class names",
            hint=f"write {folder / 'classes.txt'}: one class name a line, in the order of the numbers",
            path=path,
        )
    content = read_config(named) if named.suffix.lower() in YAML else None
    names, classes = _class_names(named, content), (content or {}).get("nc")
    if classes is not None and classes not in (len(names), max(names) + 1):
        report.count("file.nc", [f"nc: {str(classes)[:20]} and {len(names)} names"])
    keypoints = "kpt_shape" in (content or {})
    listed, lone = pairs(path, source.roots, source.part)
    found = Objects()
    unlabelled: list[str] = []
    beyond = count = 0
    sizes = sizes_of([pair.image for pair in listed])
    absent = [Pair(path.stem, None, path) for path in lone]
    for pair, size in zip(
        [*listed, *absent], itertools.chain(sizes, [None] * len(absent)), strict=True
    ):
        found.image(pair.name, size, "image.file")
        found.begin(pair.rows.name)
        if not pair.rows.is_file():
            unlabelled += [pair.name] if size else []
            continue
        with read_errors(pair.rows, error=DataError, hint=_HINT):
            lines = read_text(pair.rows, limit=_LARGEST_FILE).splitlines()
        for line in lines:
            values = [number(word) for word in line.split()]
            if not values:
                continue
            if keypoints:
                values = values[:5]
            elif len(values) % 2 == 0 and len(values) >= 6:  # a confidence at the end
                values = values[:-1]
            whole = [value for value in values if value is not None]
            if len(whole) < max(len(values), 5) or whole[0] != int(whole[0]):
                found.drop("annotation.row")
                continue
            label, xy = names.get(int(whole[0])), whole[1:]
            if label is None:
                found.drop("annotation.row.class")
                continue
            count += 1
            beyond += max(xy) > _BEYOND
            if len(xy) == 4:
                cx, cy, w, h = scaled(xy, size or (1, 1))
                found.add(pair.name, label, box=(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
            else:
                found.add(pair.name, label, polygons=[scaled(xy, size or (1, 1))])
    if count and beyond > _MOST_BEYOND * count:
        raise refused("file.convention.pixels", path, str(path), [f"{beyond} of {count} rows"])
    report.count("image.unlabelled", unlabelled)
    declared = [names.get(index, f"class {index}") for index in range(max(names) + 1)]
    return found.document("YOLO", "row", declared, first_id=0)


def row(
    class_id: int, box: Sequence[float], outlines: Iterable[Sequence[float]], size: tuple[int, int]
) -> str:
    """Return an object as a row: its largest outline where it has one (YOLO has one an object), else its box.

    Args:
        class_id: Number of its class.
        box: Left, top, right, bottom in pixels.
        outlines: x, y, x, y, ... in pixels, the largest first.
        size: Height and width of the image.
    """
    height, width = size
    left, top, right, bottom = box
    center = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    values = next(iter(outlines), center)
    fractions = (value / (height if i % 2 else width) for i, value in enumerate(values))
    return " ".join([str(class_id), *(f"{min(max(value, 0), 1):.6f}" for value in fractions)])


def config(names: Sequence[str]) -> str:
    """Return the ``data.yaml`` of a data set whose images are all in one folder."""
    lines = [f"  {index}: {json_text(name)}" for index, name in enumerate(names)]
    return "\n".join(["path: .", "train: images", "val: images", "names:", *lines, ""])
