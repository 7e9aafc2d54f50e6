"""The published vocabularies: names and CLIP embeddings that need no CLIP, from downloaded metadata."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from proxydet.errors import VocabularyError
from proxydet.paths import datasets_folder
from proxydet.vocabulary.names import read_names
from proxydet.vocabulary.vocabulary import Vocabulary

_Names = tuple[list[str], list[bool] | None]


@dataclass(frozen=True)
class _Published:
    embeddings: str
    """File below the data sets' folder."""
    names: str | None
    """File of the names below the data sets' folder; None: in this package."""
    read: Callable[[Path], _Names]
    """Reads names and, where the source says it, which classes are base."""
    artifacts: str
    """What ``proxydet download`` calls the files."""


def published_vocabulary(name: str, *, datasets: Path | None = None) -> Vocabulary:
    """Load a published vocabulary.

    Args:
        name: ``lvis``, ``coco``, ``objects365`` or ``openimages``.
        datasets: Folder of the data sets; None: where ``proxydet download`` puts them.

    Returns:
        Names and embeddings; of LVIS also which classes are base (frequent and common ones), of the others
        all count as base, for nothing says otherwise.

    Raises:
        VocabularyError: There is no such vocabulary, or its files are not there or not what they should be.
    """
    if name not in _VOCABULARIES:
        raise VocabularyError(
            f"there is no published vocabulary {name!r}",
            hint=f"there are {', '.join(_VOCABULARIES)}",
        )
    published = _VOCABULARIES[name]
    folder = datasets or datasets_folder()
    embeddings = folder / published.embeddings
    sources = [embeddings] if published.names is None else [embeddings, folder / published.names]
    for path in sources:
        if not path.is_file():
            raise VocabularyError(
                f"the published {name} vocabulary needs {path}, which is not there",
                hint=f"run: proxydet download {published.artifacts}",
                path=path,
            )
    names, base = _read_names(published, sources[-1])
    return Vocabulary.from_arrays(names, load_embeddings(embeddings), base)


def load_embeddings(path: Path) -> Any:
    """Read a table of embeddings (C, D) from a ``.npy`` file.

    Raises:
        VocabularyError: The file cannot be read, or holds anything but numbers.
    """
    hint = "give a .npy file with one row a class, such as numpy.save writes"
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
                raise VocabularyError(
                    f"{path} is no table of embeddings: it does not begin as a .npy file does",
                    hint=hint,
                    path=path,
                )
            file.seek(0)
            return np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise VocabularyError(
            f"there is no file {path}", hint="check the spelling of its path", path=path
        ) from error
    except (OSError, ValueError, EOFError) as error:
        reason = "it holds Python objects, not numbers" if "pickle" in str(error) else error
        raise VocabularyError(
            f"cannot read embeddings from {path}: {reason}", hint=hint, path=path
        ) from error


def is_published(name: str) -> bool:
    """Whether a name is that of a published vocabulary."""
    return name in _VOCABULARIES


def _read_names(published: _Published, path: Path) -> _Names:
    try:
        return published.read(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise VocabularyError(
            f"{path} does not hold the class names: {error!r}",
            hint=f"fetch it again: proxydet download {published.artifacts}",
            path=path,
        ) from error


def _lvis_names(path: Path) -> _Names:
    categories = json.loads(path.read_text(encoding="utf-8"))
    ordered = sorted(categories, key=lambda category: int(category["id"]))
    return [c["name"] for c in ordered], [c["frequency"] != "r" for c in ordered]


def _coco_names(_: Path) -> _Names:
    with as_file(files("proxydet.vocabulary").joinpath("coco_names.txt")) as path:
        return [entry.name for entry in read_names(path)], None


def _objects365_names(path: Path) -> _Names:
    # Number, name as published, name as corrected; the embeddings are of the corrected ones.
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted((int(row[0]), row[2]) for row in csv.reader(file) if row)
    return [name for _, name in rows], None


def _openimages_names(path: Path) -> _Names:
    # Freebase id and name, in the order of the embeddings.
    with path.open(encoding="utf-8", newline="") as file:
        return [row[1] for row in csv.reader(file) if row], None


_VOCABULARIES = {
    "lvis": _Published(
        "metadata/lvis_v1_clip_a+cname.npy",
        "metadata/lvis_v1_train_cat_info.json",
        _lvis_names,
        "lvis-metadata",
    ),
    "coco": _Published("metadata/coco_clip_a+cname.npy", None, _coco_names, "coco-embeddings"),
    "objects365": _Published(
        "metadata/o365_clip_a+cnamefix.npy",
        "metadata/Objects365_names_fix.csv",
        _objects365_names,
        "objects365-embeddings objects365-name-fixes",
    ),
    "openimages": _Published(
        "metadata/oid_clip_a+cname.npy",
        "oid/annotations/challenge-2019-classes-description-500.csv",
        _openimages_names,
        "openimages-embeddings openimages-classes",
    ),
}

PUBLISHED_VOCABULARIES = tuple(_VOCABULARIES)
"""Names that `published_vocabulary` knows."""
