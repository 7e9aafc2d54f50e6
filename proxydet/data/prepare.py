"""The steps of ``proxydet data prepare``: what a data set needs between its downloaded files and training.

Each is done only where its result is absent or older than its source.
"""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache as cached
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from proxydet.artifacts import how_to_get
from proxydet.data.dataset import Dataset, DatasetConfig, inner_root
from proxydet.data.formats.coco import Outline, read_hierarchy, read_outline
from proxydet.data.image_labels import TarImages, match_tars
from proxydet.data.images import image_size, sizes_of
from proxydet.data.store import AnnotationStore
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

DatasetName = Literal["lvis", "imagenet-lvis", "objects365", "openimages", "coco"]
Action = Literal["made", "up to date", "kept"]


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


T = TypeVar("T")
_MARK = "# Written by `proxydet data prepare`. Remove this line to keep your changes."
_TARS = "imagenet/ImageNet-21K"


@dataclass(kw_only=True)
class _Work:
    root: Path
    force: bool
    cache: Path | None
    progress: Progress
    steps: list[Step] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def step(self, name: str, path: Path, action: Action, detail: str = "") -> None:
        self.steps.append(Step(name=name, path=path, action=action, detail=detail))

    def time(self, source: str) -> int:
        """Return when a source file was last changed; DataError where it is not there."""
        try:
            return (self.root / source).stat().st_mtime_ns
        except OSError as error:
            raise DataError(
                f"there is no {source} in the data root {self.root}",
                hint=inner_root(self.root)
                or f"{how_to_get(self.root / source) or 'get it'}, or name another root by --root",
                path=self.root / source,
            ) from error

    def file(self, name: str, target: str, sources: list[str], make: Callable[..., str]) -> None:
        """Run a step that makes ``target`` out of ``sources``, unless it is newer than all of them.

        ``make`` is called with their paths, and returns counts and what to know.
        """
        path = self.root / target
        newest = max(map(self.time, sources))
        if not self.force and path.exists() and path.stat().st_mtime_ns >= newest:
            self.step(name, path, "up to date")
            return
        with self.progress.task(f"making {path.name}"):
            detail = make(path, *(self.root / source for source in sources))
        self.step(name, path, "made", detail)

    def store(self, source: str) -> None:
        """Make the annotation store of a file."""
        path = self.root / source
        self.time(source)
        there = AnnotationStore.path_for(path, cache=self.cache).exists()
        store = AnnotationStore.open(path, cache=self.cache, progress=self.progress, warn=False)
        images, kept = store.report.images_kept, store.report.annotations_kept
        held = f"{counted(images, 'image')}, {counted(kept, 'annotation')}"
        self.step("annotation store", store.path, "up to date" if there else "made", held)
        self.problems.extend(f"{path.name}: {line}" for line in store.report.lines())
        if not images:
            self.problems.append(f"{path.name} has no image that can be used")

    def config(
        self,
        name: str,
        embeddings: str,
        splits: dict[str, tuple[str, str]],
        *,
        more: str = "",
        tables: str = "",
    ) -> Path:
        """Write a dataset config, with paths relative to the data root, unless somebody changed it and took the mark away.

        ``splits``: annotations and images of ``train`` and ``val``; ``more``: lines of ``[vocabulary]``; ``tables``: after the
        splits.
        """
        path = self.root / f"{name}.toml"
        parts = [
            f'{_MARK}\n\nname = "{name.replace("_", "-")}"',
            f'[vocabulary]\nembeddings = "metadata/{embeddings}"\nencoder = "ViT-B/32"{more}',
            *(f'[{s}]\nannotations = "{a}"\nimages = "{i}"' for s, (a, i) in splits.items()),
        ]
        text = "\n\n".join(parts) + "\n" + tables
        there = path.read_text(encoding="utf-8") if path.exists() else None
        if there is not None and not there.startswith(_MARK):
            self.step("dataset config", path, "kept", "left as it is: it was changed by hand")
        elif there == text:
            self.step("dataset config", path, "up to date")
        else:
            write_text(path, text)
            self.step("dataset config", path, "made")
        return path


def _lvis(work: _Work) -> None:
    """Leave the annotations of rare classes out, and write the classes with their counts.

    The published ``lvis_v1_train_cat_info.json`` counts rare classes, so that the federated loss knows how frequent the classes
    are that training is not supposed to know; the file without them counts 0.
    """
    train = "lvis/lvis_v1_train.json"
    work.store(train)
    work.store("lvis/lvis_v1_val.json")

    @cached
    def read(source: Path) -> tuple[Outline, list[msgspec.Raw], list[dict[str, Any]]]:
        """Return what the file holds, its annotations that are not of rare classes, and its classes with their counts."""
        outline = read_outline(source)
        categories = list(_decoded(outline.categories, _Category, "category", source))
        if any(category.frequency is None for _, category in categories):
            raise DataError(
                f"{source} is not in LVIS format: its categories have no 'frequency'",
                hint="give LVIS v1's annotation file",
                path=source,
            )
        rare = {category.id for _, category in categories if category.frequency == "r"}
        kept: list[msgspec.Raw] = []
        pairs: set[tuple[int, int]] = set()
        instances: Counter[int] = Counter()
        for raw, owners in _decoded(outline.annotations, _Owners, "annotation", source):
            pairs.add((owners.image_id, owners.category_id))
            instances[owners.category_id] += 1
            if owners.category_id not in rare:
                kept.append(raw)
        images = Counter(category for _, category in pairs)
        rows = [
            msgspec.json.decode(raw, type=dict[str, Any])
            | {"image_count": images[c.id], "instance_count": instances[c.id]}
            for raw, c in sorted(categories, key=lambda entry: entry[1].id)
        ]
        return outline, kept, rows

    def without_rare(path: Path, source: Path) -> str:
        outline, kept, _ = read(source)
        _write(path, outline.images, kept, outline.categories)
        left_out = len(outline.annotations) - len(kept)
        return f"{counted(left_out, 'annotation')} of rare classes left out"

    def counts(rare: dict[str, int], path: Path, source: Path) -> str:
        rows = [row | (rare if row["frequency"] == "r" else {}) for row in read(source)[2]]
        write_bytes(path, msgspec.json.encode(rows))
        return "rare classes count 0" if rare else "counts of rare classes included, as published"

    norare, none = "lvis/lvis_v1_train_norare", {"image_count": 0, "instance_count": 0}
    work.file("without rare classes", f"{norare}.json", [train], without_rare)
    work.file("class counts", "lvis/lvis_v1_train_cat_info.json", [train], partial(counts, {}))
    work.file("class counts", f"{norare}_cat_info.json", [train], partial(counts, none))
    _lvis_config(work, image_labels=(work.root / _TARS).is_dir())


def _lvis_config(work: _Work, *, image_labels: bool) -> Path:
    """Write the dataset config of LVIS, with or without ImageNet-LVIS."""
    splits = {split: (f"lvis/lvis_v1_{split}.json", "coco") for split in ("train", "val")}
    more, labels = '\nnovel_frequency = ["r"]', f'\n[image_labels]\ntars = "{_TARS}"\n'
    tables = labels if image_labels else ""
    return work.config("lvis", "lvis_v1_clip_a+cname.npy", splits, more=more, tables=tables)


def _imagenet_lvis(work: _Work) -> None:
    tars = work.root / _TARS
    if not tars.is_dir():
        raise DataError(
            f"there is no folder of tars {tars}",
            hint=inner_root(work.root)
            or "put the tars of ImageNet-21K there (n02691156.tar, ...); proxydet download imagenet-21k-lvis says how",
            path=tars,
        )
    path = _lvis_config(work, image_labels=True)
    description = DatasetConfig.from_toml(path)
    spec = description.image_labels
    if spec is None or spec.tars is None:
        raise DataError(
            f"{path} has no [image_labels] table with tars",
            hint=f'add one with tars = "{tars}"',
            path=path,
        )
    data = Dataset(config=description, cache=work.cache, progress=work.progress, warn=False)
    matched = match_tars(spec, data.vocabulary, data.store("train").categories)
    images = TarImages.open(spec.tars, matched, cache=work.cache, progress=work.progress)
    held = f"{counted(len(images), 'image')} in {counted(len(images.tars), 'tar')}"
    held += f", {images.report.gzipped} gzip-compressed"
    work.step("tar index", images.path, "made" if images.indexed else "up to date", held)
    work.problems.extend(text for _, text, _ in images.notes())


def _objects365(work: _Work) -> None:
    """Correct category names, so that they mean something to a text encoder, by rows ``id,old name,new name``."""
    whole = "objects365/annotations/zhiyuan_objv2_val.json"
    fixed = whole.replace(".json", "_fixname.json")

    def fix(row: list[str]) -> tuple[int, tuple[str, str]]:
        if len(row) < 3:
            raise ValueError("not an id, an old and a new name")
        return int(row[0]), (row[1], row[2])

    def correct(path: Path, source: Path, fixes: Path) -> str:
        outline = read_outline(source)
        names = dict(_rows(fixes, (), fix))
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
            categories.append(msgspec.json.decode(raw, type=dict[str, Any]) | {"name": row[1]})
        _write(path, outline.images, outline.annotations, categories)
        return f"{counted(changed, 'name')} changed"

    tables = [whole, "metadata/Objects365_names_fix.csv"]
    work.file("names corrected", fixed, tables, correct)
    work.store(fixed)
    work.config("objects365", "o365_clip_a+cnamefix.npy", {"val": (fixed, "objects365/val")})


def _openimages(work: _Work) -> None:
    """Write the challenge's annotations as one COCO-format file, expanded along the hierarchy of its classes.

    Boxes become pixels; ``IsGroupOf`` becomes ``iscrowd``; image-level labels become the images' ``pos_category_ids`` and
    ``neg_category_ids``. Images are those of either table.
    """
    folder, photographs = "oid/annotations/challenge-2019-", "oid/images/validation"
    expanded = "oid/annotations/oid_challenge_2019_val_expanded.json"
    tables = ["validation-detection-bbox.csv", "validation-detection-human-imagelabels.csv"]
    tables += ["classes-description-500.csv", "label500-hierarchy.json"]

    def expand(path: Path, boxes_csv: Path, labels_csv: Path, classes_csv: Path, tree: Path) -> str:
        id_of: dict[str, int] = {}

        def class_name(row: list[str]) -> tuple[str, str]:
            # A row left out would shift the numbers of all classes behind it.
            if len(row) != 2 or row[0] in id_of:
                raise ValueError("not a label of its own and a name")
            id_of[row[0]] = len(id_of) + 1
            return row[0], row[1]

        names = dict(_rows(classes_csv, (), class_name))
        above = read_hierarchy(tree)
        below: dict[str, set[str]] = defaultdict(set)
        for label, ancestors in above.items():
            for ancestor in ancestors:
                below[ancestor].add(label)

        def with_related(label: str, related: dict[str, set[str]]) -> list[int]:
            # The tree's root, for one, is not a class of the challenge.
            others = {id_of[other] for other in related.get(label, ()) if other in id_of}
            return [id_of[label], *sorted(others - {id_of[label]})]

        def image_label(row: list[str]) -> tuple[str, bool, list[int]]:
            image, label, confidence = row
            confirmed = float(confidence) == 1
            return image, confirmed, with_related(label, above if confirmed else below)

        def box(row: list[str]) -> tuple[str, list[int], list[float]]:
            image, label, *texts = row
            values = [float(text) for text in texts]
            if not all(map(math.isfinite, values)):
                raise ValueError(f"not a box: {', '.join(texts)}")
            return image, with_related(label, above), values

        labels: dict[bool, dict[str, set[int]]] = {True: {}, False: {}}
        for name, confirmed, ids in _rows(
            labels_csv, ("ImageID", "LabelName", "Confidence"), image_label
        ):
            labels[confirmed].setdefault(name, set()).update(ids)
        columns = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
        boxes = list(_rows(boxes_csv, columns, box))
        found = sorted({*labels[True], *labels[False], *(image for image, _, _ in boxes)})
        images: dict[str, dict[str, Any]] = {}
        with work.progress.task("reading image sizes", total=len(found), unit="images") as task:
            files = [work.root / photographs / f"{name}.jpg" for name in found]
            for number, (file, size) in enumerate(zip(files, sizes_of(files), strict=True), 1):
                try:
                    height, width = size or image_size(file)
                except DataError as error:
                    hint = how_to_get(file) or error.hint
                    raise DataError(error.message, hint=hint, path=file) from error
                images[file.stem] = {
                    "id": number,
                    "file_name": file.name,
                    "height": height,
                    "width": width,
                    "pos_category_ids": sorted(labels[True].get(file.stem, ())),
                    "neg_category_ids": sorted(labels[False].get(file.stem, ())),
                }
                task.advance()
        annotations: list[dict[str, Any]] = []
        for name, ids, (x1, x2, y1, y2, group) in boxes:
            image = images[name]
            height, width = image["height"], image["width"]
            xywh = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
            fixed = {"bbox": xywh, "area": xywh[2] * xywh[3], "iscrowd": int(group == 1)}
            for category in ids:
                own = {"id": len(annotations) + 1, "image_id": image["id"]}
                annotations.append({**own, "category_id": category, **fixed})
        categories = [
            {"id": id_of[label], "name": name, "freebase_id": label}
            for label, name in names.items()
        ]
        _write(path, images.values(), annotations, categories)
        held = f"{counted(len(images), 'image')}, {counted(len(annotations), 'box', 'boxes')}"
        return f"{held} after expansion"

    work.file("hierarchy expanded", expanded, [folder + name for name in tables], expand)
    work.store(expanded)
    work.config("openimages", "oid_clip_a+cname.npy", {"val": (expanded, photographs)})


def _coco(work: _Work) -> None:
    """Write the zero-shot split: images with annotations of some classes; all categories stay, in their order."""

    def write(names: tuple[str, ...], path: Path, source: Path) -> str:
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
        _write(path, images, kept, outline.categories)
        of = f"{counted(len(kept), 'annotation')} of {len(names)} classes"
        return f"{counted(len(images), 'image')}, {of}"

    whole: dict[str, tuple[str, str]] = {}
    zero_shot: dict[str, tuple[str, str]] = {}
    for split, suffix, names in (("train", "seen", SEEN), ("val", "all", (*SEEN, *UNSEEN))):
        source = f"coco/annotations/instances_{split}2017.json"
        target = f"coco/zero-shot/instances_{split}2017_{suffix}_2_oriorder.json"
        work.store(source)
        work.file("zero-shot split", target, [source], partial(write, names))
        whole[split] = (source, f"coco/{split}2017")
        zero_shot[split] = (target, f"coco/{split}2017")
    embeddings = "coco_clip_a+cname.npy"
    work.config("coco", embeddings, whole)
    # Of COCO's 80 classes, 48 to train on, 17 unseen; the other 15 have no annotations here.
    novel = ", ".join(f'"{name}"' for name in UNSEEN)
    work.config("coco_zero_shot", embeddings, zero_shot, more=f"\nnovel = [{novel}]")


class _Owners(msgspec.Struct, frozen=True):
    image_id: int
    category_id: int


class _Image(msgspec.Struct, frozen=True):
    id: int


class _Category(msgspec.Struct, frozen=True):
    id: int
    name: str
    frequency: str | None = None


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


Records: TypeAlias = Iterable[msgspec.Raw | dict[str, Any]]


def _write(target: Path, images: Records, annotations: Records, categories: Records) -> None:
    """Write an annotation file record by record: its whole text is never in memory."""
    lists = {"images": images, "annotations": annotations, "categories": categories}
    encode = msgspec.json.Encoder().encode
    with staged(target) as path, write_errors(target), path.open("wb", 1 << 20) as file:
        for number, (name, records) in enumerate(lists.items()):
            file.write(b",\n" if number else b"{")
            file.write(f'"{name}": ['.encode())
            for position, record in enumerate(records):
                file.write(b",\n" if position else b"\n")
                file.write(encode(record))
            file.write(b"\n]")
        file.write(b"}\n")


def _rows(path: Path, names: tuple[str, ...], read: Callable[[list[str]], T]) -> Iterator[T]:
    """Yield what ``read`` makes of some columns of each row of a table; without names, of all, and the table has no header."""
    hint = how_to_get(path) or "fetch the file again"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = (row for row in csv.reader(file) if row)
            header = next(rows, []) if names else []
            if missing := [name for name in names if name not in header]:
                raise DataError(
                    f"{path} has no column {missing[0]!r}",
                    hint="give the table as OpenImages publishes it",
                    path=path,
                )
            places = [header.index(name) for name in names]
            for number, row in enumerate(rows, 2 if names else 1):
                try:
                    if names and len(row) != len(header):
                        raise ValueError(f"{len(row)} values, not {len(header)}")
                    yield read([row[place] for place in places] if names else row)
                except (KeyError, ValueError) as error:
                    unknown = f"the class {error} is not one of the challenge"
                    why = unknown if isinstance(error, KeyError) else error
                    message = f"{path}, row {number}: {why}"
                    raise DataError(message, hint=hint, path=path) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {path}: {error}", hint=hint, path=path) from error
