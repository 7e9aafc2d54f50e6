"""Class names as people write them: read from an option's text and from files."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import logging
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from proxydet.errors import ConfigError, VocabularyError
from proxydet.files import read_text
from proxydet.paths import did_you_mean
from proxydet.wording import counted, size_text

logger = logging.getLogger(__name__)

LIST_SUFFIXES = (".txt", ".names", ".list", ".json", ".json.gz", ".yaml", ".yml", ".toml")
"""Endings of files that hold class names; a file without an ending is read as ``.txt``."""

_LARGEST_FILE = 32 << 20
_LARGEST_YAML = 2_000_000
_LARGEST_ANNOTATIONS = 4 << 30
_LONGEST_NAME = 500
_MOST_NAMES = 100_000
# The blanks in front are taken whole (a look-ahead does not go back), or a long row of them would take quadratic time.
_NEXT_NAME = re.compile(
    r'(?P<name>(?=(?P<blanks>\s*))(?P=blanks)(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<plain>[^",\s][^,]*|))\s*)(?:,|$)'
)
_DOT = re.compile(r"(?<=\s)\.(?=\s|$)|\.\s|\.$")
_ONE_A_LINE = "names can also stand one on each line of a .txt file"
_STRUCTURED = (".json", ".gz", ".yaml", ".yml")
_LIST_ITEM = re.compile(r"\s*(?:- |\d+\s*: )")


@dataclass(frozen=True)
class ClassWords:
    """A class: its name, other words for the same thing, and what is said of it."""

    name: str
    synonyms: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()
    """Texts about it, embedded as they are, with the name in the place of ``{}``."""
    descriptions: tuple[str, ...] = ()
    """Texts that are put behind its name."""
    templates: tuple[str, ...] = ()
    """Its own prompts, instead of those of all classes."""

    @property
    def plain(self) -> bool:
        """Whether it is nothing but a name."""
        return self == ClassWords(self.name)

    @property
    def words(self) -> tuple[str, ...]:
        """The name and its synonyms, each once."""
        return tuple(dict.fromkeys((self.name, *self.synonyms)))


def split_names(text: str, where: str = "the class names") -> list[str]:
    """Split names at commas; a name in double quotes may hold commas.

    ``'cup, "knife, fork", plate'`` are three names. Blanks around names are removed. Without a comma, semicolons
    separate names, and so do dots as in the prompts of other detectors (``'cup . plate .'``); that is logged.

    Args:
        text: One line.
        where: What it is, for messages.

    Raises:
        VocabularyError: A name is empty or too long, or a quote is not closed.
    """
    names, separators = _split(text)
    if separators != "commas":
        _report_split(_split_text(names, separators, where))
    return names


def _split(text: str) -> tuple[list[str], str]:
    """Return the names on a line, and what separates them: ``commas``, ``semicolons``, ``dots``; empty of one name."""
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
                f"cannot split the class names {text[:200]!r} at {text[position:].strip()[:40]!r}",
                hint='put a name that holds commas in double quotes: cup, "knife, fork"',
            )
        quoted, plain = match["quoted"], match["plain"]
        if quoted is None and plain.strip() == text.strip():  # no comma
            parts, separators = [text], ""
            if ";" in text:
                parts, separators = text.split(";"), "semicolons"
            elif re.search(r"\s\.(\s|$)", text) or (text.endswith(".") and ". " in text):
                parts, separators = _DOT.split(text), "dots"
            names = [part for part in parts if part.strip()]
            names = [
                clean_text(name, f"class name {i} (counted from 0)") for i, name in enumerate(names)
            ]
            return names, separators if len(parts) > 1 and names else ""
        name = plain if quoted is None else quoted.replace('""', '"')
        names.append(clean_text(name, f"class name {len(names)} (counted from 0)"))
        # One past the comma, or past the end of the text.
        position = match.end("name") + 1
    return names, "commas" if len(names) > 1 else ""


def _split_text(names: Sequence[str], separators: str, where: str) -> str:
    if not separators:
        return ""
    return (
        f"{where}: read as {counted(len(names), 'name')}, separated by {separators}: {quote_names(names)} (one name that "
        f"holds {separators} goes in double quotes)"
    )


_CONFIRMED: set[str] = set()
"""Reports that `single_line_split` gave to be agreed to; they are not logged again."""


def _report_split(report: str) -> None:
    if report and report not in _CONFIRMED:
        logger.warning("%s", report)


def single_line_split(path: Path) -> str:
    """Return how `read_names` splits a file of a single line, for a user to agree to; empty where it does not.

    Args:
        path: The file; what cannot be read gives nothing here.
    """
    try:
        text = (
            ""
            if path.suffix.lower() in _STRUCTURED
            else read_text(path, limit=_LARGEST_FILE, pipe=True)
        )
    except (OSError, ValueError):
        text = ""
    line = _single_line(text)
    report = _split_text(*_split(line), str(path)) if line else ""
    _CONFIRMED.add(report)
    return report


def _single_line(text: str) -> str:
    """Return the line of a text that holds names on a single line, comments apart; empty for any other text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("#")]
    if len(lines) != 1 or "|" in lines[0] or _LIST_ITEM.match(lines[0]):
        return ""
    listed = lines[0][0] in "[{" and lines[0][-1] in "]}"
    return "" if listed or lines[0].startswith("<") else lines[0]


def read_names(path: Path) -> tuple[ClassWords, ...]:
    """Read class names from a file.

    A text file holds one class a line, synonyms behind ``|`` (``couch | sofa | settee``); empty lines and lines that
    start with ``#`` are skipped; a single line of names that commas, semicolons or dots separate is split, and that is
    logged. JSON and YAML files hold a list of names, names by their index, indices by their name, or names with lists
    of synonyms; the same under ``names``, as in data sets of Ultralytics (a dataset config, ``.toml``, has them in
    ``vocabulary.names``); or ``categories``, as COCO's and LVIS's
    annotation files, whose names are taken in ascending order of the ids; such a file may be gzipped (``.json.gz``).

    Raises:
        VocabularyError: The file cannot be read, is of another kind, or holds no names, or one that is empty, too long
            or there twice.
    """
    suffix = path.suffix.lower()
    if suffix and not path.name.lower().endswith(LIST_SUFFIXES):
        raise VocabularyError(
            f"{path} is not a list of class names ({', '.join(LIST_SUFFIXES)})",
            hint="give a text file with one name on each line, the data.yaml of a YOLO data set, or a COCO annotation file",
            path=path,
        )
    with _reading(
        path, "class names", "a list of names is a UTF-8 text file with one class a line"
    ):
        if suffix == ".gz" or (suffix == ".json" and path.stat().st_size > _LARGEST_FILE):
            return _checked(_categories_of_large_file(path), path)
        text = read_text(path, limit=_LARGEST_FILE, pipe=True)
    if suffix == ".json":
        return _checked(_from_value(_parsed_json(text, path), path), path)
    if suffix == ".toml":
        return _checked(_from_value(_names_of_config(text, path), path), path)
    if suffix in (".yaml", ".yml"):
        return _checked(_from_value(_parsed_yaml(text, path), path), path)
    return _checked(_from_text(text, path), path)


def no_file(path: Path) -> VocabularyError:
    """What is raised for a file that is not there; its hint names files there that are called nearly so."""
    hint = f"{did_you_mean(path)}check the spelling of its path"
    return VocabularyError(f"there is no file {path}", hint=hint, path=path)


@contextlib.contextmanager
def _reading(path: Path, what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise no_file(path) from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise VocabularyError(
            f"cannot read {what} from {path}: {error}", hint=hint, path=path
        ) from error


def parse_file(path: Path, *, hint: str) -> Any:
    """Return what a YAML or JSON file about classes holds; of YAML every scalar as text.

    Args:
        path: The file.
        hint: What to write into it, for messages.

    Raises:
        VocabularyError: It cannot be read, or is neither.
    """
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise VocabularyError(f"{path} is not a YAML or JSON file", hint=hint, path=path)
    with _reading(path, "YAML or JSON", hint):
        text = read_text(path, limit=_LARGEST_FILE, pipe=True)
    return (_parsed_json if suffix == ".json" else _parsed_yaml)(text, path, hint)


def _checked(classes: Sequence[tuple[str, ClassWords]], path: Path) -> tuple[ClassWords, ...]:
    """Return classes that were read with their places in the file; refuse none, too many, and one that is there twice."""
    if not classes:
        raise VocabularyError(
            f"{path} holds no class names", hint="put one class on each line", path=path
        )
    if len(classes) > _MOST_NAMES:
        raise VocabularyError(
            f"{path} holds {len(classes)} class names; at most {_MOST_NAMES} are read",
            hint="split it into several vocabularies",
            path=path,
        )
    places: dict[str, str] = {}
    for place, entry in classes:
        if entry.name in places:
            raise VocabularyError(
                f"duplicate class name {entry.name!r} in {path}: {places[entry.name]} and {place}",
                hint="remove one of the two",
                path=path,
            )
        places[entry.name] = place
    return tuple(entry for _, entry in classes)


def _from_text(text: str, path: Path) -> list[tuple[str, ClassWords]]:
    if text.lstrip().startswith("<"):
        raise VocabularyError(
            f"{path} is HTML or XML, not a list of class names",
            hint="put one class on each line",
            path=path,
        )
    if line := _single_line(text):
        names, separators = _split(line)
        _report_split(_split_text(names, separators, str(path)))
        return [(f"name {i}", ClassWords(name)) for i, name in enumerate(names, start=1)]
    lines = [
        (f"line {number}", line.strip())
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    listed = text.strip()[:1] in ("[", "{") and text.strip()[-1:] in ("]", "}")
    if listed or (lines and all(_LIST_ITEM.match(line) for _, line in lines)):
        with contextlib.suppress(ValueError, RecursionError):
            return _from_value(json.loads(text), path)
        return _from_value(_parsed_yaml(text, path), path)
    if len(lines) > 1 and all(line.endswith(",") for _, line in lines[:-1]):
        joined = " ".join(line for _, line in lines)
        return _from_value(_parsed_yaml(f"[{joined}]", path), path)
    with_commas = sum("," in line and not (line[0] == line[-1] == '"') for _, line in lines)
    if with_commas:
        logger.warning(
            "%s: %d of %d lines hold commas; each line is one class (synonyms are separated by |; double quotes around the "
            "line say that it is one name)",
            path,
            with_commas,
            len(lines),
        )
    classes = []
    for place, line in lines:
        whole = len(line) > 2 and line[0] == line[-1] == '"'
        words = [line[1:-1]] if whole else line.split("|")
        clean = [clean_text(word, f"a name in {place} of {path}") for word in words]
        classes.append((place, ClassWords(clean[0], tuple(clean[1:]))))
    return classes


def _parsed_json(text: str, path: Path, hint: str = _ONE_A_LINE) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"duplicate key {twice[:80]!r}")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise VocabularyError(
            f"{path} is not valid JSON: {reason}",
            hint=f"correct the file; {hint}",
            path=path,
        ) from error


def _names_of_config(text: str, path: Path) -> Any:
    """Return the names of a dataset config."""
    from proxydet.config import parse_toml  # as of `_parsed_yaml`

    try:
        table = parse_toml(text, str(path), path).get("vocabulary")
    except ConfigError as error:
        raise VocabularyError(error.message, hint="correct that line", path=path) from error
    names = table.get("names") if isinstance(table, dict) else None
    if not isinstance(names, list):
        raise VocabularyError(
            f"{path} lists no class names in [vocabulary]",
            hint="name the file with the class names, such as the annotation file",
            path=path,
        )
    return names


def _parsed_yaml(text: str, path: Path, hint: str = _ONE_A_LINE) -> Any:
    try:
        if len(text) > _LARGEST_YAML:
            raise ConfigError(f"{path} is larger than {size_text(_LARGEST_YAML)}.")
        from proxydet.config import parse_yaml  # exported detectors run without YAML

        return parse_yaml(text, str(path), path, only_text=True)
    except ConfigError as error:
        raise VocabularyError(
            error.message,
            hint=f"correct the file; {hint}",
            path=path,
        ) from error


def _from_value(content: Any, path: Path) -> list[tuple[str, ClassWords]]:
    """Return the classes of parsed JSON or YAML; see `read_names` for what it may be."""
    if isinstance(content, Mapping):
        listed = content.get("categories")
        if isinstance(listed, list) and all(isinstance(entry, Mapping) for entry in listed):
            return _categories(listed, path, content.get("annotations"))
        for key in ("names", "id2label"):
            inside = isinstance(content.get(key), list | Mapping)
            if inside and (len(content) == 1 or not _are_synonyms(content)):
                return _from_value(content[key], path)
    if isinstance(content, list) and content and all(isinstance(c, Mapping) for c in content):
        return _categories(content, path, None)
    entries: list[tuple[Any, Sequence[Any]]] = []
    if isinstance(content, list):
        entries = [(name, ()) for name in content]
    elif isinstance(content, Mapping):
        keys, values = [_whole(k) for k in content], [_whole(v) for v in content.values()]
        if None not in keys and all(isinstance(name, str) for name in content.values()):
            order = sorted(zip(keys, content.values(), strict=True))
            indices = sorted(key for key in keys if key is not None)
            for index, after in itertools.pairwise(indices):
                if after > index + 1:
                    logger.warning(
                        "%s: no name has the index %d; the names behind it move up", path, index + 1
                    )
                    break
            entries = [(name, ()) for _, name in order]
        elif None not in values:
            entries = [(name, ()) for _, name in sorted(zip(values, content, strict=True))]
        elif _are_synonyms(content):
            entries = [(name, words or ()) for name, words in content.items()]
    if (
        not isinstance(content, list | Mapping)
        or not all(isinstance(word, str) for name, more in entries for word in (name, *more))
        or len(entries) < len(content)
    ):
        raise VocabularyError(
            f"{path} must hold a list of names, names by index, names with lists of synonyms, or the categories of COCO",
            hint='such as ["cup", "plate"], {"0": "cup", "1": "plate"}, or {"cup": ["mug"], "plate": []}',
            path=path,
        )
    classes = []
    for number, (name, more) in enumerate(entries, start=1):
        words = tuple(clean_text(word, f"a synonym of {name[:80]!r} in {path}") for word in more)
        classes.append(
            (f"entry {number}", ClassWords(clean_text(name, f"a name in {path}"), words))
        )
    return classes


def _are_synonyms(content: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds nothing but lists of texts (or nothing) by name."""
    return all(
        words in (None, "") or (isinstance(words, list) and all(isinstance(w, str) for w in words))
        for words in content.values()
    )


def _whole(value: Any) -> int | None:
    """The whole number that a value is or spells; None for any other."""
    if isinstance(value, str) and len(value) < 20 and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _categories(
    entries: Sequence[Any], path: Path, annotations: Any
) -> list[tuple[str, ClassWords]]:
    """Return the names of COCO's or LVIS's categories, in ascending order of their ids."""
    found: list[tuple[int, Mapping[str, Any]]] = []
    for position, entry in enumerate(entries):
        number = _whole(entry.get("id")) if isinstance(entry, Mapping) else None
        if number is None or not isinstance(entry.get("name"), str):
            raise VocabularyError(
                f"{path}: category {position} (counted from 0) has no {'name' if number is not None else 'whole number as id'}",
                hint='a category is such as {"id": 1, "name": "cup"}',
                path=path,
            )
        found.append((number, entry))
    found.sort(key=lambda pair: pair[0])
    # Roboflow writes a category without objects above all others, which is not a class.
    tops = [e for _, e in found if str(e.get("supercategory")) in ("None", "none", "")]
    root = tops[0] if len(tops) == 1 < len(found) and isinstance(annotations, list) else None
    if root is not None and annotations:
        below = [e.get("supercategory") for _, e in found if e is not root]
        used = [_whole(a.get("category_id")) for a in annotations if isinstance(a, Mapping)]
        if set(below) == {root["name"]} and _whole(root["id"]) not in used:
            found = [pair for pair in found if pair[1] is not root]
            logger.warning(
                "%s: the root category %r has no objects; it is left out",
                path,
                root["name"],
            )
    return [
        (f"id {i}", ClassWords(clean_text(entry["name"], f"the name of category {i} in {path}")))
        for i, entry in found
    ]


class _Category(msgspec.Struct):
    id: int | str
    name: str


class _Annotations(msgspec.Struct):
    """What is read of a large annotation file; all else is skipped without becoming objects."""

    categories: list[_Category]


def _categories_of_large_file(path: Path) -> list[tuple[str, ClassWords]]:
    """Return the categories of a COCO annotation file that is large or gzipped."""
    import mmap

    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        size = path.stat().st_size
        if path.suffix.lower() == ".gz":
            packed = stack.enter_context(gzip.open(file))
            file, size = stack.enter_context(tempfile.TemporaryFile(prefix="proxydet-")), 0
            while size <= _LARGEST_ANNOTATIONS and (block := packed.read(1 << 20)):
                size += file.write(block)
            file.flush()
        if size > _LARGEST_ANNOTATIONS:
            raise ValueError(f"it is larger than {size_text(_LARGEST_ANNOTATIONS)}")
        content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            found = msgspec.json.decode(content, type=_Annotations)
        except (msgspec.DecodeError, RecursionError) as error:
            kind = (
                "gzipped"
                if path.suffix.lower() == ".gz"
                else f"larger than {size_text(_LARGEST_FILE)}"
            )
            raise ValueError(f"it is {kind} and not a COCO annotation file ({error})") from error
    return _categories([msgspec.to_builtins(entry) for entry in found.categories], path, None)


def clean_text(text: str, what: str) -> str:
    """Return a name, or another text of a class, without the blanks around it.

    Args:
        text: The text.
        what: What it is, for messages.

    Raises:
        VocabularyError: It is empty or too long.
    """
    clean = text.strip()
    if not clean:
        raise VocabularyError(f"{what} is empty", hint="remove it, or the extra comma")
    if len(clean) > _LONGEST_NAME:
        raise VocabularyError(
            f"{what} has {len(clean)} characters: {clean[:40]!r}...",
            hint=f"it can have {_LONGEST_NAME}; put one class on each line",
        )
    return clean


def name_key(name: str) -> str:
    """Return a name as it is compared across lists that spell it differently: ``Coffee_maker`` as ``coffee maker``."""
    return " ".join(name.casefold().replace("_", " ").split())


def quote_names(names: Sequence[str], limit: int = 5) -> str:
    """Return names as a message shows them: in quotes, the first few of many."""
    shown = ", ".join(repr(name[:80]) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
