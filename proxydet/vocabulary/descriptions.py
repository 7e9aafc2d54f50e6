"""What is said of classes besides their names: synonyms, sentences and descriptions from a file, and a hierarchy of classes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from proxydet.errors import VocabularyError
from proxydet.vocabulary.names import ClassWords, clean_text, name_key, parse_file, quote_names
from proxydet.wording import nearest

_KEYS = ("synonyms", "sentences", "descriptions", "templates")
_MOST_PATHS = 64
_MOST_LEVELS = 6


class Described(NamedTuple):
    """Classes with what a file says of them."""

    classes: tuple[ClassWords, ...]
    """The classes, in their order."""
    missing: tuple[str, ...]
    """Those that the file has no entry for."""
    unused: tuple[str, ...]
    """Those of the file that are not among the classes."""


def read_descriptions(path: Path) -> tuple[ClassWords, ...]:
    """Read what a YAML or JSON file says of classes.

    The file holds an entry for each class (at the top, or under ``classes``): a list of sentences, or a mapping with some of
    ``synonyms`` (other words for it), ``sentences`` (embedded as they are), ``descriptions`` (put behind the name: ``a ladle,
    with a long handle``) and ``templates`` (sentences with ``{}`` in the name's place, instead of the prompts of all classes).
    In sentences and descriptions ``{}`` stands for the name. Of LVIS's categories (``lvis_v1_train_cat_info.json``) synonyms and
    definitions are taken.

    Raises:
        VocabularyError: The file cannot be read, or an entry is of another form; the message names class and key.
    """
    content = parse_file(path, hint='a class is such as "ladle: [a deep spoon with a long handle]"')
    listed = content.get("categories") if isinstance(content, Mapping) else content
    if isinstance(listed, list) and any(isinstance(c, Mapping) and c.get("def") for c in listed):
        content = {
            str(c["name"]): {
                "synonyms": [str(word).replace("_", " ") for word in _listed(c.get("synonyms"))],
                "descriptions": [str(c["def"])] if c.get("def") else [],
            }
            for c in listed
            if isinstance(c, Mapping) and c.get("name")
        }
    if isinstance(content, Mapping) and set(content) == {"classes"}:
        content = content["classes"]
    if not isinstance(content, Mapping) or not content:
        raise VocabularyError(
            f"{path} must hold a mapping of class names to what is said of them",
            hint='such as "ladle: [a deep spoon with a long handle]", or "ladle: {synonyms: [...], descriptions: [...]}"',
            path=path,
        )
    return tuple(_entry(name, said, path) for name, said in content.items())


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] if value else []


def _entry(name: Any, said: Any, path: Path) -> ClassWords:
    clean = clean_text(str(name), f"a class name in {path}")
    parts = said if isinstance(said, Mapping) else {"sentences": said}
    texts: dict[str, tuple[str, ...]] = {}
    for key, value in parts.items():
        if key not in _KEYS:
            raise VocabularyError(
                f"{path}: {clean!r} has the unknown key {str(key)[:80]!r}.{nearest(str(key), _KEYS)}",
                hint=f"an entry can have {', '.join(_KEYS)}",
                path=path,
            )
        listed = _listed(value)
        if not all(isinstance(text, str) for text in listed):
            raise VocabularyError(
                f"{path}: {key} of {clean!r} must be a list of texts",
                hint=f'such as "{key}: [first, second]"; a text that holds a colon goes in quotes',
                path=path,
            )
        what = f"one of the {key} of {clean!r} in {path}"
        texts[key] = tuple(dict.fromkeys(clean_text(text, what) for text in listed))
    for template in texts.get("templates", ()):
        if template.count("{}") != 1:
            raise VocabularyError(
                f"{path}: the template {template[:80]!r} of {clean!r} does not hold {{}} exactly once",
                hint="write a sentence with {} in the name's place; whole sentences belong to 'sentences'",
                path=path,
            )
    return ClassWords(
        clean,
        synonyms=texts.get("synonyms", ()),
        sentences=texts.get("sentences", ()),
        descriptions=texts.get("descriptions", ()),
        templates=texts.get("templates", ()),
    )


def describe(classes: Sequence[ClassWords], described: Sequence[ClassWords]) -> Described:
    """Add what a file says to the classes of the same names.

    Names are matched as they are, else without regard to case and to ``_`` for a blank where that is not ambiguous.
    """
    by_name = {entry.name: entry for entry in described}
    by_key: dict[str, list[ClassWords]] = {}
    for entry in described:
        by_key.setdefault(name_key(entry.name), []).append(entry)
    keys = [name_key(entry.name) for entry in classes]
    count = Counter(keys)
    found, missing, used = [], [], set()
    for entry, key in zip(classes, keys, strict=True):
        alike = by_key.get(key, [])
        said = by_name.get(entry.name)
        if said is None and len(alike) == 1 and count[key] == 1:
            said = alike[0]
        if said is None:
            missing.append(entry.name)
            found.append(entry)
            continue
        used.add(said.name)
        joined: dict[str, Any] = {
            part: tuple(dict.fromkeys((*getattr(entry, part), *getattr(said, part))))
            for part in _KEYS
        }
        found.append(dataclasses.replace(entry, **joined))
    unused = tuple(name for name in by_name if name not in used)
    return Described(tuple(found), tuple(missing), unused)


# --- Hierarchies ------------------------------------------------------------------------------------------------------

Parents = Mapping[str, tuple[str, ...]]
"""What each class is a kind of."""


def read_hierarchy(path: Path) -> Parents:
    """Read which classes are kinds of others.

    A YAML or JSON file holds a tree (``animal: {dog: [poodle, beagle], cat: }``: what stands inside is a kind of what it
    stands in), parents by class (``poodle: dog``), both mixed, or the categories of an annotation file: COCO's with their
    ``supercategory``, LVIS's with their WordNet ``synset``, whose hypernyms NLTK knows.

    Returns:
        By name, its parents. A class may have several.

    Raises:
        VocabularyError: The file cannot be read, holds no hierarchy, or a class is above itself; or NLTK's WordNet is not there.
    """
    content = parse_file(path, hint="a hierarchy is such as animal: {dog: [poodle, beagle], cat: }")
    parents: dict[str, list[str]] = {}

    def link(child: Any, parent: str | None) -> str:
        name = clean_text(str(child), f"a class name in {path}")
        above = parents.setdefault(name, [])
        if parent is not None and parent not in above:
            above.append(parent)
        return name

    waiting: list[tuple[Any, str | None]] = [(content, None)]
    listed = content.get("categories") if isinstance(content, Mapping) else content
    entries = [c for c in listed if isinstance(c, Mapping)] if isinstance(listed, list) else []
    synsets = {
        str(c["synset"]): str(c["name"]) for c in entries if c.get("synset") and c.get("name")
    }
    if synsets:
        waiting = []
        for name, higher in _hypernyms(synsets, path):
            link(name, link(higher, None))
    elif any(c.get("name") and c.get("supercategory") for c in entries):
        waiting = []
        for entry in entries:
            if entry.get("name") and entry.get("supercategory"):
                same = name_key(str(entry["name"])) == name_key(str(entry["supercategory"]))
                link(entry["name"], None if same else link(entry["supercategory"], None))
    while waiting:
        inside, above = waiting.pop()
        if isinstance(inside, Mapping):
            for name, value in inside.items():
                if isinstance(value, str) and value.strip():
                    link(link(name, above), link(value, None))
                else:
                    waiting.append((value, link(name, above)))
        elif isinstance(inside, list):
            for item in inside:
                if isinstance(item, str):
                    link(item, above)
                else:
                    waiting.append((item, above))
    if not any(parents.values()):
        raise VocabularyError(
            f"{path} holds no hierarchy of classes",
            hint="write a tree (animal: {dog: [poodle], cat: }) or parents (poodle: dog)",
            path=path,
        )
    _refuse_cycles(parents, path)
    return {name: tuple(above) for name, above in parents.items()}


def _hypernyms(synsets: Mapping[str, str], path: Path) -> Iterator[tuple[str, str]]:
    """Give each class of WordNet and what is above it with what that is a kind of.

    Args:
        synsets: Class name of each synset, such as ``beagle.n.01``; those that WordNet lacks are left out.
        path: Where they are from, for messages.
    """
    try:
        from nltk.corpus import wordnet
        from nltk.corpus.reader.wordnet import WordNetError

        wordnet.ensure_loaded()
    except (ImportError, LookupError) as error:
        raise VocabularyError(
            f"{path} has WordNet synsets, and NLTK's WordNet is not there: {type(error).__name__}",
            hint="pip install nltk, then: python -m nltk.downloader wordnet; or give a tree: animal: {dog: [poodle], cat: }",
            path=path,
        ) from error
    names = dict(synsets)
    waiting = []
    for key in synsets:
        with contextlib.suppress(WordNetError, ValueError, KeyError):
            waiting.append(wordnet.synset(key))
    taken = {name_key(name) for name in synsets.values()}
    seen = set()
    while waiting:
        synset = waiting.pop()
        if synset.name() in seen:
            continue
        seen.add(synset.name())
        for above in synset.hypernyms():
            word = above.lemma_names()[0].replace("_", " ")
            if above.name() not in names and name_key(word) in taken:
                continue  # another meaning of a word that is in use: bat, the animal and the club
            taken.add(name_key(word))
            yield names[synset.name()], names.setdefault(above.name(), word)
            waiting.append(above)


def _refuse_cycles(parents: Mapping[str, Sequence[str]], path: Path) -> None:
    """Raise VocabularyError where a class is above itself."""
    done: set[str] = set()
    for start in parents:
        trail: dict[str, Any] = {start: iter(parents[start])}
        while trail:
            name = next(reversed(trail))
            above = next((n for n in trail[name] if n not in done), None)
            if above is None:
                done.add(name)
                del trail[name]
            elif above in trail:
                circle = [*list(trail)[list(trail).index(above) :], above]
                raise VocabularyError(
                    f"{path}: a class is above itself: {' < '.join(circle)[:200]}",
                    hint="remove one of these links",
                    path=path,
                )
            else:
                trail[above] = iter(parents[above])


def with_hierarchy(classes: Sequence[ClassWords], parents: Parents) -> Described:
    """Add sentences that say what each class is a kind of, and what its kinds are.

    After the idea of SHiNe (Liu et al., CVPR 2024): a class is the mean of sentences along the hierarchy's paths through it,
    from each of its children (or itself, where it has none) upwards: ``a poodle, which is a dog, which is an animal``. Of a
    class at most 64 paths are taken, and 6 levels above it.

    Args:
        classes: Names, or names with other texts, which are kept.
        parents: What `read_hierarchy` gave; names are matched as `describe` does.
    """
    # The tree's own spelling of each name; the class's where it is in both.
    name_of = {name_key(name): name for name in parents}
    name_of |= {name_key(entry.name): entry.name for entry in classes}
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for name, listed in parents.items():
        above[name_key(name)] = [name_key(parent) for parent in listed]
        for parent in listed:
            below.setdefault(name_key(parent), []).append(name_key(name))

    def paths(key: str) -> Iterator[tuple[str, ...]]:
        waiting: list[tuple[str, ...]] = [(key,)]
        while waiting:
            path = waiting.pop()
            higher = above.get(path[-1], []) if len(path) <= _MOST_LEVELS else []
            if not higher:
                yield path
            waiting += [(*path, parent) for parent in reversed(higher)]

    found, missing = [], []
    for entry in classes:
        key = name_key(entry.name)
        if not above.get(key) and not below.get(key):
            missing.append(entry.name)
            found.append(entry)
            continue
        below_key = below.get(key, [])
        chains = (
            (start, *path) if below_key else path
            for start in below_key or [key]
            for path in paths(key)
        )
        sentences = [
            ", which is ".join(
                [f"a {name_of[chain[0]]}", *(_with_article(name_of[step]) for step in chain[1:])]
            )
            for chain in itertools.islice(chains, _MOST_PATHS)
        ]
        joined = tuple(dict.fromkeys((*entry.sentences, *sentences)))
        found.append(dataclasses.replace(entry, sentences=joined))
    return Described(tuple(found), tuple(missing), ())


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def describe_coverage(described: Described, path: Path) -> list[str]:
    """Return in words which classes a file has no entry for, and which of its classes are not used."""
    notes = []
    if described.missing:
        count, total = len(described.missing), len(described.classes)
        notes.append(
            f"{path} has no entry for {count} of {total} classes: {quote_names(described.missing)}"
        )
    if described.unused:
        notes.append(
            f"{path} has {len(described.unused)} classes that are not named: {quote_names(described.unused)}"
        )
    return notes
