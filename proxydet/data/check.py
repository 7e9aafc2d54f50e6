"""Looking at a data set and saying what is wrong with it and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from proxydet.data.advice import how_to_get
from proxydet.data.classes import class_rows, load_vocabulary, open_split
from proxydet.data.description import DatasetDescription
from proxydet.data.image_labels import TarImages, open_label_images, unusable_label_images
from proxydet.data.images import find_image, open_annotated_image, require_distinct_files
from proxydet.data.store import AnnotationStore
from proxydet.errors import DataError, InputError
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import counted

_READERS = 8
_EXPECTED = {
    "lvis_v1_train.json": (100_170, 1_270_141),
    "lvis_v1_val.json": (19_809, 244_707),
    "zhiyuan_objv2_val.json": (80_000, 1_240_587),
    "zhiyuan_objv2_val_fixname.json": (80_000, 1_240_587),
}
"""Images and annotations of files that everyone has the same of."""
_MEND = "mend the annotation file; its other entries are used"

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    part: str
    """Which part of the data set: ``vocabulary``, ``train``, ``val``, ``image_labels``."""
    level: Level
    """``error`` where training or evaluation will fail, ``warning`` where something is lost."""
    text: str
    """What was found."""
    advice: str = ""
    """What to do about it."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check found."""

    name: str
    """Name of the data set."""
    findings: tuple[Finding, ...]
    """In the order in which parts were looked at."""

    @property
    def sound(self) -> bool:
        """Whether nothing found makes training or evaluation fail."""
        return all(finding.level != "error" for finding in self.findings)


def check_dataset(
    description: DatasetDescription,
    *,
    decode: bool = False,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> CheckReport:
    """Check that all files of a data set are there and fit together.

    Args:
        description: The data set.
        decode: Also decode every image, compare the size of annotated ones, and read the stores against their
            checksums.
        cache: Folder of annotation stores and tar indexes; None means the user's cache folder.
        progress: Where to show long steps.
    """
    checker = _Checker(cache=cache, progress=progress, decode=decode)
    checker.check(description)
    return CheckReport(name=description.name, findings=tuple(checker.findings))


@dataclass(kw_only=True)
class _Checker:
    cache: Path | None
    progress: Progress
    decode: bool
    findings: list[Finding] = field(default_factory=list)

    def check(self, description: DatasetDescription) -> None:
        stores: dict[str, AnnotationStore] = {}
        for split in ("train", "val"):
            if getattr(description, split) is None:
                continue
            store = self._store(description, split)
            if store is not None:
                stores[split] = store
                self._images(store, description.split(split).roots, split)
        if description.train is None and description.val is None:
            self._add("train", "error", "neither [train] nor [val] is described", "add one")
        vocabulary = self._vocabulary(description, stores)
        if description.image_labels is not None and vocabulary is not None and "train" in stores:
            self._labels(description, vocabulary, stores["train"])

    def _add(self, part: str, level: Level, text: str, advice: str = "") -> None:
        self.findings.append(Finding(part=part, level=level, text=text, advice=advice))

    def _failed(self, part: str, error: InputError, text: str = "") -> None:
        absent = error.path is not None and not error.path.exists()
        advice = how_to_get(error.path) if absent else None
        self._add(part, "error", text or error.message, advice or error.hint or "")

    def _store(self, description: DatasetDescription, split: str) -> AnnotationStore | None:
        try:
            store = open_split(
                description, split, cache=self.cache, progress=self.progress, warn=False
            )
        except InputError as error:
            self._failed(split, error)
            return None
        report = store.report
        counts = (report.images_in, report.annotations_in)
        name = description.split(split).annotations.name
        self._add(
            split,
            "ok" if report.images_kept else "error",
            f"{name}: {report.images_kept} images, {report.annotations_kept} annotations, "
            f"{len(store.categories)} categories",
            "" if report.images_kept else "there is nothing to read",
        )
        for line in report.lines():
            self._add(split, "warning", line, _MEND)
        if counts != _EXPECTED.get(name, counts):
            self._add(
                split,
                "warning",
                f"{name} has {counts[0]} images and {counts[1]} annotations, the published file "
                f"{_EXPECTED[name][0]} and {_EXPECTED[name][1]}",
                f"fine for a part of it; else {how_to_get(description.split(split).annotations) or 'get it again'}",
            )
        if report.without_mask and store.has_masks:
            self._add(
                split,
                "warning",
                f"{counted(report.without_mask, 'annotation has', 'annotations have')} a box and no mask; "
                "training leaves what has no mask out",
                "train on boxes only with data.masks=false",
            )
        if self.decode and (damaged := store.damaged_columns()):
            self._add(
                split, "error", f"the store {store.path} changed: {damaged}", "delete it and repeat"
            )
        return store

    def _images(self, store: AnnotationStore, roots: tuple[Path, ...], split: str) -> None:
        try:
            require_distinct_files(store, roots)
        except InputError as error:
            self._failed(split, error)
        problems: list[DataError] = []
        with (
            self.progress.task(
                f"checking images of {split}", total=len(store), unit="images"
            ) as task,
            ThreadPoolExecutor(_READERS) as pool,
        ):
            for problem in pool.map(
                lambda row: _image_problem(store, row, roots, split, self.decode), range(len(store))
            ):
                task.advance()
                if problem:
                    problems.append(problem)
        if problems:
            first = problems[0]
            text = f"{len(problems)} of {len(store)} images cannot be used, e.g.: {first.message}"
            self._failed(split, first, text)
        elif len(store):
            seen = "were decoded and have the annotated size" if self.decode else "are there"
            self._add(split, "ok", f"all {len(store)} images {seen}")

    def _vocabulary(
        self, description: DatasetDescription, stores: dict[str, AnnotationStore]
    ) -> Vocabulary | None:
        if not stores:
            return None
        try:
            vocabulary = load_vocabulary(description, cache=self.cache)
            for store in stores.values():
                class_rows(store, vocabulary)
        except InputError as error:
            self._failed("vocabulary", error)
            return None
        novel = int((~vocabulary.base).sum())
        self._add(
            "vocabulary",
            "ok",
            f"{len(vocabulary)} classes of {vocabulary.dimension} dimensions, {novel} of them novel",
        )
        return vocabulary

    def _labels(
        self, description: DatasetDescription, vocabulary: Vocabulary, store: AnnotationStore
    ) -> None:
        part, spec = "image_labels", description.image_labels
        if spec is None:
            return
        try:
            images = open_label_images(
                spec,
                vocabulary,
                store.categories,
                cache=self.cache,
                progress=self.progress,
                warn=False,
            )
        except InputError as error:
            self._failed(part, error)
            return
        if isinstance(images, TarImages):
            self.findings.extend(_tar_findings(images))
        else:
            self._add(part, "ok", f"{counted(len(images), 'image')} with labels")
            for line in images.store.report.lines():
                self._add(part, "warning", line, _MEND)
        problems = unusable_label_images(images, decode=self.decode, progress=self.progress)
        if problems:
            self._add(
                part,
                "error",
                f"{len(problems)} of {counted(len(images), 'image')} cannot be used, e.g.: {problems[0]}",
                "fetch them again, or train with data.unreadable_images=skip",
            )
        elif len(images) and self.decode:
            self._add(part, "ok", f"all {len(images)} images were decoded")


def _image_problem(
    store: AnnotationStore, row: int, roots: tuple[Path, ...], split: str, decode: bool
) -> DataError | None:
    try:
        if decode:
            # Training follows data.exif_orientation; evaluation takes the orientation that fits.
            open_annotated_image(store.record(row), roots, True if split == "train" else None)
        else:
            find_image(store.file_name(row), roots)
    except DataError as error:
        return error
    return None


def _tar_findings(images: TarImages) -> Iterator[Finding]:
    part, index, matched = "image_labels", images.index, images.matched
    level: Level = "ok" if len(index) else "error"
    yield Finding(
        part=part,
        level=level,
        text=f"{counted(len(index), 'image')} in {counted(len(index.tars), 'tar')}",
    )
    for line in index.report.lines():
        yield Finding(part=part, level="warning", text=line, advice="fetch what is named again")
    for names, what, advice in (
        (matched.missing, "expected and not there", "get them, or train without these classes"),
        (
            matched.without_class,
            "of no class, not used",
            "name their classes by 'map' if they have one",
        ),
    ):
        if names:
            text = f"{counted(len(names), 'tar')} {what}, e.g. {', '.join(names[:3])}"
            yield Finding(part=part, level="warning", text=text, advice=advice)
