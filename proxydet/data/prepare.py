"""The steps of ``proxydet data prepare``: what a data set needs between its downloaded files and training.

Each is done only where its result is absent or older than its source.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from proxydet.data.dataset import DatasetConfig, how_to_get, inner_root, load_vocabulary, open_split
from proxydet.data.formats.coco import Outline, read_outline
from proxydet.data.image_labels import match_tars
from proxydet.data.images import image_size
from proxydet.data.store import AnnotationStore
from proxydet.data.tars import TarIndex
from proxydet.errors import DataError
from proxydet.files import staged, write_bytes, write_errors, write_text
from proxydet.reporting import SILENT, Progress
from proxydet.wording import counted

SEEN = tuple(
    """person; bicycle; car; motorcycle; train; truck; boat; bench; bird; horse; sheep; bear; zebra; giraffe;
    backpack; handbag; suitcase; frisbee; skis; kite; surfboard; bottle; fork; spoon; bowl; banana; apple; sandwich;
    orange; broccoli; carrot; pizza; donut; chair; bed; toilet; tv; laptop; mouse; remote; microwave; oven; toaster;
    refrigerator; book; clock; vase; toothbrush""".replace("\n    ", " ").split("; ")
)
"""The 48 training classes of COCO's zero-shot split, that of Bansal et al. (ECCV 2018)."""

UNSEEN = tuple(
    """airplane; bus; cat; dog; cow; elephant; umbrella; tie; snowboard; skateboard; cup; knife; cake; couch; keyboard;
    sink; scissors""".replace("\n    ", " ").split("; ")
)
"""Its 17 novel classes. The other 15 of COCO are not used."""

T = TypeVar("T")


class _Owners(msgspec.Struct, frozen=True):
    image_id: int
    category_id: int


class _Image(msgspec.Struct, frozen=True):
    id: int


class _Category(msgspec.Struct, frozen=True):
    id: int
    name: str
    frequency: str | None = None


def write_without_rare(source: Path, target: Path) -> int:
    """Write a copy of an LVIS file without the annotations of rare categories; images and categories stay.

    Args:
        source: LVIS annotations, such as ``lvis_v1_train.json``.
        target: The copy, such as ``lvis_v1_train_norare.json``.

    Returns:
        How many annotations were left out.

    Raises:
        DataError: the file cannot be read, or its categories have no frequency.
    """
    outline = read_outline(source)
    rare = {c.id for _, c in _lvis_categories(outline, source) if c.frequency == "r"}
    annotations = _decoded(outline.annotations, _Owners, "annotation", source)
    kept = [raw for raw, owners in annotations if owners.category_id not in rare]
    _write(target, outline.images, kept, outline.categories)
    return len(outline.annotations) - len(kept)


def write_category_info(source: Path, target: Path, *, with_rare: bool) -> None:
    """Write the categories of an LVIS file with their counts, as the published ``lvis_v1_train_cat_info.json``.

    Args:
        source: LVIS annotations.
        target: A JSON list of the categories with ``image_count`` and ``instance_count``.
        with_rare: False counts 0 for rare categories. The published file counts them, which tells the federated loss how
            frequent categories are that training is not supposed to know.

    Raises:
        DataError: the file cannot be read, or its categories have no frequency.
    """
    outline = read_outline(source)
    categories = _lvis_categories(outline, source)
    pairs: set[tuple[int, int]] = set()
    instances: Counter[int] = Counter()
    for _, owners in _decoded(outline.annotations, _Owners, "annotation", source):
        pairs.add((owners.image_id, owners.category_id))
        instances[owners.category_id] += 1
    images = Counter(category for _, category in pairs)
    rows = []
    for raw, category in sorted(categories, key=lambda entry: entry[1].id):
        counted = with_rare or category.frequency != "r"
        counts = {
            "image_count": images[category.id] if counted else 0,
            "instance_count": instances[category.id] if counted else 0,
        }
        rows.append(msgspec.json.decode(raw, type=dict[str, Any]) | counts)
    write_bytes(target, msgspec.json.encode(rows))


def write_with_fixed_names(source: Path, fixes: Path, target: Path) -> int:
    """Write a copy of an annotation file with other category names, those that mean something to a text encoder.

    Args:
        source: Objects365 annotations, such as ``zhiyuan_objv2_val.json``.
        fixes: Rows ``id,old name,new name``, one for each category.
        target: The copy.

    Returns:
        How many names were changed.

    Raises:
        DataError: a file cannot be read, or a category has neither the old nor the new name of its row.
    """
    outline = read_outline(source)
    try:
        with fixes.open(encoding="utf-8", newline="") as file:
            names = {int(row[0]): (row[1], row[2]) for row in csv.reader(file) if row}
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, IndexError) as error:
        raise DataError(
            f"{fixes} does not hold rows of id, old and new name: {error}",
            hint="fetch the file again: proxydet download objects365-name-fixes",
            path=fixes,
        ) from error
    changed = 0
    categories = []
    for raw, category in _decoded(outline.categories, _Category, "category", source):
        row = names.get(category.id)
        if row is None or category.name not in row:
            raise DataError(
                f"{source}: category {category.id} is called {category.name!r}, "
                f"but {fixes.name} has {row[0] if row else 'no row for it'!r}",
                hint="the two files belong to different releases",
                path=source,
            )
        changed += category.name != row[1]
        renamed = msgspec.json.decode(raw, type=dict[str, Any]) | {"name": row[1]}
        categories.append(msgspec.Raw(msgspec.json.encode(renamed)))
    _write(target, outline.images, outline.annotations, categories)
    return changed


def write_classes(source: Path, target: Path, names: Collection[str]) -> tuple[int, int]:
    """Write the part of a COCO file that has annotations of some classes; all categories stay, in their order.

    Args:
        source: COCO annotations, such as ``instances_train2017.json``.
        target: The part.
        names: Classes to keep.

    Returns:
        How many images and annotations it holds.

    Raises:
        DataError: the file cannot be read, or a class is not in it.
    """
    outline = read_outline(source)
    categories = _decoded(outline.categories, _Category, "category", source)
    id_of = {category.name: category.id for _, category in categories}
    if missing := sorted(set(names) - id_of.keys()):
        raise DataError(
            f"{source} has no category {missing[0]!r}; it is not COCO's",
            hint="give COCO 2017's instances_train2017.json or instances_val2017.json",
            path=source,
        )
    chosen = {id_of[name] for name in names}
    kept, image_ids = [], set()
    for raw, owners in _decoded(outline.annotations, _Owners, "annotation", source):
        if owners.category_id in chosen:
            kept.append(raw)
            image_ids.add(owners.image_id)
    listed = _decoded(outline.images, _Image, "image", source)
    images = [raw for raw, image in listed if image.id in image_ids]
    _write(target, images, kept, outline.categories)
    return len(images), len(kept)


def _lvis_categories(outline: Outline, source: Path) -> list[tuple[msgspec.Raw, _Category]]:
    categories = list(_decoded(outline.categories, _Category, "category", source))
    if any(category.frequency is None for _, category in categories):
        raise DataError(
            f"{source} is not in LVIS format: its categories have no 'frequency'",
            hint="give LVIS v1's annotation file",
            path=source,
        )
    return categories


def _decoded(
    raws: Iterable[msgspec.Raw], kind: type[T], what: str, source: Path
) -> Iterator[tuple[msgspec.Raw, T]]:
    decoder = msgspec.json.Decoder(kind)
    for position, raw in enumerate(raws):
        try:
            yield raw, decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(
                f"{source}: {what} {position} is not usable: {error}",
                hint="correct it, or fetch the file again",
                path=source,
            ) from error


def _write(
    target: Path,
    images: Iterable[msgspec.Raw],
    annotations: Iterable[msgspec.Raw],
    categories: Iterable[msgspec.Raw],
) -> None:
    lists = {"images": images, "annotations": annotations, "categories": categories}
    with staged(target) as path, write_errors(target), path.open("wb", 1 << 20) as file:
        for number, (name, records) in enumerate(lists.items()):
            file.write(b"{" if number == 0 else b",\n")
            file.write(f'"{name}": ['.encode())
            for position, record in enumerate(records):
                file.write(b",\n" if position else b"\n")
                file.write(record)
            file.write(b"\n]")
        file.write(b"}\n")


_READERS = 16


@dataclass(frozen=True, kw_only=True)
class OpenImagesTables:
    """Where the challenge's tables are."""

    boxes: Path
    """CSV: ImageID, LabelName, XMin, XMax, YMin, YMax, IsGroupOf."""
    image_labels: Path
    """CSV: ImageID, LabelName, Confidence (1 confirmed, 0 ruled out)."""
    classes: Path
    """CSV without header: LabelName, class name; its order numbers the categories."""
    hierarchy: Path
    """JSON: nested LabelName and Subcategory."""


def write_expanded(
    tables: OpenImagesTables, images: Path, target: Path, *, progress: Progress = SILENT
) -> tuple[int, int]:
    """Write the challenge's annotations as one COCO-format file.

    Boxes become pixels; ``IsGroupOf`` becomes ``iscrowd``; image-level labels become the images' ``pos_category_ids`` and
    ``neg_category_ids``. Images are those of either table.

    Args:
        tables: The challenge's tables.
        images: Folder of ``<ImageID>.jpg``, for their sizes.
        target: The file.
        progress: Where to show the reading of sizes.

    Returns:
        How many images and annotations it holds.

    Raises:
        DataError: a table or an image cannot be read, or a table names an unknown class.
    """
    classes: dict[str, str] = {}
    for number, row in enumerate(_rows(tables.classes), 1):
        # A row left out would shift the numbers of all classes behind it.
        if len(row) != 2 or row[0] in classes:
            raise _bad_row(tables.classes, number, "not a label of its own and a name")
        classes[row[0]] = row[1]
    id_of = {label: number for number, label in enumerate(classes, 1)}
    above, below = _hierarchy(tables.hierarchy)

    def expanded(label: str, related: dict[str, set[str]]) -> list[int]:
        # The tree's root, for one, is not a class of the challenge.
        others = {id_of[other] for other in related.get(label, ()) if other in id_of}
        return [id_of[label], *sorted(others - {id_of[label]})]

    labels: dict[bool, dict[str, set[int]]] = {True: {}, False: {}}
    for number, (image, label, confidence) in _columns(
        tables.image_labels, ("ImageID", "LabelName", "Confidence")
    ):
        try:
            confirmed = float(confidence) == 1
            ids = expanded(label, above if confirmed else below)
        except (KeyError, ValueError) as error:
            raise _bad_row(tables.image_labels, number, error) from error
        labels[confirmed].setdefault(image, set()).update(ids)
    boxes: list[tuple[str, list[int], list[float]]] = []
    for number, (image, label, *texts) in _columns(
        tables.boxes, ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
    ):
        try:
            values = [float(text) for text in texts]
            if not all(map(math.isfinite, values)):
                raise ValueError(f"not a box: {', '.join(texts)}")
            boxes.append((image, expanded(label, above), values))
        except (KeyError, ValueError) as error:
            raise _bad_row(tables.boxes, number, error) from error
    names = sorted(labels[True].keys() | labels[False].keys() | {image for image, _, _ in boxes})
    sizes = dict(zip(names, _read_sizes(names, images, progress), strict=True))
    ids_of_images = {name: number for number, name in enumerate(names, 1)}
    annotations: list[dict[str, Any]] = []
    for image, categories, (x1, x2, y1, y2, group) in boxes:
        height, width = sizes[image]
        box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
        for category in categories:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": ids_of_images[image],
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(group == 1),
                }
            )
    content = {
        "images": [
            {
                "id": ids_of_images[name],
                "file_name": f"{name}.jpg",
                "height": height,
                "width": width,
                "pos_category_ids": sorted(labels[True].get(name, ())),
                "neg_category_ids": sorted(labels[False].get(name, ())),
            }
            for name, (height, width) in sizes.items()
        ],
        "annotations": annotations,
        "categories": [
            {"id": id_of[label], "name": name, "freebase_id": label}
            for label, name in classes.items()
        ],
    }
    write_bytes(target, msgspec.json.encode(content))
    return len(names), len(annotations)


def _hierarchy(path: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Read the challenge's tree: all labels above each label, and all below; a label may stand in several places."""
    above: dict[str, set[str]] = {}
    try:
        tree = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        stack: list[tuple[dict[str, Any], frozenset[str]]] = [(tree, frozenset())]
        while stack:
            node, ancestors = stack.pop()
            label = node["LabelName"]
            above.setdefault(label, set()).update(ancestors)
            children = node.get("Subcategory", [])
            stack.extend((child, ancestors | {label}) for child in children)
    except (
        msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError,
        KeyError, TypeError, AttributeError,
    ) as error:  # fmt: skip
        raise DataError(
            f"{path} is not a class hierarchy: {error!r}", hint="fetch the file again", path=path
        ) from error
    below: dict[str, set[str]] = {label: set() for label in above}
    for label, ancestors_of_label in above.items():
        for ancestor in ancestors_of_label:
            below[ancestor].add(label)
    return above, below


def _read_sizes(names: list[str], images: Path, progress: Progress) -> Iterator[tuple[int, int]]:
    with (
        progress.task("reading image sizes", total=len(names), unit="images") as task,
        ThreadPoolExecutor(_READERS) as pool,
    ):
        paths = [images / f"{name}.jpg" for name in names]
        sizes = pool.map(image_size, paths)
        for path in paths:
            try:
                yield next(sizes)
            except DataError as error:
                hint = how_to_get(path) or error.hint
                raise DataError(error.message, hint=hint, path=path) from error
            task.advance()


def _columns(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row and its values of some columns."""
    rows = _rows(path)
    header = next(rows, [])
    if missing := [name for name in names if name not in header]:
        raise DataError(
            f"{path} has no column {missing[0]!r}",
            hint="give the table as OpenImages publishes it",
            path=path,
        )
    places = [header.index(name) for name in names]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise _bad_row(path, number, f"{len(row)} values, not {len(header)}")
        yield number, [row[place] for place in places]


def _rows(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from (row for row in csv.reader(file) if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"cannot read the table {path}: {error}", hint="fetch the file again", path=path
        ) from error


def _bad_row(path: Path, number: int, why: object) -> DataError:
    if isinstance(why, KeyError):
        why = f"the class {why} is not one of the challenge"
    return DataError(f"{path}, row {number}: {why}", hint="fetch the file again", path=path)


DatasetName = Literal["lvis", "imagenet-lvis", "objects365", "openimages", "coco"]
Action = Literal["made", "up to date", "kept"]

_MARK = "# Written by `proxydet data prepare`. Remove this line to keep your changes."
_TARS = "imagenet/ImageNet-21K"
_OBJECTS365 = "objects365/annotations/zhiyuan_objv2_val_fixname.json"
_OPENIMAGES = "oid/annotations/oid_challenge_2019_val_expanded.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step and its result."""

    name: str
    """What the step is for."""
    path: Path
    """The file that it makes."""
    action: Action
    """Whether it was made now, was up to date, or is a dataset config that the user changed."""
    detail: str = ""
    """Counts, and what to know."""


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a preparation did."""

    dataset: DatasetName
    """Which data set."""
    root: Path
    """The data root."""
    steps: tuple[Step, ...]
    """In the order in which they ran."""
    problems: tuple[str, ...]
    """What was dropped, mended, unreadable or missing, in words."""


def prepare(
    dataset: DatasetName,
    root: Path,
    *,
    force: bool = False,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> PrepareReport:
    """Make all files that a data set needs from those that were downloaded.

    Args:
        dataset: Which one.
        root: The data root, in the published layout.
        force: Make files again that are up to date.
        cache: Folder of annotation stores and tar indexes; None means the user's cache folder.
        progress: Where to show long steps.

    Raises:
        DataError: a source file is not there or cannot be used.
        DiskFullError: there is no room.
    """
    work = _Work(root=root, force=force, cache=cache, progress=progress)
    {
        "lvis": _lvis,
        "imagenet-lvis": _imagenet_lvis,
        "objects365": _objects365,
        "openimages": _openimages,
        "coco": _coco,
    }[dataset](work)
    return PrepareReport(
        dataset=dataset, root=root, steps=tuple(work.steps), problems=tuple(work.problems)
    )


@dataclass(kw_only=True)
class _Work:
    root: Path
    force: bool
    cache: Path | None
    progress: Progress
    steps: list[Step] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def file(self, name: str, target: str, sources: list[str], make: Callable[[Path], str]) -> None:
        """Run a step that makes ``target`` out of ``sources``, unless it is newer than all of them."""
        path = self.root / target
        newest = max(self._time(source) for source in sources)
        if not self.force and path.exists() and path.stat().st_mtime_ns >= newest:
            self.steps.append(Step(name=name, path=path, action="up to date"))
            return
        with self.progress.task(f"making {path.name}"):
            detail = make(path)
        self.steps.append(Step(name=name, path=path, action="made", detail=detail))

    def store(self, source: str) -> None:
        """Make the annotation store of a file."""
        path = self.root / source
        self._time(source)
        there = AnnotationStore.path_for(path, cache=self.cache).exists()
        store = AnnotationStore.open(path, cache=self.cache, progress=self.progress, warn=False)
        images, kept = store.report.images_kept, store.report.annotations_kept
        self.made_or_there(
            "annotation store",
            store.path,
            there,
            f"{counted(images, 'image')}, {counted(kept, 'annotation')}",
        )
        self.problems.extend(f"{path.name}: {line}" for line in store.report.lines())
        if not images:
            self.problems.append(f"{path.name} has no image that can be used")

    def made_or_there(self, name: str, path: Path, there: bool, detail: str) -> None:
        """Add the step of a file in the cache."""
        action: Action = "up to date" if there else "made"
        self.steps.append(Step(name=name, path=path, action=action, detail=detail))

    def description(
        self,
        name: str,
        embeddings: str,
        splits: dict[str, tuple[str, str]],
        *,
        more: str = "",
        tables: str = "",
    ) -> Path:
        """Write a dataset config, with paths relative to the data root, unless somebody changed it and took the mark away.

        Args:
            name: Its file's name, and the data set's.
            embeddings: Table of text embeddings, in ``metadata``.
            splits: Annotations and images of ``train`` and ``val``.
            more: Lines of ``[vocabulary]``.
            tables: Tables after the splits.
        """
        path = self.root / f"{name}.toml"
        parts = [
            f'{_MARK}\n\nname = "{name.replace("_", "-")}"',
            f'[vocabulary]\nembeddings = "metadata/{embeddings}"\nencoder = "ViT-B/32"{more}',
            *(f'[{s}]\nannotations = "{a}"\nimages = "{i}"' for s, (a, i) in splits.items()),
        ]
        text = "\n\n".join(parts) + "\n" + tables
        there = path.read_text(encoding="utf-8") if path.exists() else None
        action: Action = "made"
        if there is not None and not there.startswith(_MARK):
            action = "kept"
        elif there == text:
            action = "up to date"
        else:
            write_text(path, text)
        detail = "left as it is: it was changed by hand" if action == "kept" else ""
        self.steps.append(Step(name="dataset config", path=path, action=action, detail=detail))
        return path

    def lvis_description(self, *, image_labels: bool) -> Path:
        """Write the dataset config of LVIS, with or without ImageNet-LVIS."""
        return self.description(
            "lvis",
            "lvis_v1_clip_a+cname.npy",
            {split: (f"lvis/lvis_v1_{split}.json", "coco") for split in ("train", "val")},
            more='\nnovel_frequency = ["r"]',
            tables=f'\n[image_labels]\ntars = "{_TARS}"\n' if image_labels else "",
        )

    def _time(self, source: str) -> int:
        try:
            return (self.root / source).stat().st_mtime_ns
        except OSError as error:
            raise DataError(
                f"there is no {source} in the data root {self.root}",
                hint=inner_root(self.root)
                or f"{how_to_get(self.root / source) or 'get it'}, or name another root by --root",
                path=self.root / source,
            ) from error


def _lvis(work: _Work) -> None:
    train = "lvis/lvis_v1_train.json"
    source = work.root / train
    work.store(train)
    work.store("lvis/lvis_v1_val.json")

    def without_rare(path: Path) -> str:
        left_out = write_without_rare(source, path)
        return f"{counted(left_out, 'annotation')} of rare classes left out"

    def category_info(path: Path, *, with_rare: bool) -> str:
        write_category_info(source, path, with_rare=with_rare)
        published = "counts of rare classes included, as published"
        return published if with_rare else "rare classes count 0"

    work.file("without rare classes", "lvis/lvis_v1_train_norare.json", [train], without_rare)
    for name, with_rare in (("train", True), ("train_norare", False)):
        info = f"lvis/lvis_v1_{name}_cat_info.json"
        work.file("class counts", info, [train], partial(category_info, with_rare=with_rare))
    work.lvis_description(image_labels=(work.root / _TARS).is_dir())


def _imagenet_lvis(work: _Work) -> None:
    tars = work.root / _TARS
    if not tars.is_dir():
        raise DataError(
            f"there is no folder of tars {tars}",
            hint=inner_root(work.root)
            or "put the tars of ImageNet-21K there (n02691156.tar, ...); proxydet download imagenet-21k-lvis says how",
            path=tars,
        )
    path = work.lvis_description(image_labels=True)
    description = DatasetConfig.from_toml(path)
    if description.image_labels is None:
        raise DataError(
            f"{path} has no [image_labels] table", hint=f'add one with tars = "{tars}"', path=path
        )
    vocabulary = load_vocabulary(description, cache=work.cache, progress=work.progress)
    store = open_split(description, "train", cache=work.cache, progress=work.progress)
    matched = match_tars(description.image_labels, vocabulary, store.categories)
    names = list(matched.class_of_tar)
    there = TarIndex.path_for(tars, names, cache=work.cache).exists()
    index = TarIndex.open(tars, names, cache=work.cache, progress=work.progress, warn=False)
    inside = f"{counted(len(index), 'image')} in {counted(len(index.tars), 'tar')}"
    work.made_or_there(
        "tar index", index.path, there, f"{inside}, {index.report.gzipped} gzip-compressed"
    )
    work.problems.extend(index.report.lines())
    if matched.missing:
        absent = counted(len(matched.missing), "tar is", "tars are")
        work.problems.append(f"{absent} missing, e.g. {', '.join(matched.missing[:5])}")
    if matched.without_class:
        unused = counted(len(matched.without_class), "tar belongs", "tars belong")
        work.problems.append(f"{unused} to no class and not used")


def _objects365(work: _Work) -> None:
    source = "objects365/annotations/zhiyuan_objv2_val.json"
    fixes = "metadata/Objects365_names_fix.csv"

    def fix(path: Path) -> str:
        changed = write_with_fixed_names(work.root / source, work.root / fixes, path)
        return f"{counted(changed, 'name')} changed"

    work.file("names corrected", _OBJECTS365, [source, fixes], fix)
    work.store(_OBJECTS365)
    splits = {"val": (_OBJECTS365, "objects365/val")}
    work.description("objects365", "o365_clip_a+cnamefix.npy", splits)


def _openimages(work: _Work) -> None:
    folder = "oid/annotations/challenge-2019-"
    names = {
        "boxes": f"{folder}validation-detection-bbox.csv",
        "image_labels": f"{folder}validation-detection-human-imagelabels.csv",
        "classes": f"{folder}classes-description-500.csv",
        "hierarchy": f"{folder}label500-hierarchy.json",
    }

    def expand(path: Path) -> str:
        tables = OpenImagesTables(**{k: work.root / v for k, v in names.items()})
        images, boxes = write_expanded(
            tables, work.root / "oid/images/validation", path, progress=work.progress
        )
        return f"{counted(images, 'image')}, {counted(boxes, 'box', 'boxes')} after expansion"

    work.file("hierarchy expanded", _OPENIMAGES, list(names.values()), expand)
    work.store(_OPENIMAGES)
    splits = {"val": (_OPENIMAGES, "oid/images/validation")}
    work.description("openimages", "oid_clip_a+cname.npy", splits)


def _coco(work: _Work) -> None:
    everything = (*SEEN, *UNSEEN)
    whole: dict[str, tuple[str, str]] = {}
    zero_shot: dict[str, tuple[str, str]] = {}
    for split, suffix, names in (("train", "seen", SEEN), ("val", "all", everything)):
        source = f"coco/annotations/instances_{split}2017.json"
        target = f"coco/zero-shot/instances_{split}2017_{suffix}_2_oriorder.json"
        work.store(source)

        def write(path: Path, source: str = source, names: tuple[str, ...] = names) -> str:
            images, kept = write_classes(work.root / source, path, names)
            of = f"{counted(kept, 'annotation')} of {len(names)} classes"
            return f"{counted(images, 'image')}, {of}"

        work.file("zero-shot split", target, [source], write)
        whole[split] = (source, f"coco/{split}2017")
        zero_shot[split] = (target, f"coco/{split}2017")
    embeddings = "coco_clip_a+cname.npy"
    work.description("coco", embeddings, whole)
    # Of COCO's 80 classes, 48 to train on, 17 unseen; the other 15 have no annotations here.
    novel = ", ".join(f'"{name}"' for name in UNSEEN)
    work.description("coco_zero_shot", embeddings, zero_shot, more=f"\nnovel = [{novel}]")
