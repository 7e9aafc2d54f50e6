"""Bringing categories of annotation files and rows of text embeddings together.

Dimensions: C classes of the vocabulary, K categories of an annotation file.
"""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from proxydet.data.advice import how_to_get
from proxydet.data.description import DatasetDescription, VocabularySpec
from proxydet.data.formats.records import CategoryEntry
from proxydet.data.store import AnnotationStore
from proxydet.errors import DataError, VocabularyError
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.vocabulary import Vocabulary, load_embeddings


def open_split(
    description: DatasetDescription,
    split: str,
    *,
    cache: Path | None = None,
    progress: Progress = SILENT,
    warn: bool = True,
) -> AnnotationStore:
    """Open the annotation store of ``train`` or ``val``.

    Args:
        description: The data set.
        split: Which of the two.
        cache: Folder of annotation stores; None means the user's cache folder.
        progress: Where to show the conversion of annotations.
        warn: As for `AnnotationStore.open`.

    Raises:
        DataError: the description has no such split, or its annotation file cannot be read or has nothing to use.
    """
    store = AnnotationStore.open(
        description.split(split).annotations, cache=cache, progress=progress, warn=warn
    )
    store.require_objects(groups=split != "train")
    return store


def load_vocabulary(
    description: DatasetDescription,
    *,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Vocabulary:
    """Return the classes of a data set with their text embeddings and the base / novel split.

    The names come from ``names``, or from the ``.npz``, or from the categories of the training annotations (of the
    validation annotations where there is no training).

    Args:
        description: The data set.
        cache: Folder of annotation stores; None means the user's cache folder.
        progress: Where to show the conversion of annotations.

    Raises:
        VocabularyError: embeddings and names do not fit, or a novel class is unknown.
        DataError: a file cannot be read.
    """
    spec = description.classes
    split = "train" if description.train is not None or description.val is None else "val"
    store = open_split(description, split, cache=cache, progress=progress)
    # By content: a saved vocabulary may have any name.
    if spec.embeddings.is_file() and zipfile.is_zipfile(spec.embeddings):
        vocabulary = Vocabulary.load(spec.embeddings)
        if spec.names and spec.names != vocabulary.names:
            raise VocabularyError(
                f"{spec.embeddings} holds its own class names, which differ from 'names'",
                hint="leave 'names' out of the data description",
                path=spec.embeddings,
            )
    else:
        table = _load_table(spec.embeddings)
        names = spec.names or tuple(category.name.strip() for category in store.categories)
        root = store.root_category
        if root is not None and not spec.names and table.ndim == 2 and len(table) == len(names) + 1:
            # Made for all categories of the file, one of which is no class.
            ids = sorted([root.id, *(category.id for category in store.categories)])
            table = np.delete(table, ids.index(root.id), axis=0)
        _check_count(spec, names, table, description)
        vocabulary = Vocabulary.from_arrays(names, table)
    if not spec.novel and not spec.novel_frequency:
        return vocabulary
    return vocabulary.with_base(~_novel_mask(spec, vocabulary.names, store.categories))


class ClassTable(NamedTuple):
    """The classes of a data set.

    Attributes:
        names: C class names.
        base: bool (C,), whether training may use a class's annotations.
    """

    names: tuple[str, ...]
    base: npt.NDArray[np.bool_]


def load_classes(
    description: DatasetDescription,
    *,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> ClassTable:
    """Return the classes of a data set: its vocabulary's, or where it has none the categories of its annotations.

    Args and errors as of `load_vocabulary`.
    """
    if description.vocabulary is not None:
        vocabulary = load_vocabulary(description, cache=cache, progress=progress)
        return ClassTable(vocabulary.names, vocabulary.base)
    split = "train" if description.train is not None else "val"
    store = open_split(description, split, cache=cache, progress=progress)
    names = tuple(category.name.strip() for category in store.categories)
    return ClassTable(names, np.ones(len(names), dtype=np.bool_))


def class_rows(
    store: AnnotationStore, vocabulary: Vocabulary | ClassTable
) -> npt.NDArray[np.int64]:
    """Return the vocabulary's row of each category of a store, found by name: int64 (K,).

    Raises:
        DataError: a category is not in the vocabulary.
    """
    row_of = {name: row for row, name in enumerate(vocabulary.names)}
    missing = [c.name for c in store.categories if c.name.strip() not in row_of]
    if missing:
        raise DataError(
            f"{store.source_name} has {len(missing)} categories that are not in the vocabulary: {_some(missing)}",
            hint="name the class of each row of the embeddings by 'names' in the data description",
        )
    return np.array([row_of[c.name.strip()] for c in store.categories], dtype=np.int64)


def image_counts(
    store: AnnotationStore, vocabulary: Vocabulary, *, with_novel: bool = True
) -> npt.NDArray[np.int64]:
    """Return in how many training images each class of the vocabulary is annotated: int64 (C,).

    They weight the sampling of the federated loss. Classes that are not annotated at all in the file (as the rare ones in
    a file without them) take the ``image_count`` of their category.

    Args:
        store: The training annotations.
        vocabulary: The classes.
        with_novel: False puts 0 for novel classes. The published counts include them, and so tell training how many
            images of novel classes there are.
    """
    counted, _ = store.counts()
    declared = np.array([c.image_count or 0 for c in store.categories], dtype=np.int64)
    counts = np.zeros(len(vocabulary), dtype=np.int64)
    counts[class_rows(store, vocabulary)] = np.where(counted > 0, counted, declared)
    return counts if with_novel else np.where(vocabulary.base, counts, 0)


def embedding_dimension(path: Path) -> int:
    """Return the dimension of the text embeddings in a file: a table, or a saved vocabulary.

    Raises:
        VocabularyError: It is neither.
    """
    if zipfile.is_zipfile(path):
        return Vocabulary.load(path).dimension
    table = _load_table(path)
    return table.shape[1] if table.ndim == 2 else 0


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name nearest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _load_table(path: Path) -> npt.NDArray[np.generic]:
    if not path.exists():
        raise VocabularyError(
            f"there are no text embeddings {path}",
            hint=how_to_get(path) or "make them with: proxydet vocab build",
            path=path,
        )
    return np.asarray(load_embeddings(path))


def _check_count(
    spec: VocabularySpec,
    names: Sequence[str],
    table: npt.NDArray[np.generic],
    description: DatasetDescription,
) -> None:
    if table.ndim == 2 and len(table) != len(names):
        source = "'names' has" if spec.names else f"the annotations of {description.name!r} have"
        raise VocabularyError(
            f"{source} {len(names)} classes, but {spec.embeddings.name} has {len(table)} rows",
            hint="rows must be the categories in ascending order of their ids; "
            "where they are not, list the class of each row as 'names' in the data description",
            path=spec.embeddings,
        )


def _novel_mask(
    spec: VocabularySpec, names: Sequence[str], categories: Sequence[CategoryEntry]
) -> npt.NDArray[np.bool_]:
    unknown = [name for name in spec.novel if name.strip() not in names]
    if unknown:
        raise VocabularyError(
            f"the novel class {unknown[0]!r} is not in the vocabulary.{nearest(unknown[0], names)}",
            hint="spell 'novel' in the data description as the annotation file spells its categories",
        )
    novel = {name.strip() for name in spec.novel}
    if spec.novel_frequency:
        if all(category.frequency is None for category in categories):
            raise VocabularyError(
                "novel_frequency needs categories with a 'frequency' (LVIS format)",
                hint="list the novel classes by name: novel = [...]",
            )
        novel |= {c.name.strip() for c in categories if c.frequency in spec.novel_frequency}
    return np.array([name in novel for name in names], dtype=np.bool_)


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown}, ..."
