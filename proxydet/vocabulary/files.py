"""Vocabularies as users name them: a published one, a file of names, of embeddings, or of both."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from proxydet.errors import VocabularyError
from proxydet.vocabulary.encoder import TextEncoder, build_vocabulary
from proxydet.vocabulary.names import ClassWords, check_classes, quote_names, read_names
from proxydet.vocabulary.prompts import PUBLISHED, find_prompts
from proxydet.vocabulary.published import (
    PUBLISHED_VOCABULARIES,
    is_published,
    load_embeddings,
    published_vocabulary,
)
from proxydet.vocabulary.vocabulary import Vocabulary

SAVED_SUFFIXES = (".npz", ".vocab")
"""Endings of files that hold a vocabulary as `Vocabulary.save` writes it."""
_NAMES = (".txt", ".json")


def open_vocabulary(
    source: str | Path,
    *,
    encoder: Callable[[], TextEncoder],
    names: Path | None = None,
    known: Vocabulary | None = None,
) -> Vocabulary:
    """Open a vocabulary.

    Args:
        source: A published vocabulary's name; a ``.npz`` or ``.vocab`` file of ``proxydet vocab build``; a ``.txt`` or
            ``.json`` file of class names, which are then embedded; or a ``.npy`` table of embeddings.
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
    if is_published(str(source)):
        return published_vocabulary(str(source))
    if names is not None:
        return Vocabulary.from_arrays(
            [entry.name for entry in read_names(names)], load_embeddings(path)
        )
    if path.suffix in SAVED_SUFFIXES:
        return Vocabulary.load(path)
    classes = check_classes(read_names(path))
    if known is not None:
        return complete_vocabulary(classes, known, encoder)
    return build_vocabulary(classes, encoder())


def check_source(source: str | Path) -> None:
    """Refuse what can be no vocabulary, before anything is opened.

    Args:
        source: As for `open_vocabulary`.

    Raises:
        VocabularyError: It is neither a published vocabulary's name nor a file of a kind that holds one.
    """
    endings = (*SAVED_SUFFIXES, *_NAMES, ".npy")
    if is_published(str(source)) or Path(source).suffix.lower() in endings:
        return
    near = difflib.get_close_matches(str(source).lower(), PUBLISHED_VOCABULARIES, n=1)
    raise VocabularyError(
        f"the vocabulary {str(source)!r} is neither a published one ({', '.join(PUBLISHED_VOCABULARIES)}) nor a "
        f"file ({', '.join(endings)})",
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
            ) from error
        made = build_vocabulary(missing, opened, prompts=prompts)
        rows |= zip(made.names, made.embeddings, strict=True)
    names = [entry.name for entry in entries]
    return Vocabulary.from_arrays(names, np.stack([rows[name] for name in names]))
