"""A data set as one TOML file says it: annotation files, image folders, text embeddings, which classes are novel.

See ``docs/reference/data-description.md``. Paths in the file are relative to the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxydet.config import from_mapping, parse_toml
from proxydet.data.formats.voc import image_folder, is_voc
from proxydet.errors import ConfigError, DataError
from proxydet.files import read_text
from proxydet.vocabulary.names import read_names

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


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """The table ``[train]`` or ``[val]``: annotated images."""

    annotations: Path
    """Annotation file in COCO or LVIS format."""

    images: Path | tuple[Path, ...]
    """Folder of the images, or a list of folders that are searched in turn."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """The image folders."""
        return self.images if isinstance(self.images, tuple) else (self.images,)


@dataclass(frozen=True, kw_only=True)
class ImageLabelSpec:
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

    @property
    def roots(self) -> tuple[Path, ...]:
        """The image folders of ``annotations``."""
        return self.images if isinstance(self.images, tuple) else (self.images,)


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """A data set. All paths are absolute.

    Make one with `from_toml`.
    """

    name: str
    """Name of the data set, for messages and run folders."""

    vocabulary: VocabularySpec | None = None
    """Classes; what only counts or draws annotations does without, and takes the annotations' own categories."""

    train: SplitSpec | None = None
    """Annotated images to train on."""

    val: SplitSpec | None = None
    """Annotated images to evaluate on."""

    image_labels: ImageLabelSpec | None = None
    """Images with class labels to train on."""

    @classmethod
    def open(cls, path: Path | str, images: Sequence[Path] = ()) -> DatasetDescription:
        """Read a dataset config, or take annotations alone as a data set without embeddings.

        Args:
            path: A TOML file, or what `AnnotationStore.open` takes.
            images: Folders of the images, where ``path`` is no dataset config; by default ``JPEGImages`` of Pascal VOC,
                else the annotation file's own folder.

        Raises:
            DataError: as of `from_toml`.
        """
        path = Path(path)
        if path.suffix.lower() == ".toml":
            return cls.from_toml(path)
        folder = image_folder(path) if is_voc(path) else None
        roots = tuple(images) or (folder or path.parent,)
        return cls(name=path.stem, train=SplitSpec(annotations=path, images=roots))

    @classmethod
    def from_toml(cls, path: Path | str) -> DatasetDescription:
        """Read a data description.

        Raises:
            DataError: the file is absent or not TOML, a key is unknown or missing, or a value has the wrong type.
                Whether the files that it names exist is checked when they are opened.
            VocabularyError: ``vocabulary.names`` is a file that holds no class names.
        """
        path = Path(path)
        try:
            content = parse_toml(read_text(path, limit=_LARGEST_FILE), str(path), path)
        except FileNotFoundError as error:
            raise DataError(
                f"there is no data description {path}",
                hint="check the path, or write one as docs/how-to/own-data.md shows",
                path=path,
            ) from error
        except IsADirectoryError as error:
            raise DataError(
                f"{path} is a folder, not a data description",
                hint=_name_one_of(path),
                path=path,
            ) from error
        except (OSError, ValueError, ConfigError) as error:
            reason = (
                error.message if isinstance(error, ConfigError) else f"cannot read {path}: {error}"
            )
            raise DataError(
                reason,
                hint="name the data description, not the annotation file that it describes"
                if path.suffix.lower() == ".json"
                else "correct that line; docs/reference/data-description.md shows every key",
                path=path,
            ) from error
        table = content.get("vocabulary")
        if isinstance(table, dict) and isinstance(table.get("names"), str):
            file = path.resolve().parent / Path(table["names"]).expanduser()
            table["names"] = [entry.name for entry in read_names(file)]
        try:
            description = from_mapping(cls, content)
        except ConfigError as error:
            raise DataError(f"{path}: {error.message}", hint=error.hint, path=path) from error
        resolved: DatasetDescription = _absolute(description, path.resolve().parent)
        return resolved

    @property
    def classes(self) -> VocabularySpec:
        """The table ``[vocabulary]``; DataError where there is none."""
        if self.vocabulary is None:
            raise DataError(
                f"the data set {self.name!r} has no text embeddings",
                hint="write a dataset config (TOML) with a table [vocabulary] that names them: see proxydet vocab build",
            )
        return self.vocabulary

    def split(self, name: str) -> SplitSpec:
        """Return the split ``name``.

        Raises:
            DataError: it is neither ``train`` nor ``val``, or the description has no such table.
        """
        splits = {"train": self.train, "val": self.val}
        found = splits.get(name)
        if name not in splits:
            raise DataError(
                f"there is no split {name!r}", hint="a data description has train and val"
            )
        if found is None:
            raise DataError(
                f"the data set {self.name!r} has no [{name}] table",
                hint=f"add [{name}] with annotations and images to its description",
            )
        return found


def _absolute(value: Any, folder: Path) -> Any:
    """Return a copy of a description with its paths relative to ``folder`` made absolute."""
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


def _name_one_of(folder: Path) -> str:
    """Say which description of a folder to name; ``proxydet data check`` takes the folder itself."""
    names = [path.as_posix() for path in sorted(folder.glob("*.toml"))]
    return f"name one in it: {', '.join(names[:5])}" if names else "name a file such as my.toml"
