"""A data set as one TOML file describes it (the dataset config): annotation files, image folders, text embeddings, novel classes.

See ``docs/reference/dataset-config.md``. Paths in the file are relative to the file.

Dimensions: C classes of the vocabulary, K categories of an annotation file.
"""

from __future__ import annotations

import dataclasses
import shlex
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from proxydet.artifacts import how_to_get
from proxydet.config import from_mapping, parse_toml
from proxydet.data.records import AnnotationSource, WithImages
from proxydet.data.store import AnnotationStore
from proxydet.errors import ConfigError, DataError, VocabularyError
from proxydet.extensions import require_python_path
from proxydet.files import read_text
from proxydet.paths import datasets_folder, did_you_mean
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.names import read_names
from proxydet.vocabulary.vocabulary import Vocabulary, load_embeddings
from proxydet.wording import first_of, nearest

PARTS = ("train", "val", "test")
"""The tables of a dataset config that hold annotated images."""
_LARGEST_FILE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class VocabularySpec:
    """The table ``[vocabulary]``: class names, text embeddings, and what is novel."""

    embeddings: Path
    """A ``.npy`` table (classes, dimensions) whose rows are in ascending order of the category ids, or a vocabulary
    that `Vocabulary.save` wrote."""

    names: tuple[str, ...] = ()
    """Class name of each row of the embeddings, where they are not all the categories of the annotation file in
    ascending order of their ids; categories are then found by name. In a TOML file also a file of names."""

    novel: tuple[str, ...] = ()
    """Names of the classes whose annotations training must not see."""

    novel_frequency: tuple[str, ...] = ()
    """Frequency groups of LVIS (``"r"``, ``"c"``, ``"f"``) whose classes are novel."""

    encoder: str | None = None
    """The text encoder that made the embeddings (a file, or a name that ``proxydet vocab build`` knows), for
    encoding other class names."""

    def __post_init__(self) -> None:
        wrong = sorted(set(self.novel_frequency) - {"r", "c", "f"})
        if wrong:
            raise ConfigError(f"novel_frequency holds {wrong[0]!r}; it can hold 'r', 'c' and 'f'")


def names_annotations(path: Path) -> bool:
    """Whether a path names annotations, of whatever format: it does, unless it ends as a dataset config (``.toml``)."""
    return path.suffix.lower() != ".toml"


@dataclass(frozen=True, kw_only=True)
class ImageLabelSpec(WithImages):
    """The table ``[image_labels]``: images of which only the class is known."""

    tars: Path | None = None
    """Folder of ``<key>.tar``, each with the images of one class."""

    map: dict[str, str] = dataclasses.field(default_factory=dict)
    """Class name of each key. A key that is not here is looked for among the categories' ``wnid``, ``synset`` and
    ``name``, and in the WordNet ids of ImageNet-LVIS."""

    annotations: Path | None = None
    """Instead of tars: a JSON file whose images have ``pos_category_ids``."""

    images: Path | tuple[Path, ...] = ()
    """Folders of the images of ``annotations``."""

    def __post_init__(self) -> None:
        if (self.tars is None) == (self.annotations is None):
            raise ConfigError("give either tars or annotations")
        if (self.annotations is None) != (not self.images):
            raise ConfigError("annotations and images go together")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A data set. All paths are absolute.

    Make one with `from_toml`, or with `proxydet.data.sources.open_config` of annotations alone.
    """

    name: str
    """Name of the data set, for messages and run folders."""

    vocabulary: VocabularySpec | None = None
    """Classes; what only counts or draws annotations does without, and takes the annotations' own categories."""

    train: AnnotationSource | None = None
    """Annotated images to train on."""

    val: AnnotationSource | None = None
    """Annotated images to evaluate on."""

    test: AnnotationSource | None = None
    """Annotated images for a last evaluation (``eval --split test``)."""

    image_labels: ImageLabelSpec | None = None
    """Images with class labels to train on."""

    def __post_init__(self) -> None:
        for part in (self.train, self.val, self.test):
            if part is not None and part.reader is not None:
                require_python_path(part.reader, "reader")

    @classmethod
    def from_toml(cls, path: Path | str) -> DatasetConfig:
        """Read a dataset config.

        Raises:
            DataError: the file is absent or not TOML, a key is unknown or missing, or a value has the wrong type.
                Whether the files that it names exist is checked when they are opened.
            VocabularyError: ``vocabulary.names`` is a file that holds no class names.
        """
        path = Path(path)
        try:
            content = parse_toml(read_text(path, limit=_LARGEST_FILE), str(path), path)
        except (OSError, ValueError, ConfigError) as error:
            why = (
                error.message if isinstance(error, ConfigError) else f"cannot read {path}: {error}"
            )
            hint = "correct that line; proxydet data init PATH writes a config to compare with"
            init = f"proxydet data init {shlex.quote(str(path))}"
            if isinstance(error, FileNotFoundError):
                why, made = f"there is no dataset config {path}", command_that_makes(path)
                hint = f"{did_you_mean(path) or 'check the path, or '}write it with: proxydet data init PATH -o {shlex.quote(str(path))}"
                hint = f"get its data and write it with: {made}" if made else hint
            elif isinstance(error, IsADirectoryError):
                why = f"{path} is a folder, not a dataset config"
                names = [config.as_posix() for config in sorted(path.glob("*.toml"))]
                hint = f"name one in it: {first_of(names)}" if names else f"write one with: {init}"
            elif path.suffix.lower() != ".toml":
                hint = f"write one for it with: {init}"
            raise DataError(why, hint=hint, path=path) from error
        table = content.get("vocabulary")
        if isinstance(table, dict) and isinstance(table.get("names"), str):
            file = path.resolve().parent / Path(table["names"]).expanduser()
            table["names"] = [entry.name for entry in read_names(file)]
        try:
            description = from_mapping(cls, content)
        except ConfigError as error:
            raise DataError(f"{path}: {error.message}", hint=error.hint, path=path) from error
        resolved: DatasetConfig = _absolute(description, path.resolve().parent)
        return resolved

    @property
    def classes(self) -> VocabularySpec:
        """The table ``[vocabulary]``; DataError where there is none."""
        if self.vocabulary is None:
            raise DataError(
                f"the data set {self.name!r} has no text embeddings",
                hint="write a dataset config with them: proxydet data init PATH",
            )
        return self.vocabulary

    def split(self, name: str) -> AnnotationSource:
        """Return the split ``name``.

        Raises:
            DataError: it is none of ``train``, ``val`` and ``test``, or the config has no such table.
        """
        found: AnnotationSource | None = getattr(self, name) if name in PARTS else None
        if found is None:
            there = " or ".join(part for part in PARTS if getattr(self, part) is not None)
            why = f"the data set {self.name!r} has no [{name}] table"
            hint = (
                f"choose {there}, or add [{name}] with annotations and images to its dataset config"
            )
            if name not in PARTS:
                why = f"there is no split {name!r}"
                hint = "a dataset config has train, val and test"
            elif self.vocabulary is None:
                why = f"the annotations {self.name!r} have no part {name}"
                hint = f"choose {there}, or name the annotations of {name} themselves"
            raise DataError(why, hint=hint)
        return found


def _absolute(value: Any, folder: Path) -> Any:
    """Return a copy of a config with its paths relative to ``folder`` made absolute."""
    if isinstance(value, Path):
        return folder / value.expanduser()
    if isinstance(value, tuple):
        return tuple(_absolute(item, folder) for item in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed = {
        item.name: _absolute(getattr(value, item.name), folder)
        for item in dataclasses.fields(value)
    }
    if isinstance(value, VocabularySpec) and value.encoder and (folder / value.encoder).exists():
        changed["encoder"] = str(folder / value.encoder)
    return dataclasses.replace(value, **changed)


def inner_root(folder: Path) -> str | None:
    """Return what to do where a folder is not the data root but holds it; None where it does not.

    ``proxydet download --root FOLDER`` puts data sets into ``FOLDER/datasets``, which is the data root.
    """
    inner = folder / "datasets"
    return f"the data root is the folder inside it: name {inner}" if inner.is_dir() else None


class ClassTable(NamedTuple):
    """The classes of a data set.

    Attributes:
        names: C class names.
        base: bool (C,), whether training may use a class's annotations.
    """

    names: tuple[str, ...]
    base: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set, opened: what its config names is read when it is first asked for, and once.

    Attributes:
        config: What belongs to it.
        cache: Folder of annotation stores and tar indexes; None means the user's cache folder.
        progress: Where the conversion of annotations is shown.
        warn: As for `AnnotationStore.open`.
    """

    config: DatasetConfig
    cache: Path | None = None
    progress: Progress = SILENT
    warn: bool = True

    @cached_property
    def _stores(self) -> dict[str, AnnotationStore]:
        return {}

    def opened(self, split: str) -> AnnotationStore:
        """Return the annotations of ``train``, ``val`` or ``test``, which may hold nothing to use.

        Raises:
            DataError: the config has no such split, or its annotations cannot be read.
        """
        if split not in self._stores:
            source = self.config.split(split)
            if self.config.vocabulary is not None and not source.annotations.exists():
                raise DataError(
                    f"there are no annotations {source.annotations}, which the dataset config names",
                    hint=f"correct 'annotations' under [{split}]; it is relative to the dataset config's folder",
                    path=source.annotations,
                )
            self._stores[split] = AnnotationStore.open(
                source, cache=self.cache, progress=self.progress, warn=self.warn
            )
        return self._stores[split]

    def store(self, split: str) -> AnnotationStore:
        """Return the annotations of a split as `opened` does; DataError where they have nothing to use."""
        store = self.opened(split)
        store.require_objects(groups=split != "train")
        return store

    @property
    def named_store(self) -> AnnotationStore:
        """The annotations whose categories are the classes: of training, else of validation; errors as of `store`."""
        parts = (part for part in PARTS if getattr(self.config, part) is not None)
        return self.store(next(parts, "train"))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The classes with their text embeddings and the base / novel split.

        The names come from ``names``, or from the ``.npz``, or from the categories of `named_store`.

        Raises:
            VocabularyError: embeddings and names do not fit, or a novel class is unknown.
            DataError: a file cannot be read.
        """
        spec = self.config.classes
        store = self.named_store
        # By content: a saved vocabulary may have any name.
        if spec.embeddings.is_file() and zipfile.is_zipfile(spec.embeddings):
            vocabulary = Vocabulary.load(spec.embeddings)
            if spec.names and spec.names != vocabulary.names:
                raise VocabularyError(
                    f"{spec.embeddings} holds its own class names, which differ from 'names'",
                    hint="leave 'names' out of the dataset config",
                    path=spec.embeddings,
                )
        else:
            table = _load_table(spec.embeddings)
            names = spec.names or tuple(category.name.strip() for category in store.categories)
            root, extra = store.root_category, table.ndim == 2 and len(table) == len(names) + 1
            if root is not None and not spec.names and extra:
                # Made for all categories of the file, one of which is not a class.
                ids = sorted([root.id, *(category.id for category in store.categories)])
                table = np.delete(table, ids.index(root.id), axis=0)
            if table.ndim == 2 and len(table) != len(names):
                source = (
                    "'names' has" if spec.names else f"the annotations of {self.config.name!r} have"
                )
                raise VocabularyError(
                    f"{source} {len(names)} classes, but {spec.embeddings.name} has {len(table)} rows",
                    hint="rows must be the categories in ascending order of their ids; "
                    "where they are not, list the class of each row as 'names' in the dataset config",
                    path=spec.embeddings,
                )
            vocabulary = Vocabulary.from_arrays(names, table)
        if not spec.novel and not spec.novel_frequency:
            return vocabulary
        unknown = [name for name in spec.novel if name.strip() not in vocabulary.names]
        if unknown:
            raise VocabularyError(
                f"the novel class {unknown[0]!r} is not in the vocabulary.{nearest(unknown[0], vocabulary.names)}",
                hint="spell 'novel' in the dataset config as the annotation file spells its categories",
            )
        novel = {name.strip() for name in spec.novel}
        if spec.novel_frequency:
            if all(category.frequency is None for category in store.categories):
                raise VocabularyError(
                    "novel_frequency needs categories with a 'frequency' (LVIS format)",
                    hint="list the novel classes by name: novel = [...]",
                )
            rare = (c for c in store.categories if c.frequency in spec.novel_frequency)
            novel.update(category.name.strip() for category in rare)
        return vocabulary.with_base(np.array([name not in novel for name in vocabulary.names]))

    @property
    def classes(self) -> ClassTable:
        """The vocabulary's classes, also before its embeddings are made; without one the categories of all parts.

        Raises:
            VocabularyError: as of `vocabulary`.
            DataError: as of `vocabulary`.
        """
        spec = self.config.vocabulary
        if spec is not None:
            if spec.names and not spec.novel_frequency and not spec.embeddings.exists():
                novel = {name.strip() for name in spec.novel}
                base = np.array([name not in novel for name in spec.names], dtype=np.bool_)
                return ClassTable(spec.names, base)
            names = self.vocabulary.reported
            return ClassTable(names, self.vocabulary.base[: len(names)])
        parts = [part for part in PARTS if getattr(self.config, part) is not None] or ["train"]
        stores = [self.store(part) for part in parts]
        found = dict.fromkeys(c.name.strip() for store in stores for c in store.categories)
        return ClassTable(tuple(found), np.ones(len(found), dtype=np.bool_))

    def image_counts(self, *, with_novel: bool = True) -> npt.NDArray[np.int64]:
        """Return in how many training images each class of the vocabulary is annotated: int64 (C,).

        They weight the sampling of the federated loss. Classes that are not annotated at all in the file (as the rare
        ones in a file without them) take the ``image_count`` of their category.

        Args:
            with_novel: False puts 0 for novel classes. The published counts include them, and so tell training how many
                images of novel classes there are.
        """
        store = self.store("train")
        counted, _ = store.counts()
        declared = np.array([c.image_count or 0 for c in store.categories], dtype=np.int64)
        counts = np.zeros(len(self.vocabulary), dtype=np.int64)
        counts[store.class_rows(self.vocabulary.names)] = np.where(counted > 0, counted, declared)
        return counts if with_novel else np.where(self.vocabulary.base, counts, 0)


_PREPARED = {
    "lvis": "lvis coco-images lvis-metadata",
    "coco": "coco metadata",
    "coco_zero_shot": "coco metadata",
    "objects365": "objects365-val metadata",
    "openimages": "openimages-val metadata",
}
"""Data sets that ``proxydet data prepare`` writes a config for, and the downloads that it needs."""


class PublishedSplit(NamedTuple):
    """A split that papers report."""

    title: str
    """What it is."""
    data: str
    """Name of its data set."""
    downloads: str
    """What ``proxydet download`` calls its files."""
    annotations: str | None = None
    """Its annotation file in the data root; None: the validation split of the prepared data set."""
    images: tuple[str, ...] = ()
    """Its image folders in the data root; names of images begin in their parent."""
    embeddings: str = ""
    """Text embeddings of its classes in the data root."""


PUBLISHED_SPLITS = {
    "minival": PublishedSplit(
        "LVIS minival, 4,809 images",
        "lvis",
        "minival",
        "lvis/lvis_v1_minival_inserted_image_name.json",
        ("coco/val2017",),
        "metadata/lvis_v1_clip_a+cname.npy",
    ),
    "lvis-val": PublishedSplit(
        "LVIS v1 val, 19,809 images",
        "lvis",
        "lvis-val coco-images lvis-metadata",
        "lvis/lvis_v1_val.json",
        ("coco/train2017", "coco/val2017"),
        "metadata/lvis_v1_clip_a+cname.npy",
    ),
    "coco-val": PublishedSplit(
        "COCO val2017, 5,000 images",
        "coco",
        "coco-annotations coco-val2017 coco-embeddings",
        "coco/annotations/instances_val2017.json",
        ("coco/val2017",),
        "metadata/coco_clip_a+cname.npy",
    ),
    "coco-zero-shot": PublishedSplit("OV-COCO: 48 seen, 17 unseen classes", "coco_zero_shot", ""),
    "objects365-val": PublishedSplit("Objects365 v2 val, 80,000 images", "objects365", ""),
    "openimages-val": PublishedSplit("OpenImages challenge 2019 val", "openimages", ""),
}
"""Splits that papers report, by the name that ``proxydet eval --split`` takes."""


def published_split(name: str, *, with_images: bool = True) -> DatasetConfig:
    """Return the dataset config of a split that papers report; the split is its ``val``.

    Those of LVIS and COCO need their downloads alone, the others ``proxydet data prepare``.

    Args:
        name: One of `PUBLISHED_SPLITS`.
        with_images: Whether its images are needed, too.

    Raises:
        DataError: Files are not there; the hint is the command that gets them.
    """
    split, root = PUBLISHED_SPLITS[name], datasets_folder().absolute()
    if split.annotations is None:
        return DatasetConfig.from_toml(root / f"{split.data}.toml")
    needed = [split.annotations, split.embeddings, *(split.images if with_images else ())]
    absent = [root / place for place in needed if not (root / place).exists()]
    if absent:
        raise DataError(
            f"the split {name} ({split.title}) needs {first_of([str(path) for path in absent])}, "
            f"which {'does' if len(absent) == 1 else 'do'} not exist",
            hint=inner_root(root) or f"get it with: proxydet download {split.downloads}",
            path=absent[0],
        )
    folders = tuple(root / folder for folder in split.images)
    return DatasetConfig(
        name=name if name.startswith(split.data) else f"{split.data}-{name}",
        vocabulary=VocabularySpec(
            embeddings=root / split.embeddings,
            novel_frequency=("r",) if split.data == "lvis" else (),
            encoder="ViT-B/32",
        ),
        # LVIS names an image by its folder, COCO without.
        val=AnnotationSource(
            annotations=root / split.annotations, images=(folders[0].parent, *folders)
        ),
    )


def command_that_makes(path: Path) -> str | None:
    """Return the command that fetches or writes a file that is absent; None where none is known.

    Args:
        path: A file of the published layout, or the dataset config of a published data set.
    """
    if path.suffix == ".toml" and path.absolute().parent == datasets_folder().absolute():
        downloads = _PREPARED.get(path.stem)
        if downloads is not None:
            return f"proxydet download {downloads} && proxydet data prepare {path.stem.removesuffix('_zero_shot')}"
        return None
    advice = how_to_get(path)
    return advice and advice.removeprefix("get it with: ")


def embedding_dimension(path: Path) -> int:
    """Return the dimension of the text embeddings in a file: a table, or a saved vocabulary.

    Raises:
        VocabularyError: It is neither.
    """
    if zipfile.is_zipfile(path):
        return Vocabulary.load(path).dimension
    table = _load_table(path)
    return table.shape[1] if table.ndim == 2 else 0


def _load_table(path: Path) -> npt.NDArray[np.generic]:
    if not path.exists():
        raise VocabularyError(
            f"there are no text embeddings {path}",
            hint=how_to_get(path)
            or f"make them with: proxydet vocab build CONFIG.toml -o {shlex.quote(str(path))}",
            path=path,
        )
    return np.asarray(load_embeddings(path))
