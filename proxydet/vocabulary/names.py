"""Reads class names from an option's text and from files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxydet.errors import VocabularyError

_LARGEST_FILE = 32 * 1024 * 1024
# The blanks in front are taken whole (a look-ahead does not go back), or a long row of them would take quadratic time.
_NEXT_NAME = re.compile(
    r'(?P<name>(?=(?P<blanks>\s*))(?P=blanks)(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<plain>[^",\s][^,]*|))\s*)(?:,|$)'
)


@dataclass(frozen=True)
class ClassWords:
    """A class: its name, and other words for the same thing."""

    name: str
    synonyms: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The name and its synonyms, each once."""
        return tuple(dict.fromkeys((self.name, *self.synonyms)))


def split_names(text: str) -> list[str]:
    """Split names at commas; a name in double quotes may hold commas.

    ``'cup, "knife, fork", plate'`` are three names. Blanks around names are removed.

    Raises:
        VocabularyError: A name is empty, or a quote is not closed.
    """
    if "\n" in text or "\r" in text:
        raise VocabularyError("class names given as text must be on one line", hint="use a file")
    if not text.strip():
        raise VocabularyError("no class names are given", hint="name one or more: cup, plate")
    names: list[str] = []
    position = 0
    while position <= len(text):
        match = _NEXT_NAME.match(text, position)
        if match is None:
            raise VocabularyError(
                f"cannot split the class names {text!r} at {text[position:].strip()[:40]!r}",
                hint='put a name that holds commas in double quotes: cup, "knife, fork"',
            )
        quoted, plain = match["quoted"], match["plain"]
        name = plain if quoted is None else quoted.replace('""', '"')
        names.append(_named(name, f"class name {len(names)} (counted from 0)"))
        # One past the comma, or past the end of the text.
        position = match.end("name") + 1
    return names


def read_names(path: Path) -> tuple[ClassWords, ...]:
    """Read class names from a file.

    A text file holds one class a line, synonyms behind ``|`` (``couch | sofa | settee``); empty lines and lines
    that start with ``#`` are skipped. A JSON file holds a list of names, or a mapping of names to lists of
    synonyms.

    Raises:
        VocabularyError: The file cannot be read, or holds no names or an empty one.
    """
    text = _text_of(path)
    classes = _from_json(text, path) if path.suffix.lower() == ".json" else _from_lines(text, path)
    if not classes:
        raise VocabularyError(
            f"{path} holds no class names", hint="put one class on each line", path=path
        )
    return tuple(classes)


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise VocabularyError(
                f"{path} is too large to be a list of class names",
                hint="a list of names has one class on each line",
                path=path,
            )
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise VocabularyError(
            f"there is no file {path}", hint="check the spelling of its path", path=path
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise VocabularyError(
            f"cannot read class names from {path}: {error}",
            hint="a list of names is a UTF-8 text file with one class a line",
            path=path,
        ) from error


def _from_lines(text: str, path: Path) -> list[ClassWords]:
    classes = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            words = [_named(word, f"a name in line {number} of {path}") for word in line.split("|")]
            classes.append(ClassWords(words[0], tuple(words[1:])))
    return classes


def _from_json(text: str, path: Path) -> list[ClassWords]:
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise VocabularyError(
            f"{path} is not valid JSON: {error}",
            hint="correct it there, or write one name on each line of a .txt file",
            path=path,
        ) from error
    entries: list[tuple[Any, Any]] = []
    if isinstance(content, list):
        entries = [(name, []) for name in content]
    elif isinstance(content, dict):
        entries = list(content.items())
    if not isinstance(content, list | dict) or not all(_is_entry(*entry) for entry in entries):
        raise VocabularyError(
            f"{path} must hold a list of names, or a mapping of names to lists of synonyms",
            hint='such as ["cup", "plate"], or {"cup": ["mug"], "plate": []}',
            path=path,
        )
    return [
        ClassWords(
            _named(name, f"a name in {path}"),
            tuple(_named(word, f"a synonym of {name!r} in {path}") for word in words),
        )
        for name, words in entries
    ]


def _is_entry(name: object, words: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(words, Sequence)
        and not isinstance(words, str)
        and all(isinstance(word, str) for word in words)
    )


def _named(name: str, what: str) -> str:
    clean = name.strip()
    if not clean:
        raise VocabularyError(f"{what} is empty", hint="remove it, or the comma too many")
    return clean


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names without the blanks around them.

    Raises:
        VocabularyError: There is none, or one is no text, empty, or there twice.
    """
    if isinstance(names, str):
        raise VocabularyError(
            f"class names must be a list, not one string ({names!r})", hint="split it at the commas"
        )
    stripped: list[str] = []
    first_at: dict[str, int] = {}
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise VocabularyError(
                f"class name {position} is {name!r}, not a string", hint="give class names as text"
            )
        clean = name.strip()
        if not clean:
            raise VocabularyError(
                f"class name {position} (counted from 0) is empty",
                hint="remove it, or the comma too many",
            )
        if clean in first_at:
            raise VocabularyError(
                f"class name {clean!r} is there twice, at {first_at[clean]} and {position} (counted from 0)",
                hint="remove one of the two",
            )
        first_at[clean] = position
        stripped.append(clean)
    if not stripped:
        raise VocabularyError(
            "a vocabulary needs at least one class name", hint="name what to look for: cup, plate"
        )
    return tuple(stripped)


def check_classes(classes: Iterable[str | ClassWords]) -> list[ClassWords]:
    """Return names as entries, checked before the long work of embedding them.

    Raises:
        VocabularyError: There is no name, or one is empty or there twice.
    """
    entries = [entry if isinstance(entry, ClassWords) else ClassWords(entry) for entry in classes]
    names = check_names(entry.name for entry in entries)
    return [ClassWords(name, entry.synonyms) for name, entry in zip(names, entries, strict=True)]


def quote_names(names: Sequence[str], limit: int = 5) -> str:
    """Return names as a message shows them: in quotes, the first few of many."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
