"""The steps of ``proxydet data prepare``, each made only where its result is absent or older than its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from proxydet.data.advice import how_to_get, inner_root
from proxydet.data.classes import load_vocabulary, open_split
from proxydet.data.description import DatasetDescription
from proxydet.data.image_labels import match_tars
from proxydet.data.prepare import coco_zero_shot, lvis, objects365, openimages
from proxydet.data.prepare.descriptions import description_text, write_description
from proxydet.data.store import AnnotationStore
from proxydet.data.tars import TarIndex
from proxydet.errors import DataError
from proxydet.reporting import SILENT, Progress
from proxydet.wording import counted

DatasetName = Literal["lvis", "imagenet-lvis", "objects365", "openimages", "coco"]
Action = Literal["made", "up to date", "kept"]
DATASETS: tuple[DatasetName, ...] = ("lvis", "imagenet-lvis", "objects365", "openimages", "coco")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step and its result."""

    name: str
    """What the step is for."""
    path: Path
    """The file that it makes."""
    action: Action
    """Whether it was made now, was there already, or is a description that the user changed."""
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

    def store(self, source: str) -> AnnotationStore:
        """Make the annotation store of a file."""
        path = self.root / source
        self._time(source)
        there = AnnotationStore.path_for(path, cache=self.cache).exists()
        store = AnnotationStore.open(path, cache=self.cache, progress=self.progress, warn=False)
        report = store.report
        images, annotations = report.images_kept, report.annotations_kept
        detail = f"{counted(images, 'image')}, {counted(annotations, 'annotation')}"
        self.steps.append(
            Step(
                name="annotation store",
                path=store.path,
                action="up to date" if there else "made",
                detail=detail,
            )
        )
        self.problems.extend(f"{path.name}: {line}" for line in report.lines())
        if not images:
            self.problems.append(f"{path.name} has no image that can be used")
        return store

    def description(self, name: str, text: str) -> Path:
        """Write a data description."""
        path = self.root / f"{name}.toml"
        action = write_description(path, text)
        detail = "left as it is: it was changed by hand" if action == "kept" else ""
        self.steps.append(Step(name="data description", path=path, action=action, detail=detail))
        return path

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
        left_out = lvis.write_without_frequencies(source, path)
        return f"{counted(left_out, 'annotation')} of rare classes left out"

    def category_info(path: Path, *, with_rare: bool) -> str:
        lvis.write_category_info(source, path, with_rare=with_rare)
        return (
            "counts of rare classes included, as published" if with_rare else "rare classes count 0"
        )

    work.file("without rare classes", "lvis/lvis_v1_train_norare.json", [train], without_rare)
    info = "lvis/lvis_v1_train_cat_info.json"
    work.file("class counts", info, [train], lambda path: category_info(path, with_rare=True))
    clean = "lvis/lvis_v1_train_norare_cat_info.json"
    work.file("class counts", clean, [train], lambda path: category_info(path, with_rare=False))
    has_tars = (work.root / "imagenet/ImageNet-21K").is_dir()
    work.description("lvis", description_text("lvis", image_labels=has_tars))


def _imagenet_lvis(work: _Work) -> None:
    tars = work.root / "imagenet/ImageNet-21K"
    if not tars.is_dir():
        raise DataError(
            f"there is no folder of tars {tars}",
            hint=inner_root(work.root)
            or "put the tars of ImageNet-21K there (n02691156.tar, ...); proxydet download imagenet-21k-lvis says how",
            path=tars,
        )
    path = work.description("lvis", description_text("lvis", image_labels=True))
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
    detail = f"{inside}, {index.report.gzipped} gzip-compressed"
    action: Action = "up to date" if there else "made"
    work.steps.append(Step(name="tar index", path=index.path, action=action, detail=detail))
    work.problems.extend(index.report.lines())
    if matched.missing:
        shown = ", ".join(matched.missing[:5])
        absent = counted(len(matched.missing), "tar is", "tars are")
        work.problems.append(f"{absent} missing, e.g. {shown}")
    if matched.without_class:
        unused = counted(len(matched.without_class), "tar belongs", "tars belong")
        work.problems.append(f"{unused} to no class and not used")


def _objects365(work: _Work) -> None:
    source = "objects365/annotations/zhiyuan_objv2_val.json"
    fixes = "metadata/Objects365_names_fix.csv"

    def fix(path: Path) -> str:
        changed = objects365.write_with_fixed_names(work.root / source, work.root / fixes, path)
        return f"{counted(changed, 'name')} changed"

    fixed = "objects365/annotations/zhiyuan_objv2_val_fixname.json"
    work.file("names set right", fixed, [source, fixes], fix)
    work.store(fixed)
    work.description("objects365", description_text("objects365"))


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

    expanded = "oid/annotations/oid_challenge_2019_val_expanded.json"
    work.file("hierarchy expanded", expanded, list(names.values()), expand)
    work.store(expanded)
    work.description("openimages", description_text("openimages"))


def _coco(work: _Work) -> None:
    splits = {
        "train2017": ("seen", coco_zero_shot.SEEN),
        "val2017": ("all", (*coco_zero_shot.SEEN, *coco_zero_shot.UNSEEN)),
    }
    for split, (suffix, names) in splits.items():
        source = f"coco/annotations/instances_{split}.json"
        work.store(source)

        def write(path: Path, source: str = source, names: tuple[str, ...] = names) -> str:
            images, boxes = coco_zero_shot.write_split(work.root / source, path, names)
            return f"{counted(images, 'image')}, {counted(boxes, 'annotation')} of {len(names)} classes"

        target = f"coco/zero-shot/instances_{split}_{suffix}_2_oriorder.json"
        work.file("zero-shot split", target, [source], write)
    work.description("coco", description_text("coco"))
    text = description_text("coco_zero_shot", novel=coco_zero_shot.UNSEEN)
    work.description("coco_zero_shot", text)
