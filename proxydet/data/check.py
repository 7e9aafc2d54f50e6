"""Checking annotation files and data sets: what will be used, mended and dropped, and whether a command would stop.

The answers are those of the annotation store, which training and evaluation read too: what is refused there is an error
here, and nothing else is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from proxydet.artifacts import how_to_get
from proxydet.data.config import PROTOCOL_NAMES, Protocol, protocol_of
from proxydet.data.dataset import (
    PARTS,
    Dataset,
    DatasetConfig,
    ImageLabelSpec,
    inner_root,
    names_annotations,
)
from proxydet.data.formats.voc import coco_files
from proxydet.data.image_labels import TarImages, open_label_images
from proxydet.data.images import (
    check_annotated_image,
    find_image,
    found_image,
    open_annotated_image,
    require_distinct_files,
    require_end,
)
from proxydet.data.records import Format
from proxydet.data.sources import holds_annotations, look
from proxydet.data.store import AnnotationStore
from proxydet.errors import DataError, InputError
from proxydet.files import sha256
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import counted, first_of

_READERS = 8
_AT_ONCE = 4096
_LOOKED_FOR = 100
_PIXELS = "pixels (--decode reads them)"
_EXPECTED = {
    "lvis_v1_train.json": (100_170, 1_270_141),
    "lvis_v1_val.json": (19_809, 244_707),
    "zhiyuan_objv2_val.json": (80_000, 1_240_587),
    "zhiyuan_objv2_val_fixname.json": (80_000, 1_240_587),
}
"""Images and annotations of files that everyone has the same of."""
_SOURCES = {
    "lvis": "lvis/lvis_v1_train.json",
    "coco": "coco/annotations/instances_train2017.json",
    "objects365": "objects365/annotations/zhiyuan_objv2_val.json",
    "openimages": "oid/annotations/challenge-2019-validation-detection-bbox.csv",
}
"""First source file of each data set that ``data prepare`` knows; its dataset config is named after it."""

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked."""

    part: str
    """Which part of the data set: ``vocabulary``, ``train``, ``val``, ``test``, ``image_labels``, ``annotations``."""
    level: Level
    """``error`` where training or evaluation will stop, ``warning`` where something is mended, dropped or doubtful."""
    text: str
    """What was found."""
    advice: str = ""
    """What to do about it."""
    deviation: str = ""
    """Of what kind the records are, as ``docs/reference/annotation-files.md`` names it; empty for other findings."""
    count: int = 0
    """How many records."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check found."""

    name: str
    """Name of the data set, or of the annotation file."""
    findings: tuple[Finding, ...]
    """In the order in which parts were checked."""
    unchecked: tuple[str, ...] = ()
    """What the verdict does not speak of, and why: ``evaluation (there is no [val])``, ``images (...)``, ``pixels (...)``."""

    @property
    def sound(self) -> bool:
        """Whether nothing found stops training, evaluation or prediction, as far as it is not `unchecked`."""
        return all(finding.level != "error" for finding in self.findings)


def check_path(
    path: Path,
    *,
    decode: bool = False,
    protocol: Protocol | None = None,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> list[CheckReport]:
    """Check what a path names: a dataset config, annotations of any format, or a data root.

    Args:
        path: A ``.toml`` file; a file or folder that `proxydet.data.sources.look` finds annotations in; or a folder with
            dataset configs.
        decode: Also decode every image, and read the stores against their checksums.
        protocol: How the annotations will be scored; None leaves it to them, as evaluation does.
        cache: Folder of annotation stores and tar indexes; None means the user's cache folder.
        progress: Where to show long steps.

    Returns:
        One report; for a data root one on the root itself, then one for each dataset config in it.

    Raises:
        DataError: there is no such file or folder, or the dataset config cannot be read.
    """
    if not os.path.exists(path):  # noqa: PTH110 - false for a name too long
        raise DataError(
            f"there is no file or folder {path}",
            hint="name an annotation file, a dataset config (.toml), the folder of an export, or a data root (the folder "
            "that proxydet download fills, or set PROXYDET_DATASETS)",
            path=path,
        )
    checker = _Checker(cache=cache, progress=progress, decode=decode, protocol=protocol)
    if not names_annotations(path):
        return [checker.dataset(DatasetConfig.from_toml(path))]
    configs = sorted(path.glob("*.toml")) if path.is_dir() else []
    data_root = configs or any((path / source).exists() for source in _SOURCES.values())
    if not data_root and (not path.is_dir() or holds_annotations(path)):
        return checker.annotations(path)
    reports = [checker.data_root(path, configs)]
    for config in configs:
        try:
            reports.append(checker.dataset(DatasetConfig.from_toml(config)))
        except InputError as error:
            checker.add("config", "error", error.message, error.hint or "")
            reports.append(checker.report(config.stem))
    return reports


def _any_image(store: AnnotationStore, roots: tuple[Path, ...]) -> bool:
    """Return whether any of the first images is where the annotations are."""
    for row in range(min(len(store), _LOOKED_FOR)):
        try:
            find_image(store.file_name(row), roots)
        except DataError as error:
            if error.path is None or not os.path.isfile(error.path):  # noqa: PTH113 - it is where several fit
                continue
        return True
    return False


def compare_parts(
    stores: dict[str, AnnotationStore],
    roots: dict[str, tuple[Path, ...]],
    base_names: frozenset[str] | None = None,
) -> list[tuple[str, str, str]]:
    """Compare the parts of a data set: images in two of them, classes only in one, names equal but for case.

    Args:
        stores: The annotations of each part.
        roots: Folders of the images of each part.
        base_names: Classes that training may use; None means all.

    Returns:
        Of each finding the part, what was found, and advice.
    """
    found = []
    names_of: dict[str, dict[str, list[str]]] = {}  # by what follows the last slash
    for part, store in stores.items():
        names = names_of[part] = {}
        for name in filter(None, dict.fromkeys(map(store.file_name, range(len(store))))):
            names.setdefault(name.replace("\\", "/").rpartition("/")[2], []).append(name)
    for one, other in combinations(stores, 2):
        same: list[Path] = []
        for last in names_of[one].keys() & names_of[other].keys():
            files, others = (
                [path for name in names_of[part][last] if (path := found_image(name, roots[part]))]
                for part in (one, other)
            )
            same += _copies(files, others)
        if same:
            are = "is" if len(same) == 1 else "are"
            text = f"{counted(len(same), 'image')} of {one} {are} in {other} too, e.g. {min(same)}"
            advice = "scores count images that were trained on: remove them"
            if one != "train":
                advice = f"{other} is then no check on what was chosen by {one}: remove them"
            found.append((other, text, advice))
    used = {
        part: {store.categories[row].name.strip() for row in np.unique(store.column("category"))}
        for part, store in stores.items()
    }
    for part in ("val", "test"):
        lone = sorted(used.get(part, set()) - used.get("train", set()))
        lone = [name for name in lone if base_names is None or name in base_names]
        if lone and "train" in used:
            shown = first_of([repr(name) for name in lone])
            text = f"{counted(len(lone), 'class has', 'classes have')} objects in {part} and none in train: {shown}"
            found.append((part, text, "nothing is trained for them"))
    spelt: dict[str, set[str]] = {}
    for store in stores.values():
        for name in (category.name.strip() for category in store.categories):
            spelt.setdefault(name.casefold(), set()).add(name)
    twice = [" and ".join(map(repr, sorted(names))) for names in spelt.values() if len(names) > 1]
    if twice:
        text = f"class names that are equal but for case: {first_of(twice)}"
        found.append((next(iter(stores)), text, "they are different classes: write one name"))
    return found


def _copies(files: list[Path], others: list[Path]) -> list[Path]:
    """Return those of some files that are among others, or are copies of one of them."""
    by_size: dict[int, list[Path]] = {}
    for other in others:
        with suppress(OSError):
            by_size.setdefault(other.stat().st_size, []).append(other)
    digest = cache(sha256)
    found = []
    for file in files:
        with suppress(OSError):
            of_size = by_size.get(file.stat().st_size, ())
            if any(map(file.samefile, of_size)) or digest(file) in map(digest, of_size):
                found.append(file)
    return found


@dataclass(kw_only=True)
class _Checker:
    cache: Path | None
    progress: Progress
    decode: bool
    protocol: Protocol | None = None
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def add(self, part: str, level: Level, text: str, advice: str = "", **more: Any) -> None:
        """Add a finding to those of the next report; ``more``: its ``deviation`` and ``count``."""
        self.findings.append(Finding(part=part, level=level, text=text, advice=advice, **more))

    def failed(self, part: str, error: InputError, text: str = "") -> None:
        """Add an error as a finding, with the command that fetches its file where that is absent."""
        # False, where Path.exists raises: a name too long for the disk.
        absent = error.path is not None and not os.path.exists(error.path)  # noqa: PTH110
        advice = how_to_get(error.path) if absent else None
        self.add(part, "error", text or error.message, advice or error.hint or "")

    def report(self, name: str) -> CheckReport:
        """Return what was found since the last report."""
        found, self.findings = self.findings, []
        unchecked, self.unchecked = dict.fromkeys(self.unchecked), []
        return CheckReport(name=name, findings=tuple(found), unchecked=tuple(unchecked))

    def data_root(self, root: Path, configs: list[Path]) -> CheckReport:
        """Check which data sets of a data root are prepared."""
        unprepared = [
            (source, f"{name} is not prepared", name)
            for name, source in _SOURCES.items()
            if (root / source).exists() and not (root / f"{name}.toml").exists()
        ]
        tars, lvis = root / "imagenet/ImageNet-21K", root / "lvis.toml"
        if tars.is_dir() and lvis.is_file() and b"[image_labels]" not in lvis.read_bytes():
            source = str(tars.relative_to(root))
            unprepared.append((source, "lvis.toml does not use it", "imagenet-lvis"))
        for source, lack, name in unprepared:
            advice = f"run: proxydet data prepare {name}"
            self.add("root", "warning", f"{source} is there, but {lack}", advice)
        if configs:
            self.add("root", "ok", counted(len(configs), "dataset config"))
        elif not unprepared:
            text = (
                f"{root} holds neither a dataset config (*.toml) nor annotations of a known format: "
                + ", ".join(get_args(Format))
            )
            named = coco_files(root)
            advice = inner_root(root) or (
                "name the folder of an export, or its annotation file; for the published data sets run: "
                "proxydet download lvis coco metadata; then: proxydet data prepare lvis"
            )
            if named:
                advice = f"name the annotation file: {first_of(named)}"
            self.add("root", "error", text, advice)
        return self.report(str(root))

    def annotations(self, path: Path) -> list[CheckReport]:
        """Check annotations on their own, each part, and their images where the format or the folder has some."""
        try:
            found = look(path)
        except DataError as error:
            self.failed("annotations", error)
            return [self.report(str(path))]
        for place in found.left_out:
            self.add(
                "annotations", "warning", f"{place} is of no part (train, val, test): not checked"
            )
        for line in found.damaged:
            self.add("annotations", "warning", f"{line}: not checked", "get the file again")
        for what in found.unsearched:
            self.add("annotations", "warning", f"not searched: {what}", "name the annotations")
        reports = []
        stores: dict[str, AnnotationStore] = {}
        for name, source in found.parts.items():
            part = name or "annotations"
            opened = partial(
                AnnotationStore.open, source, cache=self.cache, progress=self.progress, warn=False
            )
            if (store := self._store(part, source.annotations, opened)) is not None:
                stores[part] = store
                self._trainable(store, part)
                unnamed = "image.name" in store.report.counts
                near = path.is_dir() or found.format != "COCO JSON" or unnamed
                if near or _any_image(store, source.roots):
                    self._images(store, source.roots, "images" if not name else part, exact=True)
                elif len(store):
                    text = f"not checked: none of them is in {first_of(source.roots)}"
                    advice = "name the folder of both, or a dataset config: proxydet data init --images FOLDER"
                    self.add("images", "warning", text, advice)
                    self.unchecked.append("images (none is next to the file)")
            if name == [*found.parts][-1]:
                roots = {part: found.parts[part if name else ""].roots for part in stores}
                for other, text, advice in compare_parts(stores, roots):
                    self.add(other, "warning", text, advice)
            if not path.is_dir() or len(found.parts) == 1:
                reports.append(self.report(str(path)))
            else:
                reports.append(self.report(f"{path}, {part}"))
        return reports

    def dataset(self, description: DatasetConfig) -> CheckReport:
        """Check a data set."""
        stores: dict[str, AnnotationStore] = {}
        data = Dataset(config=description, cache=self.cache, progress=self.progress, warn=False)
        for split in PARTS:
            if getattr(description, split) is None:
                if split != "test":
                    purpose = "training" if split == "train" else "evaluation"
                    self.unchecked.append(f"{purpose} (there is no [{split}])")
                if split == "val" and description.train is not None:
                    advice = "add [val] with annotations and images; without it choose a part: proxydet eval --split train"
                    self.add("val", "warning", "there is no [val]: evaluation has no part", advice)
                continue
            spec = description.split(split)
            opened = partial(data.opened, split)
            if (store := self._store(split, spec.annotations, opened)) is not None:
                stores[split] = store
                self._images(store, spec.roots, split, exact=split == "train")
        if all(getattr(description, part) is None for part in PARTS):
            self.add("train", "error", "there is no table [train], [val] or [test]", "add one")
        if not stores:
            return self.report(description.name)
        try:
            vocabulary = data.vocabulary
            if "train" in stores:
                vocabulary.require_plain()
            names = vocabulary.reported
            rows_K = {split: store.class_rows(names) for split, store in stores.items()}
        except InputError as error:
            self.failed("vocabulary", error)
            return self.report(description.name)
        classes = f"{len(vocabulary)} classes of {vocabulary.dimension} dimensions"
        self.add("vocabulary", "ok", f"{classes}, {int((~vocabulary.base).sum())} of them novel")
        roots = {split: description.split(split).roots for split in stores}
        base = frozenset(n for n, b in zip(vocabulary.names, vocabulary.base, strict=True) if b)
        for part, text, advice in compare_parts(stores, roots, base):
            self.add(part, "warning", text, advice)
        if "train" in stores:
            self._trainable(stores["train"], "train", vocabulary.base[rows_K["train"]])
            if description.image_labels is not None:
                self._labels(description.image_labels, vocabulary, stores["train"])
        return self.report(description.name)

    def _store(
        self, part: str, path: Path, opened: Callable[[], AnnotationStore]
    ) -> AnnotationStore | None:
        """Open annotations, and say what is used, mended and dropped; None where they are refused."""
        try:
            store = opened()
            report = store.report
            text = (
                f"{path.name} ({store.format}): {counted(report.images_kept, 'image')}, "
                f"{counted(report.annotations_kept, 'annotation')}, "
                f"{counted(len(store.categories), 'category', 'categories')}; annotations: {report.without_mask} of "
                f"them without a mask, {report.crowds} of them crowds"
            )
            self.add(part, "ok" if report.annotations_kept else "warning", text)
            self._deviations(store, part)
            counts = (report.images_in, report.annotations_in)
            images, annotations = _EXPECTED.get(path.name, counts)
            if counts != (images, annotations):
                text = (
                    f"{path.name} has {counts[0]} images and {counts[1]} annotations, the published file {images} and "
                    f"{annotations}"
                )
                advice = f"fine for a part of it; else {how_to_get(path) or 'get it again'}"
                self.add(part, "warning", text, advice)
            if 0 < report.without_mask < report.annotations_kept:
                text = (
                    f"{counted(report.without_mask, 'annotation has', 'annotations have')} a box and no mask: they train "
                    "boxes, and count neither way when masks are scored"
                )
                self.add(part, "warning", text)
            try:
                protocol = self.protocol or protocol_of(store)
                self.add(part, "ok", f"scored by the protocol of {PROTOCOL_NAMES[protocol]}")
            except InputError as error:
                if part != "train":
                    raise
                # Training does not ask for a protocol; evaluating on these annotations would.
                protocol = "coco"
                self.add(part, "warning", error.message, error.hint or "")
            try:
                store.require_objects(groups=protocol == "openimages" and part != "train")
            except InputError as error:
                if part != "test":
                    raise
                # Only eval --split test asks for them.
                self.add(part, "warning", error.message, error.hint or "")
                self.unchecked.append("evaluation of [test] (it has no objects to score)")
        except InputError as error:
            self.failed(part, error)
            return None
        if self.decode and (damaged := store.damaged_columns()):
            text = f"the store {store.path} changed: {damaged}"
            self.add(part, "error", text, "delete it and repeat")
        return store

    def _deviations(self, store: AnnotationStore, part: str) -> None:
        report = store.report
        for key, line in zip(report.by_fate(), report.lines(), strict=True):
            self.add(part, "warning", line, deviation=key, count=report.counts[key])

    def _images(
        self, store: AnnotationStore, roots: tuple[Path, ...], part: str, *, exact: bool
    ) -> None:
        """Check that images are there and of the annotated size; evaluation takes the EXIF orientation that fits."""
        try:
            require_distinct_files(store, roots)
        except InputError as error:
            self.failed(part, error)
            if "image.name" in store.report.counts:
                return  # an image without a name has no file to look for
        check = open_annotated_image if self.decode else check_annotated_image
        turn = True if exact else None
        seen = f"{'were decoded and' if self.decode else 'are there and'} have the annotated size"
        self._readable(part, len(store), lambda row: check(store.record(row), roots, turn), seen)

    def _readable(
        self, part: str, count: int, check: Callable[[int], object], seen: str, advice: str = ""
    ) -> None:
        """Check images by several threads, and say which cannot be used, or what was ``seen`` of all of them."""

        def problem(row: int) -> DataError | None:
            try:
                check(row)
            except DataError as error:
                return error
            return None

        problems: list[DataError] = []
        with (
            self.progress.task(f"checking images of {part}", total=count, unit="images") as task,
            ThreadPoolExecutor(_READERS) as pool,
        ):
            # In portions: a pool takes note of all images at once.
            for start in range(0, count, _AT_ONCE):
                for found in pool.map(problem, range(start, min(start + _AT_ONCE, count))):
                    task.advance()
                    if found is not None:
                        problems.append(found)
        if problems:
            unusable = f"{len(problems)} of {counted(count, 'image')} cannot be used"
            first = problems[0]
            error = DataError(first.message, hint=advice) if advice else first
            self.failed(part, error, f"{unusable}, e.g.: {first.message}")
        elif count:
            self.add(part, "ok", f"all {count} images {seen}")
            self.unchecked += [] if self.decode else [_PIXELS]

    def _trainable(
        self, store: AnnotationStore, part: str, base_K: npt.NDArray[np.bool_] | None = None
    ) -> None:
        try:
            store.require_trainable(base_K)
        except InputError as error:
            self.failed(part, error)

    def _labels(self, spec: ImageLabelSpec, vocabulary: Vocabulary, store: AnnotationStore) -> None:
        part = "image_labels"
        try:
            opening = partial(open_label_images, cache=self.cache, progress=self.progress)
            images = opening(spec, vocabulary, store.categories, warn=False)
        except InputError as error:
            self.failed(part, error)
            return
        if isinstance(images, TarImages):
            held = f"{counted(len(images), 'image')} in {counted(len(images.tars), 'tar')}"
            self.add(part, "ok" if len(images) else "error", held)
            for _, text, advice in images.notes():
                self.add(part, "warning", text, advice)
        else:
            self.add(part, "ok", f"{counted(len(images), 'image')} with labels")
            self._deviations(images.store, part)
        advice = "fetch them again, or train with data.unreadable_images=skip"
        if self.decode:
            decode = partial(images.image, exif_orientation=True)
            self._readable(part, len(images), decode, "were decoded", advice)
        elif isinstance(images, TarImages):  # that members of a tar are images, its index knows
            self.unchecked += [_PIXELS] if len(images) else []
        else:
            encoded = images.encoded
            self._readable(
                part, len(images), lambda row: require_end(encoded(row)), "are there", advice
            )
