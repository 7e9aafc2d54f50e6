"""The steps of ``proxydet data prepare``: what a data set needs between its downloaded files and training.

Each is done only where its result is absent or older than its source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from proxydet.data.advice import how_to_get, inner_root
from proxydet.data.classes import load_vocabulary, open_split
from proxydet.data.description import DatasetDescription
from proxydet.data.image_labels import match_tars
from proxydet.data.prepare import openimages
from proxydet.data.prepare.annotation_files import (
    SEEN,
    UNSEEN,
    write_category_info,
    write_classes,
    write_with_fixed_names,
    write_without_rare,
)
from proxydet.data.store import AnnotationStore
from proxydet.data.tars import TarIndex
from proxydet.errors import DataError
from proxydet.files import write_text
from proxydet.reporting import SILENT, Progress
from proxydet.wording import counted

DatasetName = Literal["lvis", "imagenet-lvis", "objects365", "openimages", "coco"]
Action = Literal["made", "up to date", "kept"]
DATASETS: tuple[DatasetName, ...] = ("lvis", "imagenet-lvis", "objects365", "openimages", "coco")

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
    """Whether it was made now, was up to date, or is a description that the user changed."""
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
        """Write a data description, with paths relative to the data root, unless somebody changed it and took the mark away.

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
        self.steps.append(Step(name="data description", path=path, action=action, detail=detail))
        return path

    def lvis_description(self, *, image_labels: bool) -> Path:
        """Write the description of LVIS, with or without ImageNet-LVIS."""
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
    description = DatasetDescription.from_toml(path)
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
        tables = openimages.OpenImagesTables(**{k: work.root / v for k, v in names.items()})
        images, boxes = openimages.write_expanded(
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
