"""Vocabularies as users name them: a published one, a file of names, of embeddings, or of both; and made of others.

Dimensions: C classes, D embedding.
"""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from proxydet.errors import VocabularyError
from proxydet.paths import datasets_folder
from proxydet.vocabulary.names import (
    LIST_SUFFIXES,
    ClassWords,
    name_key,
    no_file,
    quote_names,
    read_names,
)
from proxydet.vocabulary.vocabulary import (
    PUBLISHED,
    TextEncoder,
    Vocabulary,
    build_vocabulary,
    check_classes,
    find_prompts,
    load_embeddings,
)
from proxydet.wording import counted, nearest

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
    try:
        if names is not None:
            return Vocabulary.from_arrays(
                [entry.name for entry in read_names(names)], load_embeddings(path)
            )
        if path.suffix in SAVED_SUFFIXES:
            return Vocabulary.load(path)
    except VocabularyError as error:
        if error.path is not None:
            raise
        raise VocabularyError(f"{path}: {error.message}", hint=error.hint, path=path) from error
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
        VocabularyError: It is neither a published vocabulary's name nor a file of a kind that holds one, or is not there.
    """
    path = Path(source)
    plain = not path.suffix and path.exists() and not path.is_dir()
    if str(source) in PUBLISHED_VOCABULARIES or plain:
        return
    if is_vocabulary_file(source):
        if not path.exists():
            raise no_file(path)
        return
    endings = ", ".join((*SAVED_SUFFIXES, *LIST_SUFFIXES, ".npy"))
    raise VocabularyError(
        f"the vocabulary {str(source)!r} is neither a published one ({', '.join(PUBLISHED_VOCABULARIES)}) nor a "
        f"file ({endings})",
        hint=nearest(str(source).lower(), PUBLISHED_VOCABULARIES).strip()
        or "class names can be given as a list: -v 'cup, plate' on the command line, ['cup', 'plate'] in Python",
    )


def complete_vocabulary(
    classes: Sequence[str | ClassWords],
    known: Vocabulary,
    encoder: Callable[[], TextEncoder],
    *,
    prompts: str | Sequence[str] = PUBLISHED,
    description_weight: float = 0.5,
) -> Vocabulary:
    """Embed class names that a model was not trained with; those that it knows have their embedding already.

    Known names are taken over where nothing else was asked for: no synonyms or descriptions, no prompts of one's own. Their
    embeddings are what the model was trained with, whatever made them.

    Args:
        classes: Names, or names with synonyms.
        known: The vocabulary of the training.
        encoder: Opens the text encoder; called only where a name is not known.
        prompts: As for `build_vocabulary`.
        description_weight: As for `build_vocabulary`.

    Raises:
        VocabularyError: A name is empty or there twice, or cannot be encoded; without an encoder, the message says
            for which names one is needed.
    """
    entries = check_classes(classes)
    rows = dict(zip(known.names, known.embeddings, strict=True))
    if find_prompts(prompts) != PUBLISHED:
        rows = {}
    missing = [entry for entry in entries if not entry.plain or entry.name not in rows]
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
        made = build_vocabulary(
            missing, opened, prompts=prompts, description_weight=description_weight
        )
        rows |= zip(made.names, made.embeddings, strict=True)
    names = [entry.name for entry in entries]
    return Vocabulary.from_arrays(names, np.stack([rows[name] for name in names]))


# --- Vocabularies made of others --------------------------------------------------------------------------------------

_SAME_ENCODER = "embed both with the same text encoder"
_ROWS = 1024
_LEAST_COSINE = 0.1
_ENOUGH = 8


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A vocabulary made of others."""

    vocabulary: Vocabulary
    notes: tuple[str, ...]
    """What to know about it, in words."""


def mix(
    tables: Mapping[str, Vocabulary],
    weights: Sequence[float] | None = None,
    *,
    union: bool = False,
    merge_above: float | None = None,
) -> Mixture:
    """Mix tables of the same classes: the weighted mean of each class's embeddings, each normalised first.

    Classes are matched by name, in whatever order the tables have them; where every table's names differ by more, also
    without regard to case and to ``_`` for a blank. The mixture has the names, the order and the base classes of the first
    table that has a class. A class of one table only is taken as it is, with its scorer.

    Args:
        tables: By what they are called in messages, two or more; one will do to merge its near-duplicates.
        weights: One above 0 for each table; None: equal ones.
        union: Keep the classes that are not in all tables too; without it they are refused.
        merge_above: Classes whose cosine with a class of an earlier table is above this are left out; of one table, with an
            earlier class.

    Raises:
        VocabularyError: The tables have other dimensions, come from other encoders (`check_same_encoder`), or lack classes;
            weights do not fit; or a class that is in several tables has a bias, a scale, or is background in some of them only.
    """
    titles, given = list(tables), list(tables.values())
    weights = [1.0] * len(given) if weights is None else list(weights)
    if len(weights) != len(given):
        raise VocabularyError(
            f"{counted(len(given), 'table')} but {counted(len(weights), 'weight')}",
            hint="give one weight a table, in their order",
        )
    if not all(np.isfinite(weights)) or min(weights) <= 0:
        raise VocabularyError(
            f"the weights {', '.join(f'{w:g}' for w in weights)} are not all above 0",
            hint="leave a table out instead of giving it no weight",
        )
    for title, table in tables.items():
        if table.dimension != given[0].dimension:
            raise VocabularyError(
                f"{titles[0]} has {given[0].dimension} dimensions and {title} {table.dimension}: they come from different "
                "text encoders",
                hint=_SAME_ENCODER,
            )
    keys = [[name_key(name) for name in table.names] for table in given]
    if any(len(set(listed)) < len(listed) for listed in keys):
        keys = [list(table.names) for table in given]
    rows = [{key: row for row, key in enumerate(listed)} for listed in keys]
    order = list(dict.fromkeys(key for listed in keys for key in listed))
    notes: list[str] = []
    for place in range(1, len(given)):
        if not union and rows[place].keys() != rows[0].keys():
            only = {
                titles[a]: [
                    n for n, k in zip(given[a].names, keys[a], strict=True) if k not in rows[b]
                ]
                for a, b in ((0, place), (place, 0))
            }
            raise VocabularyError(
                "; ".join(
                    f"only in {of}: {quote_names(names)}" for of, names in only.items() if names
                ),
                hint="--union (in Python: union=True) keeps the classes of all tables, and mixes those that are in several",
            )
        before = {k: p for p in reversed(range(place)) for k in keys[place] if k in rows[p]}
        if before:
            earlier_CD = np.stack([given[p].normalised()[rows[p][k]] for k, p in before.items()])
            own_CD = given[place].normalised()[[rows[place][key] for key in before]]
            involved = dict.fromkeys([*(titles[p] for p in before.values()), titles[place]])
            check_same_encoder(earlier_CD, own_CD, " and ".join(involved))
        else:
            notes.append(
                f"{titles[place]} shares no class with the tables before it: whether its text encoder is theirs was not tested"
            )
    columns: dict[str, list[Any]] = {name: [] for name in ("names", *given[0].columns)}
    place_of: dict[str, int] = {}
    forgotten, torn = 0, 0
    for key in order:
        holders = [(p, table, rows[p][key]) for p, table in enumerate(given) if key in rows[p]]
        place, first, row = holders[0]
        name = first.names[row]
        place_of[name] = place
        made_of: dict[str, Any] = {column: values[row] for column, values in first.columns.items()}
        if len(holders) > 1:
            for place, table, at in holders:
                if table.bias[at] != 0 or table.scale[at] != 1:
                    raise VocabularyError(
                        f"the class {name!r} of {titles[place]} is a scorer with a bias or a scale of its own, which belong to its "
                        "embedding alone and cannot be mixed",
                        hint="mix the tables of text first, and add the examples to the mixture with: proxydet vocab build",
                    )
            if len({bool(table.background[at]) for _, table, at in holders}) > 1:
                raise VocabularyError(
                    f"the class {name!r} is background in some of the tables only",
                    hint="make it background in all of them, or in none",
                )
            forgotten += sum(not np.isnan(table.threshold[at]) for _, table, at in holders)
            torn += len({bool(table.base[at]) for _, table, at in holders}) > 1
            parts = [weights[place] * table.normalised()[at] for place, table, at in holders]
            total = sum(weights[place] for place, _, _ in holders)
            mean_D = np.sum(parts, axis=0, dtype=np.float64) / total
            made_of |= {"embeddings": mean_D.astype(np.float32), "threshold": np.nan}
        for column, value in ({"names": name} | made_of).items():
            columns[column].append(value)
    if forgotten:
        notes.append(
            f"{counted(forgotten, 'threshold')} of classes that are in several tables are left out: they belong to the "
            "embeddings that they were made for"
        )
    if torn:
        notes.append(f"{counted(torn, 'class', 'classes')} base in one table and novel in another: as in the first")  # fmt: skip
    embeddings_CD = np.stack(columns.pop("embeddings"))
    made = Vocabulary.from_arrays(embeddings=embeddings_CD, known=given[0].known, **columns)
    if merge_above is not None:
        origin_C = [place_of[name] for name in made.names]  # background is behind the others
        merged = merge_alike(made, merge_above, None if len(given) == 1 else origin_C)
        made = merged.vocabulary
        notes += merged.notes
    return Mixture(vocabulary=made, notes=tuple(notes))


def check_same_encoder(
    first_CD: npt.NDArray[np.float32], second_CD: npt.NDArray[np.float32], titles: str
) -> None:
    """Check by the classes that two tables share whether their embeddings are of one space.

    There a class resembles itself in the other table more than it resembles other classes there, whether the tables hold
    names, descriptions or CLIP embeddings of images; embeddings of different encoders have cosines near 0.

    Args:
        first_CD: Normalised embeddings of the shared classes in one table.
        second_CD: The same classes in the other.
        titles: What the tables are called, for the message.

    Raises:
        VocabularyError: They are of different encoders, or the rows of one are in another order than its names.
    """
    own_C = np.einsum("cd,cd->c", first_CD, second_CD, dtype=np.float64)
    count = len(own_C)
    mean_D = second_CD.mean(axis=0, dtype=np.float64)
    # The mean cosine with the other classes: with all of them, without its own.
    others_C = (count * (first_CD @ mean_D) - own_C) / max(count - 1, 1)
    gain_C = own_C - others_C if count > 1 else own_C
    error = gain_C.std() / np.sqrt(count)
    if own_C.mean() < _LEAST_COSINE or gain_C.mean() <= (2 * error if count >= _ENOUGH else 0):
        raise VocabularyError(
            f"{titles} are of different text encoders, or their names are in another order than their rows: the cosine of "
            f"{counted(count, 'shared class', 'shared classes')} with themselves is {own_C.mean():.3f} on average, with other "
            f"classes {others_C.mean():.3f}",
            hint=f"{_SAME_ENCODER}; of a .npy table check --names",
        )


def merge_alike(
    vocabulary: Vocabulary, above: float, origin: Sequence[int] | None = None
) -> Mixture:
    """Leave classes out that resemble an earlier one: near-duplicates such as ``sneaker`` and ``Sneakers``.

    Args:
        vocabulary: Any classes.
        above: Largest cosine with an earlier class that is kept.
        origin: Which list each class is from; classes of one list are kept apart, as who made it did. None: all are merged.

    Raises:
        VocabularyError: The limit is not a cosine.
    """
    if not -1 <= above <= 1:
        raise VocabularyError(
            f"the limit of likeness must be a cosine in [-1, 1], not {above}",
            hint="0.95 merges what is hardly distinguished",
        )
    table_CD = vocabulary.normalised()
    origin_C = np.arange(len(vocabulary)) if origin is None else np.array(origin)
    kept = np.ones(len(vocabulary), dtype=bool)
    pairs = []
    for start in range(0, len(vocabulary), _ROWS):
        cosines_CC = table_CD[start : start + _ROWS] @ table_CD[: start + _ROWS].T
        for offset, cosines_C in enumerate(cosines_CC):
            row = start + offset
            other_C = kept[:row] & (origin_C[:row] != origin_C[row])
            alike = np.flatnonzero((cosines_C[:row] > above) & other_C)
            if len(alike) and not vocabulary.background[row]:
                kept[row] = False
                nearest = int(alike[np.argmax(cosines_C[alike])])
                pairs.append(f"{vocabulary.names[row]} ({vocabulary.names[nearest]})")
    if not pairs:
        return Mixture(vocabulary=vocabulary, notes=())
    names = [name for name, keep in zip(vocabulary.names, kept, strict=True) if keep]
    shown = ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} more" if len(pairs) > 5 else "")
    note = f"{counted(len(pairs), 'class', 'classes')} merged into one that is alike: {shown}"
    return Mixture(vocabulary=vocabulary.subset(names), notes=(note,))


# --- The classes of a training ----------------------------------------------------------------------------------------

Classes = Vocabulary | Sequence[str] | str | Path | None
"""What to detect: a vocabulary, class names, a published vocabulary's name or a file (see `open_vocabulary`), or None for
the classes of the training."""

TRAINING_CLASSES = "training"
"""As background: the classes of the training that are not detected."""

ALIKE_ABOVE = 0.9
"""Of whole vocabularies as background, classes whose cosine with a detected class is above this are left out."""

BACKGROUND_MARGIN = 1.0
"""Of the logits; about what absorbs most false hits and takes no true ones (``benchmarks/scorers.py``)."""

_CACHED_VOCABULARIES = 16


class TrainedClasses:
    """The classes of a training and its text encoder: makes vocabularies that fit it of what users name.

    Attributes:
        vocabulary: The classes of the training.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: TextEncoder | Path | None = None) -> None:
        """Keep both.

        Args:
            vocabulary: The classes of the training.
            encoder: As for `proxydet.detector.Detector`.
        """
        self.vocabulary = vocabulary
        self._encoder = encoder
        self._lock = threading.Lock()
        self._named = lru_cache(maxsize=_CACHED_VOCABULARIES)(self._embed)

    def resolve(self, vocabulary: Classes, background: Classes = None) -> Vocabulary:
        """Turn what a user gives as classes into a vocabulary that fits the training.

        Names, files and published vocabularies are split into base and novel by `with_base`; a `Vocabulary` object
        is taken as it is.

        Args:
            vocabulary: What to detect.
            background: As for `with_background`; None: no more than the vocabulary has.

        Raises:
            InputError: It cannot be used.
        """
        if background is not None:
            return self.with_background(self.resolve(vocabulary), background)
        if vocabulary is None:
            return self.vocabulary
        if isinstance(vocabulary, Vocabulary):
            return vocabulary
        if isinstance(vocabulary, str | Path):
            opened = open_vocabulary(
                vocabulary, encoder=lambda: self.encoder, known=self.vocabulary
            )
            return self.with_base(opened)
        return self.vocabulary_of(vocabulary)

    def with_background(
        self, vocabulary: Vocabulary, background: Classes, *, margin: float = BACKGROUND_MARGIN
    ) -> Vocabulary:
        """Add classes that take regions from others and are not reported, so that other things are not taken for the classes.

        Args:
            vocabulary: What to detect.
            background: Names, none of which may be detected; or `TRAINING_CLASSES`, a file, a published or another vocabulary: of
                these, classes are left out whose name is detected, or whose cosine with a detected class is above `ALIKE_ABOVE`.
                Classes that are background of the vocabulary already stay as they are.
            margin: As for `background_of`.

        Raises:
            InputError: It cannot be used, or none of its classes is left.
        """
        whole = isinstance(background, Vocabulary | str | Path)
        other = self.background_of(background, margin=margin)
        found = vocabulary.with_background(other, alike_above=ALIKE_ABOVE if whole else None)
        if set(other.names).isdisjoint(found.names[len(found.reported) :]):
            raise VocabularyError(
                "no background class is left: each is one of the classes to detect, or like one of them",
                hint="detect fewer classes (-v), or name other background classes",
            )
        return found

    def background_of(
        self, background: Classes, *, margin: float = BACKGROUND_MARGIN
    ) -> Vocabulary:
        """Return background classes, with a bias that lets them take only what they fit better than the classes to detect.

        Args:
            background: As for `with_background`.
            margin: By how much the logit of a background class must be above that of a class to detect to take its region: what
                both fit about alike is reported. A vocabulary with a bias keeps its own.

        Raises:
            InputError: It cannot be used.
        """
        if background == TRAINING_CLASSES:
            background = self.vocabulary
        other = self.resolve(background)
        return other if other.bias.any() else other.with_scorers(bias=np.full(len(other), -margin))

    def vocabulary_of(
        self, names: Sequence[str], *, prompts: str | Sequence[str] = PUBLISHED
    ) -> Vocabulary:
        """Embed class names by the text encoder of the training, and decide which count as base.

        Names of classes that the training knew have their embedding already, unless other prompts are asked for.

        Args:
            names: Class names.
            prompts: Sentences with ``{}`` in the name's place, or the name of a prompt set.

        Raises:
            VocabularyError: A name is empty or duplicate, or the encoder cannot read it or is not there.
        """
        return self._named(tuple(names), prompts if isinstance(prompts, str) else tuple(prompts))

    def _embed(self, names: tuple[str, ...], prompts: str | tuple[str, ...]) -> Vocabulary:
        made = complete_vocabulary(names, self.vocabulary, lambda: self.encoder, prompts=prompts)
        return self.with_base(made)

    def with_base(self, vocabulary: Vocabulary, threshold: float = 0.9) -> Vocabulary:
        """Decide which classes of a vocabulary count as base, by the published rule.

        Args:
            vocabulary: Any classes.
            threshold: A class is base where its largest cosine with a base class of the training is above this, or where it has
                the name of one.
        """
        return vocabulary.base_as(self.vocabulary, threshold)

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder, opened when first used.

        Raises:
            VocabularyError: Its weights are not there.
        """
        from proxydet.vocabulary.encoder import open_encoder

        with self._lock:
            if self._encoder is None or isinstance(self._encoder, Path):
                self._encoder = open_encoder(self._encoder)
            return self._encoder


# --- Published vocabularies -------------------------------------------------------------------------------------------

_Names = tuple[list[str], list[bool] | None]


def published_vocabulary(name: str, *, datasets: Path | None = None) -> Vocabulary:
    """Load a published vocabulary: names and CLIP embeddings that need no CLIP, from downloaded metadata.

    Args:
        name: One of `PUBLISHED_VOCABULARIES`. `EVERYTHING` is the classes of `NAME_TABLES`, near-duplicates merged.
        datasets: Folder of the data sets; None: where ``proxydet download`` puts them.

    Returns:
        Names and embeddings; of LVIS's tables also which classes are base (frequent and common ones), of the others
        all count as base, for lack of a split.

    Raises:
        VocabularyError: There is no such vocabulary, or its files are not there or not what they should be.
    """
    if name not in PUBLISHED_VOCABULARIES:
        raise VocabularyError(
            f"unknown published vocabulary {name!r}",
            hint=f"known: {', '.join(PUBLISHED_VOCABULARIES)}",
        )
    folder = datasets or datasets_folder()
    parts = {part: _PUBLISHED[part] for part in (NAME_TABLES if name == EVERYTHING else (name,))}
    lacking = {
        part: path
        for part, published in parts.items()
        for path in (folder / file for file in (published.names, published.embeddings) if file)
        if not path.is_file()
    }
    if lacking:
        artifacts = " ".join(_PUBLISHED[part].artifacts for part in lacking)
        path = next(iter(lacking.values()))
        raise VocabularyError(
            f"the published vocabulary {name} needs {path}, which does not exist",
            hint=f"run: proxydet download {artifacts}",
            path=path,
            needs=tuple(artifacts.split()) if datasets is None else (),
        )
    tables = {}
    for part, published in parts.items():
        path = folder / (published.names or published.embeddings)
        try:
            names, base = published.read(path)
        except (OSError, ValueError, LookupError, TypeError, RecursionError, csv.Error) as error:
            raise VocabularyError(
                f"{path}: the class names cannot be read: {error!r}",
                hint=f"download it again: proxydet download {published.artifacts}",
                path=path,
            ) from error
        rows = load_embeddings(folder / published.embeddings)
        tables[part] = Vocabulary.from_arrays(names, rows, base)
    if name == EVERYTHING:
        return mix(tables, union=True, merge_above=_ALIKE).vocabulary
    return tables[name]


def _lvis_names(path: Path) -> _Names:
    categories = json.loads(path.read_text(encoding="utf-8"))
    ordered = sorted(categories, key=lambda category: int(category["id"]))
    return [c["name"] for c in ordered], [c["frequency"] != "r" for c in ordered]


def any_names() -> list[str]:
    """Return names of things of many kinds, which show how names lie in the space of a text encoder: COCO's 80."""
    with as_file(files("proxydet.vocabulary").joinpath("coco_names.txt")) as path:
        return [entry.name for entry in read_names(path)]


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


_LVIS_CLASSES = "metadata/lvis_v1_train_cat_info.json"
_PUBLISHED = {
    "lvis": _Published(
        "metadata/lvis_v1_clip_a+cname.npy", _LVIS_CLASSES, _lvis_names, "lvis-metadata"
    ),
    "coco": _Published(
        "metadata/coco_clip_a+cname.npy", None, lambda _: (any_names(), None), "coco-embeddings"
    ),
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

NAME_TABLES: tuple[str, ...] = tuple(_PUBLISHED)
"""The published vocabularies of class names, in the published prompt."""

_PUBLISHED |= {
    f"lvis-{kind}": _Published(
        f"metadata/{file}.npy", _LVIS_CLASSES, _lvis_names, f"lvis-{kind} lvis-category-info"
    )
    for kind, file in {
        "descriptions": "lvis_gpt3_text-davinci-002_features_author",
        "exemplars": "lvis_image_exemplar_features_avg_K-005_author",
        "exemplars-aggregated": "lvis_image_exemplar_features_agg_K-005_author",
        "multimodal": "lvis_multi-modal_agg_K-005_author",
        "multimodal-mean": "lvis_multi-modal_avg_K-005_author",
    }.items()
}

EVERYTHING = "all"
"""The published vocabulary of all classes in `NAME_TABLES`, for naming what is there without being asked."""
_ALIKE = 0.95

PUBLISHED_VOCABULARIES: tuple[str, ...] = (*_PUBLISHED, EVERYTHING)
"""Names that `published_vocabulary` knows."""
