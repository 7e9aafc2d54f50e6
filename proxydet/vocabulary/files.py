"""Vocabularies as users name them: a published one, a file of names, of embeddings, or of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from proxydet.errors import VocabularyError
from proxydet.vocabulary.encoder import TextEncoder, build_vocabulary
from proxydet.vocabulary.names import read_names
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
    source: str | Path, *, encoder: Callable[[], TextEncoder], names: Path | None = None
) -> Vocabulary:
    """Open a vocabulary.

    Args:
        source: A published vocabulary's name; a ``.npz`` or ``.vocab`` file of ``proxydet vocab build``; a ``.txt`` or
            ``.json`` file of class names, which are then embedded; or a ``.npy`` table of embeddings.
        encoder: Gives the text encoder when there are names to embed.
        names: File of class names for a ``.npy`` table, one for each row.

    Raises:
        VocabularyError: There is no such vocabulary, or it cannot be read.
    """
    path = Path(source)
    if (path.suffix == ".npy") != (names is not None):
        raise VocabularyError(
            "a .npy table of embeddings and a file of its class names go together",
            hint="give --vocabulary TABLE.npy --names NAMES.txt",
        )
    if is_published(str(source)):
        return published_vocabulary(str(source))
    if names is not None:
        return Vocabulary.from_arrays(
            [entry.name for entry in read_names(names)], load_embeddings(path)
        )
    if path.suffix in SAVED_SUFFIXES:
        return Vocabulary.load(path)
    if path.suffix.lower() in _NAMES:
        return build_vocabulary(read_names(path), encoder())
    raise VocabularyError(
        f"the vocabulary {str(source)!r} is neither a published one ({', '.join(PUBLISHED_VOCABULARIES)}) nor a "
        f"file ({', '.join((*SAVED_SUFFIXES, *_NAMES, '.npy'))})",
        hint="class names can be given as a list: -v 'cup, plate' on the command line, ['cup', 'plate'] in Python",
    )
