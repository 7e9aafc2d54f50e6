"""Vocabularies as users name them: a published one, a file of names, of embeddings, or of both."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from proxydet.errors import VocabularyError
from proxydet.paths import datasets_folder
from proxydet.vocabulary.names import LIST_SUFFIXES, ClassWords, quote_names, read_names
from proxydet.vocabulary.vocabulary import (
    PUBLISHED,
    TextEncoder,
    Vocabulary,
    build_vocabulary,
    check_classes,
    find_prompts,
    load_embeddings,
)

SAVED_SUFFIXES = (".npz", ".vocab")
"""Endings of files that hold a vocabulary as `Vocabulary.save` writes it."""


def open_vocabulary(
    source: str | Path,
    *,
    encoder: Callable[[], TextEncoder],
    names: Path | None = None,
    known: Vocabulary | None = None,
) -> Vocabulary:
    """Open a vocabulary.

    Args:
        source: A published vocabulary's name; a ``.npz`` or ``.vocab`` file of ``proxydet vocab build``; a file of class
            names (see `proxydet.vocabulary.names.read_names`), which are then embedded; or a ``.npy`` table of
            embeddings.
        encoder: Gives the text encoder when there are names to embed.
        names: File of class names for a ``.npy`` table, one for each row.
        known: Classes whose embeddings are at hand, those of a training: they are not embedded again.

    Raises:
        VocabularyError: There is no such vocabulary, or it cannot be read.
    """
    path = Path(source)
    check_source(source)
    if (path.suffix == ".npy") != (names is not None):
        raise VocabularyError(
            "a .npy table of embeddings and a file of its class names go together",
            hint="give --names NAMES.txt with it, a name for each row; in Python: Vocabulary.from_arrays(names, np.load(table))",
        )
    if str(source) in PUBLISHED_VOCABULARIES:
        return published_vocabulary(str(source))
    if names is not None:
        return Vocabulary.from_arrays(
            [entry.name for entry in read_names(names)], load_embeddings(path)
        )
    if path.suffix in SAVED_SUFFIXES:
        return Vocabulary.load(path)
    classes = read_names(path)
    if known is not None:
        return complete_vocabulary(classes, known, encoder)
    return build_vocabulary(classes, encoder())


def is_vocabulary_file(source: str | Path) -> bool:
    """Whether a text names a file that may hold a vocabulary, by its suffix."""
    return Path(source).name.lower().endswith((*SAVED_SUFFIXES, *LIST_SUFFIXES, ".npy"))


def check_source(source: str | Path) -> None:
    """Refuse what can be no vocabulary, before anything is opened.

    Args:
        source: As for `open_vocabulary`.

    Raises:
        VocabularyError: It is neither a published vocabulary's name nor a file of a kind that holds one.
    """
    path = Path(source)
    plain = not path.suffix and path.exists() and not path.is_dir()
    if str(source) in PUBLISHED_VOCABULARIES or is_vocabulary_file(source) or plain:
        return
    endings = ", ".join((*SAVED_SUFFIXES, *LIST_SUFFIXES, ".npy"))
    near = difflib.get_close_matches(str(source).lower(), PUBLISHED_VOCABULARIES, n=1)
    raise VocabularyError(
        f"the vocabulary {str(source)!r} is neither a published one ({', '.join(PUBLISHED_VOCABULARIES)}) nor a "
        f"file ({endings})",
        hint=f"did you mean {near[0]}?"
        if near
        else "class names can be given as a list: -v 'cup, plate' on the command line, ['cup', 'plate'] in Python",
    )


def complete_vocabulary(
    classes: Sequence[str | ClassWords],
    known: Vocabulary,
    encoder: Callable[[], TextEncoder],
    *,
    prompts: str | Sequence[str] = PUBLISHED,
) -> Vocabulary:
    """Embed class names that a model was not trained with; those that it knows have their embedding already.

    Known names are taken over where nothing else was asked for: no synonyms and no prompts of one's own. Their
    embeddings are what the model was trained with, whatever made them.

    Args:
        classes: Names, or names with synonyms.
        known: The vocabulary of the training.
        encoder: Opens the text encoder; called only where a name is not known.
        prompts: As for `build_vocabulary`.

    Raises:
        VocabularyError: A name is empty or there twice, or cannot be encoded; without an encoder, the message says
            for which names one is needed.
    """
    entries = check_classes(classes)
    rows = dict(zip(known.names, known.embeddings, strict=True))
    if find_prompts(prompts) != PUBLISHED:
        rows = {}
    missing = [entry for entry in entries if entry.synonyms or entry.name not in rows]
    if missing:
        try:
            opened = encoder()
        except VocabularyError as error:
            unknown = quote_names([entry.name for entry in missing])
            raise VocabularyError(
                f"{unknown}: not among the {len(known)} classes of the training; {error.message}",
                hint=error.hint,
                path=error.path,
                needs=error.needs,
            ) from error
        made = build_vocabulary(missing, opened, prompts=prompts)
        rows |= zip(made.names, made.embeddings, strict=True)
    names = [entry.name for entry in entries]
    return Vocabulary.from_arrays(names, np.stack([rows[name] for name in names]))


# --- Published vocabularies -------------------------------------------------------------------------------------------

_Names = tuple[list[str], list[bool] | None]


def published_vocabulary(name: str, *, datasets: Path | None = None) -> Vocabulary:
    """Load a published vocabulary: names and CLIP embeddings that need no CLIP, from downloaded metadata.

    Args:
        name: ``lvis``, ``coco``, ``objects365`` or ``openimages``.
        datasets: Folder of the data sets; None: where ``proxydet download`` puts them.

    Returns:
        Names and embeddings; of LVIS also which classes are base (frequent and common ones), of the others
        all count as base, for lack of a split.

    Raises:
        VocabularyError: There is no such vocabulary, or its files are not there or not what they should be.
    """
    if name not in _PUBLISHED:
        raise VocabularyError(
            f"unknown published vocabulary {name!r}",
            hint=f"known: {', '.join(_PUBLISHED)}",
        )
    published = _PUBLISHED[name]
    folder = datasets or datasets_folder()
    embeddings = folder / published.embeddings
    sources = [embeddings] if published.names is None else [embeddings, folder / published.names]
    for path in sources:
        if not path.is_file():
            raise VocabularyError(
                f"the published vocabulary {name} needs {path}, which does not exist",
                hint=f"run: proxydet download {published.artifacts}",
                path=path,
                needs=tuple(published.artifacts.split()) if datasets is None else (),
            )
    try:
        names, base = published.read(sources[-1])
    except (OSError, ValueError, LookupError, TypeError, RecursionError, csv.Error) as error:
        raise VocabularyError(
            f"{sources[-1]}: the class names cannot be read: {error!r}",
            hint=f"download it again: proxydet download {published.artifacts}",
            path=sources[-1],
        ) from error
    return Vocabulary.from_arrays(names, load_embeddings(embeddings), base)


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


_PUBLISHED = {
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

PUBLISHED_VOCABULARIES: tuple[str, ...] = tuple(_PUBLISHED)
"""Names that `published_vocabulary` knows."""
