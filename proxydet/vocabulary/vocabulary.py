"""Class names with their text embeddings: the classes to detect.

A vocabulary is a value: immutable, comparable, hashable. It goes into the model as an argument and never changes it.

Dimensions: C classes, R reference classes, D embedding.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.format import MAGIC_PREFIX

from proxydet.errors import CheckpointError, VocabularyError
from proxydet.files import (
    PLACEHOLDER_BYTES,
    PlaceholderError,
    open_regular,
    refuse_placeholder,
    write_bytes,
)
from proxydet.paths import did_you_mean, how_to_restore
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.names import ClassWords, no_file, quote_names
from proxydet.weight_files import read_arrays

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


# --- Names -------------------------------------------------------------------------------------------------------------


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names without the blanks around them.

    Raises:
        VocabularyError: There is none, or one is not text, empty, or there twice.
    """
    if isinstance(names, str):
        raise VocabularyError(
            f"class names must be a list, not one string ({names!r})", hint="split it at the commas"
        )
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
                hint="remove it, or the extra comma",
            )
        if clean in first_at:
            raise VocabularyError(
                f"duplicate class name {clean!r}, at positions {first_at[clean]} and {position} (counted from 0)",
                hint="remove one of the two",
            )
        first_at[clean] = position
    if not first_at:
        raise VocabularyError(
            "a vocabulary needs at least one class name",
            hint="name the classes to detect: cup, plate",
        )
    return tuple(first_at)


def check_classes(classes: Iterable[str | ClassWords]) -> list[ClassWords]:
    """Return names as entries, checked before the long work of embedding them.

    Raises:
        VocabularyError: There is no name, or one is empty or there twice.
    """
    entries = [entry if isinstance(entry, ClassWords) else ClassWords(entry) for entry in classes]
    names = check_names(entry.name for entry in entries)
    return [replace(entry, name=name) for name, entry in zip(names, entries, strict=True)]


# --- Prompts ----------------------------------------------------------------------------------------------------------

PUBLISHED = ("a {}",)
"""The prompt of all published embeddings (and of ProxyDet's training)."""

PROMPT_SETS: dict[str, tuple[str, ...]] = {
    "published": PUBLISHED,
    "photo": ("a photo of a {}.",),
    "ensemble": (
        "a {}",
        "a photo of a {}.",
        "a photo of the {}.",
        "a close-up photo of a {}.",
        "a photo of a small {}.",
        "a photo of a large {}.",
        "there is a {} in the scene.",
    ),
}
"""Prompts by name; where there are several, a class's embedding is their mean."""


def find_prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    """Give the prompts of a named set, or check prompts that were written out.

    Args:
        prompts: A key of `PROMPT_SETS`, one prompt such as ``"a photo of a {}"``, or several.

    Returns:
        At least one prompt, each with ``{}`` in the name's place.

    Raises:
        VocabularyError: There is no such set, or a prompt does not hold ``{}`` exactly once.
    """
    if isinstance(prompts, str):
        if prompts in PROMPT_SETS:
            return PROMPT_SETS[prompts]
        prompts = (prompts,)
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise VocabularyError(
                f"the prompt {prompt!r} does not hold {{}} exactly once",
                hint=f"write a sentence with {{}} in the name's place, or one of {', '.join(PROMPT_SETS)}",
            )
    if not prompts:
        raise VocabularyError("there are no prompts", hint='give at least one, such as "a {}"')
    return tuple(prompts)


def fill(prompt: str, name: str) -> str:
    """Put a name into a prompt; braces in the name stay as they are."""
    return prompt.replace("{}", name, 1)


CLIP_TOKENS = 77
"""Tokens that CLIP's text towers read, start and end included."""


@functools.cache
def _tokenizer() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


def names_too_long(names: Iterable[str]) -> dict[str, int]:
    """Find the names that CLIP would cut, in the published prompt.

    Args:
        names: Class names.

    Returns:
        By name, its tokens, start and end included: more than `CLIP_TOKENS`.
    """
    texts = {name: fill(PUBLISHED[0], name) for name in names}
    # A token stands for a byte at least, so only long names need the tokenizer, which takes seconds to import.
    suspects = [name for name, text in texts.items() if len(text.encode()) + 2 > CLIP_TOKENS]
    counts = {name: len(_tokenizer().encode(texts[name])) + 2 for name in suspects}
    return {name: count for name, count in counts.items() if count > CLIP_TOKENS}


# --- The vocabulary ------------------------------------------------------------------------------------------------------


class TextEncoder(Protocol):
    """Anything that embeds texts."""

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""

    def encode(self, names: Sequence[str]) -> FloatArray:
        """Embed texts: (T, D) float32, not normalised."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Names, embeddings and the base / novel split of a set of classes.

    Make one with `from_arrays` or `load`, which check what they are given. Two vocabularies are equal when their
    digests are.

    A class is a linear scorer of region embeddings: its logit is temperature * ``scale`` * cosine + ``bias``, with the cosine
    of its embedding. Classes of text have a scale of 1, no bias and no threshold of their own: their scores are the published
    ones. Background classes stand behind all others, so that the places of the reported classes are those in `reported`.

    Attributes:
        names: C class names, in the order of the rows of ``embeddings``.
        embeddings: float32 (C, D), as the text encoder gave them (not normalised), read-only.
        base: bool (C,), True for classes whose annotations training may use; all True where unknown; read-only.
        digest: SHA-256 over names, embeddings and base classes, and over the scorers that are not plain text; hexadecimal.
        known: float32 (R, D) of base classes of the detector that training started from, which are not among the classes; read-only.
        bias: float32 (C,), added to the logits of all branches and steps; read-only.
        scale: float32 (C,), above 0, multiplies the cosine; other than 1 where the embedding is not a text's (exemplars); read-only.
        threshold: float32 (C,) in [0, 1], what a detection of the class must score above; NaN: the general threshold; read-only.
        background: bool (C,), classes that take regions from others, and are never reported themselves; read-only.
    """

    names: tuple[str, ...]
    embeddings: FloatArray
    base: BoolArray
    digest: str
    known: FloatArray
    bias: FloatArray
    scale: FloatArray
    threshold: FloatArray
    background: BoolArray

    @classmethod
    def from_arrays(
        cls,
        names: Iterable[str],
        embeddings: npt.ArrayLike,
        base: npt.ArrayLike | None = None,
        known: npt.ArrayLike | None = None,
        *,
        bias: npt.ArrayLike | None = None,
        scale: npt.ArrayLike | None = None,
        threshold: npt.ArrayLike | None = None,
        background: npt.ArrayLike | None = None,
    ) -> Vocabulary:
        """Check and freeze names and arrays.

        Args:
            names: C class names; blanks around them are removed.
            embeddings: (C, D) finite numbers, one non-zero row a name.
            base: (C,) of bool (or 0 / 1); None means that all classes are base.
            known: (R, D) embeddings of further base classes; None for none.
            bias: (C,) finite numbers; None: 0.
            scale: (C,) numbers above 0; None: 1.
            threshold: (C,) numbers in [0, 1], or NaN; None: NaN.
            background: (C,) of bool (or 0 / 1), not all of them true; None: no class is. These classes are moved behind the others.

        Raises:
            VocabularyError: a name is empty or there twice, or an array has the wrong shape, type or values.
        """
        checked_names = check_names(names)
        count = len(checked_names)
        columns: dict[str, Any] = {
            "embeddings": _check_embeddings(embeddings, checked_names),
            "base": _check_flags("base mask", base, count, default=True),
            "bias": _check_column("bias", bias, count),
            "scale": _check_column("scale", scale, count),
            "threshold": _check_column("threshold", threshold, count),
            "background": _check_flags("background mask", background, count, default=False),
        }
        if columns["background"].all():
            raise VocabularyError(
                "all classes are background: there is none to detect",
                hint="name at least one class next to the background classes",
            )
        order_C = np.argsort(columns["background"], kind="stable")
        if (np.diff(order_C) != 1).any():
            checked_names = tuple(checked_names[row] for row in order_C.tolist())
            columns = {name: values[order_C] for name, values in columns.items()}
        dimension = columns["embeddings"].shape[1]
        known_RD = np.zeros((0, dimension), np.float32)
        if known is not None and len(np.asarray(known)):
            known_RD = _check_embeddings(known, None)
            if known_RD.shape[1] != dimension:
                raise VocabularyError(
                    f"classes known before have {known_RD.shape[1]} dimensions, the others {dimension}",
                    hint="embed both with the same text encoder",
                )
        for array in (known_RD, *columns.values()):
            array.setflags(write=False)
        digest = _digest(checked_names, columns)
        return cls(names=checked_names, digest=digest, known=known_RD, **columns)

    @classmethod
    def from_names(
        cls,
        names: Sequence[str],
        *,
        prompt: str | Sequence[str] = "a {}",
        encoder: Path | str | None = None,
    ) -> Vocabulary:
        """Embed class names; see `build_vocabulary`.

        All classes count as base until `base_by_similarity` says otherwise.

        Args:
            names: Class names.
            prompt: A sentence with ``{}`` in the name's place, several, or the name of a prompt set.
            encoder: CLIP weights or a ``text_encoder.json``; None: CLIP ViT-B/32 where ``proxydet download`` puts it.

        Raises:
            VocabularyError: a name is empty or there twice, or there is no encoder.
        """
        from proxydet.vocabulary.encoder import open_encoder

        classes = check_classes(names)
        opened = open_encoder(None if encoder is None else Path(encoder))
        return build_vocabulary(classes, opened, prompts=prompt)

    @classmethod
    def load(cls, path: Path | str) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            VocabularyError: the file is absent, damaged, or not a vocabulary.
        """
        path = Path(path)
        hint = how_to_restore(
            path,
            "copy it again from where it is whole, or make one with: proxydet vocab build NAMES -o FILE",
        )
        if not path.exists():
            hint = f"{did_you_mean(path)}{hint}"
            raise VocabularyError(f"there is no vocabulary file {path}", hint=hint, path=path)
        if not path.is_file():
            raise VocabularyError(f"the vocabulary {path} is not a file", hint=hint, path=path)
        try:
            arrays = read_arrays(
                path, ("names", "embeddings", "base"), optional=("known", *_PLAIN_SCORER)
            )
            if arrays["names"].dtype.kind != "U" or arrays["names"].ndim != 1:
                raise ValueError("the names are not a list of text")
            if len(arrays["names"]) != len(arrays["embeddings"]):  # before lists are made of them
                raise ValueError("it has more names than embeddings, or fewer")
            names = arrays["names"].tolist()
        except (CheckpointError, ValueError, TypeError) as error:
            if isinstance(error.__cause__, PlaceholderError):
                hint = error.__cause__.remedy
            raise VocabularyError(
                f"{path} does not hold a vocabulary: {str(error).replace(str(path), 'it')}",
                hint=hint,
                path=path,
            ) from error
        return cls.from_arrays(names, **{name: arrays[name] for name in arrays if name != "names"})

    def save(self, path: Path | str) -> Path:
        """Write a ``.npz`` that `load` reads; an existing file is replaced in one step.

        Raises:
            RuntimeEnvironmentError: The file cannot be written.
        """
        file = io.BytesIO()
        arrays: dict[str, Any] = {"known": self.known} if len(self.known) else {}
        arrays |= {"names": np.array(self.names), "embeddings": self.embeddings, "base": self.base}
        arrays |= _not_plain(self.scorers)
        np.savez(file, **arrays)
        return write_bytes(Path(path), file.getvalue())

    def normalised(self) -> FloatArray:
        """Return the embeddings with rows of length 1: float32 (C, D), read-only, computed once."""
        return self._normalised

    @cached_property
    def _normalised(self) -> FloatArray:
        table_CD = _normalise(self.embeddings)
        table_CD.setflags(write=False)
        return table_CD

    @property
    def scorers(self) -> dict[str, npt.NDArray[Any]]:
        """What `from_arrays` takes of the classes as scorers: bias, scale, threshold, background, each (C,)."""
        return {name: getattr(self, name) for name in _PLAIN_SCORER}

    @property
    def plain(self) -> bool:
        """Whether all are classes of text: no bias, scale, threshold or background."""
        return not _not_plain(self.scorers)

    @property
    def reported(self) -> tuple[str, ...]:
        """The classes that can be detected: all but background, which stand behind them."""
        return self.names[: len(self) - int(self.background.sum())]

    def require_plain(self) -> None:
        """Check that these can be the classes of a training.

        Raises:
            VocabularyError: They have a bias, scale, threshold or background; these belong to a detector that is trained.
        """
        found = ", ".join(_not_plain(self.scorers))
        if found:
            raise VocabularyError(
                f"the classes of a training must be plain text embeddings; these carry {found}",
                hint="make plain ones with: proxydet vocab build NAMES -o FILE; calibrated classes belong to predict, eval and serve",
            )

    def _changed(self, **changes: Any) -> Vocabulary:
        given = {"names": self.names, "known": self.known, **self.columns, **changes}
        return Vocabulary.from_arrays(**given)

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """What `from_arrays` takes of each class but its name."""
        return {"embeddings": self.embeddings, "base": self.base, **self.scorers}

    def with_base(self, mask: npt.ArrayLike) -> Vocabulary:
        """Return the same classes with another base mask, bool (C,)."""
        return self._changed(base=mask)

    def with_scorers(self, **changes: npt.ArrayLike | None) -> Vocabulary:
        """Return the same classes with some of their scorers changed.

        Args:
            **changes: ``bias``, ``scale``, ``threshold`` or ``background``, as `from_arrays` takes them; None: as of plain text.

        Raises:
            VocabularyError: one has the wrong shape, type or values.
        """
        return self._changed(**changes)

    def joined(self, other: Vocabulary) -> Vocabulary:
        """Return these classes and those of another vocabulary behind them, each with its scorer.

        Raises:
            VocabularyError: a name is in both, or the embeddings have other dimensions.
        """
        if other.dimension != self.dimension:
            raise VocabularyError(
                f"the vocabularies have {self.dimension} and {other.dimension} dimensions",
                hint="embed both with the same text encoder",
            )
        theirs = other.columns
        columns = {n: np.concatenate([own, theirs[n]]) for n, own in self.columns.items()}
        return self._changed(names=[*self.names, *other.names], **columns)

    def with_background(self, other: Vocabulary, *, alike_above: float | None = None) -> Vocabulary:
        """Return these classes, and those of another vocabulary as background behind them.

        Args:
            other: Classes that take regions from the others, and are not reported.
                Those whose name is background here already stay as they are here.
            alike_above: Leave out those of ``other`` whose name is here, or whose cosine with a class that is reported is above
                this, all of them if need be; None: take them as they are, the name of a class that is reported is an error.

        Raises:
            VocabularyError: A name is that of a class that is reported, or the embeddings have other dimensions.
        """
        if other.dimension == self.dimension and alike_above is not None:
            asked_RD = self.normalised()[: len(self.reported)]
            nearest_C = (other.normalised() @ asked_RD.T).max(axis=1)
            left = [
                name
                for name, cosine in zip(other.names, nearest_C.tolist(), strict=True)
                if cosine <= alike_above and name not in self.names
            ]
        else:
            left = [name for name in other.names if name not in self.names[len(self.reported) :]]
        if not left:
            return self
        if len(left) < len(other):
            other = other.with_scorers(background=None).subset(left)
        shared = [name for name in other.names if name in self.names]
        if shared:
            raise VocabularyError(
                f"both a class to detect and a background class: {quote_names(shared)}",
                hint="leave it out of one of the two",
            )
        joined = self.joined(other)
        hidden_C = joined.background | np.isin(joined.names, other.names)
        return joined.with_scorers(
            background=hidden_C, threshold=np.where(hidden_C, np.nan, joined.threshold)
        )

    def with_known(self, start: Vocabulary) -> Vocabulary:
        """Return the same classes with the base classes of the detector that training starts from as known ones.

        Raises:
            VocabularyError: their embeddings have other dimensions.
        """
        return self._changed(known=start.base_embeddings)

    @property
    def base_embeddings(self) -> FloatArray:
        """Text embeddings of all base classes, those that were known before too: float32 (R, D), not normalised."""
        return np.concatenate([self.embeddings[self.base], self.known])

    def base_by_similarity(self, reference_RD: npt.ArrayLike, threshold: float = 0.9) -> Vocabulary:
        """Return the same classes, base where they resemble a class that training saw.

        Classes with a scale of their own stay what they are: their embedding is not a text's.

        Args:
            reference_RD: (R, D) text embeddings of the *base* classes of training, any length of rows.
            threshold: A class is base when its largest cosine with a reference row is above this.

        Raises:
            VocabularyError: the reference has another dimension, or the threshold is not a cosine.
        """
        if not -1.0 <= threshold <= 1.0:
            raise VocabularyError(
                f"the similarity threshold must be in [-1, 1], not {threshold}",
                hint="0.9 is the published one",
            )
        reference = _check_embeddings(reference_RD, None)
        if reference.shape[1] != self.embeddings.shape[1]:
            raise VocabularyError(
                f"the vocabulary has {self.embeddings.shape[1]} dimensions and the training classes have "
                f"{reference.shape[1]}: they come from different text encoders",
                hint="encode both with the same model",
            )
        cosines_CR = self.normalised() @ _normalise(reference).T
        alike_C = cosines_CR.max(axis=1) > threshold
        return self.with_base(np.where(self.scale != 1, self.base, alike_C))

    def base_as(self, trained: Vocabulary, threshold: float = 0.9) -> Vocabulary:
        """Return the same classes, base where they resemble a base class of a training, or have the name of one.

        Of published tables of names, those of the same name have the same embedding, so that names change nothing there; tables
        of descriptions or of images are as far from the names as other classes are.

        Args:
            trained: The classes of the training.
            threshold: As for `base_by_similarity`.

        Raises:
            VocabularyError: as of `base_by_similarity`.
        """
        alike = self.base_by_similarity(trained.base_embeddings, threshold)
        known = {name for name, base in zip(trained.names, trained.base, strict=True) if base}
        return self.with_base(alike.base | np.array([name in known for name in self.names]))

    def subset(self, names: Sequence[str]) -> Vocabulary:
        """Return the named classes only, in the order asked for.

        Raises:
            VocabularyError: a name is not in this vocabulary, or asked for twice.
        """
        row_of = {name: row for row, name in enumerate(self.names)}
        wanted = check_names(names)
        missing = [name for name in wanted if name not in row_of]
        if missing:
            raise VocabularyError(
                f"not in the vocabulary: {quote_names(missing)}",
                hint=f"it holds {quote_names(self.names)}",
            )
        rows = [row_of[name] for name in wanted]
        return Vocabulary.from_arrays(wanted, **{n: v[rows] for n, v in self.columns.items()})

    @property
    def dimension(self) -> int:
        """Length D of an embedding."""
        return int(self.embeddings.shape[1])

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:3]) + (", ..." if len(self) > 3 else "")
        return f"Vocabulary({len(self)} classes x {self.dimension}: {shown})"


def load_embeddings(path: Path) -> npt.NDArray[Any]:
    """Read a table of embeddings (C, D) from a ``.npy`` file.

    Raises:
        VocabularyError: The file cannot be read, or holds anything but numbers.
    """
    hint = "give a .npy file with one row a class, such as numpy.save writes"
    try:
        with open_regular(path) as file:
            head = file.read(PLACEHOLDER_BYTES)
            refuse_placeholder(head)
            if not head.startswith(MAGIC_PREFIX):
                raise VocabularyError(
                    f"{path} is not a .npy file: wrong magic bytes",
                    hint=hint,
                    path=path,
                )
        # Mapped, so that a header cannot ask for more than the file holds.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except VocabularyError:
        raise
    except FileNotFoundError as error:
        raise no_file(path) from error
    except PlaceholderError as error:
        message = f"cannot read embeddings from {path}: {error.what}"
        raise VocabularyError(message, hint=error.remedy, path=path) from error
    except Exception as error:  # numpy raises errors of any kind for damaged files
        reason = "it holds Python objects, not numbers" if "bject" in str(error) else error
        raise VocabularyError(
            f"cannot read embeddings from {path}: {reason}", hint=hint, path=path
        ) from error


def _check_embeddings(embeddings: npt.ArrayLike, names: Sequence[str] | None) -> FloatArray:
    given = np.asarray(embeddings)
    if given.ndim != 2 or given.shape[0] == 0 or given.shape[1] == 0:
        raise VocabularyError(
            f"embeddings must be a (classes, dimensions) table, not of shape {given.shape}",
            hint="save a two-dimensional array, one row a class",
        )
    if given.dtype.kind not in "fiu":
        raise VocabularyError(
            f"embeddings must be numbers, not {given.dtype}",
            hint="save a float16 or float32 array, one row a class",
        )
    if names is not None and given.shape[0] != len(names):
        raise VocabularyError(
            f"{len(names)} class names but {given.shape[0]} embeddings",
            hint="give one embedding row a class name, in the same order",
        )
    table = np.array(given, dtype=np.float32, order="C")
    bad: BoolArray = np.logical_not(np.isfinite(table).all(axis=1))
    if bad.any():
        raise VocabularyError(
            f"embeddings that are not finite, rows {_positions(bad)} (counted from 0{_named(bad, names)})",
            hint="encode these class names again",
        )
    zero: BoolArray = np.logical_not(table.any(axis=1))
    if zero.any():
        raise VocabularyError(
            f"embeddings that are all zero, rows {_positions(zero)} (counted from 0{_named(zero, names)})",
            hint="a zero row for the background does not belong into the file; encode other rows again",
        )
    return table


def _check_flags(what: str, flags: npt.ArrayLike | None, count: int, *, default: bool) -> BoolArray:
    if flags is None:
        return np.full(count, default, dtype=np.bool_)
    given = np.asarray(flags)
    if given.shape != (count,):
        raise VocabularyError(
            f"the {what} has shape {given.shape} for {count} classes",
            hint="a mask with one entry more holds the background: leave that one out",
        )
    if given.dtype != np.bool_ and not np.isin(given, (0, 1)).all():
        raise VocabularyError(
            f"the {what} must hold only True and False (or 1 and 0)",
            hint="give one truth value a class",
        )
    return np.array(given, dtype=np.bool_)


_PLAIN_SCORER = {"bias": 0.0, "scale": 1.0, "threshold": math.nan, "background": False}
"""The scorer of a class of text; what `Vocabulary.scorers` holds."""


def _not_plain(scorers: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {
        name: values
        for name, values in scorers.items()
        if not np.array_equal(
            values, np.full_like(values, _PLAIN_SCORER[name]), equal_nan=name == "threshold"
        )
    }


def _check_column(name: str, values: npt.ArrayLike | None, count: int) -> FloatArray:
    if values is None:
        return np.full(count, _PLAIN_SCORER[name], dtype=np.float32)
    given = np.asarray(values)
    if given.shape != (count,) or given.dtype.kind not in "fiu":
        raise VocabularyError(
            f"the {name} of the classes must be {count} numbers, not {given.dtype} of shape {given.shape}",
            hint="give one number a class",
        )
    column_C: FloatArray = np.array(given, dtype=np.float32)
    low, high = {"bias": (-np.inf, np.inf), "scale": (0.0, np.inf), "threshold": (0.0, 1.0)}[name]
    right = (column_C >= low) & (column_C <= high) & np.isfinite(column_C)
    if name == "scale":
        right &= column_C > 0
    if name == "threshold":
        right |= np.isnan(column_C)
    if not right.all():
        wanted = {"bias": "finite", "scale": "above 0", "threshold": "in [0, 1]"}[name]
        raise VocabularyError(
            f"the {name} of a class must be {wanted}; it is not in rows {_positions(~right)} (counted from 0)",
            hint=f"give {'NaN for the general threshold, or ' if name == 'threshold' else ''}numbers that are {wanted}",
        )
    return column_C


def _normalise(table: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(table.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(table / lengths, dtype=np.float32)


def _digest(names: tuple[str, ...], columns: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in names:
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    digest.update(repr(columns["embeddings"].shape).encode())
    digest.update(np.ascontiguousarray(columns["embeddings"], dtype="<f4").data)
    digest.update(np.ascontiguousarray(columns["base"]).data)
    scorers = {name: columns[name] for name in _PLAIN_SCORER}
    for name, values in _not_plain(scorers).items():  # classes of text have the digest of 0.1
        digest.update(name.encode())
        digest.update(values.astype("<f4").data)
    return digest.hexdigest()


def _positions(mask: BoolArray, limit: int = 5) -> str:
    rows = np.flatnonzero(mask)
    shown = ", ".join(str(row) for row in rows[:limit])
    return shown if len(rows) <= limit else f"{shown} and {len(rows) - limit} more"


def _named(mask: BoolArray, names: Sequence[str] | None) -> str:
    if names is None:
        return ""
    return f": {quote_names([names[row] for row in np.flatnonzero(mask).tolist()])}"


def build_vocabulary(
    classes: Sequence[str | ClassWords],
    encoder: TextEncoder,
    *,
    prompts: str | Sequence[str] = PUBLISHED,
    description_weight: float = 0.5,
) -> Vocabulary:
    """Embed class names, and what is said of the classes.

    A class with one word and one prompt has the text's embedding as it is. With synonyms or several prompts it has the mean
    of the texts' embeddings, each normalised first, as CLIP's authors do. Sentences and descriptions have a mean of their own,
    which is mixed with that of the names.

    Args:
        classes: Names, or names with synonyms.
        encoder: Turns texts into embeddings.
        prompts: Sentences or the name of a prompt set; a `CompositionalEncoder` reads names without prompts.
        description_weight: Share in [0, 1] of sentences and descriptions in the embedding of a class that has some.

    Raises:
        VocabularyError: A name is empty or there twice, or cannot be encoded; or the weight is not in [0, 1].
    """
    entries = check_classes(classes)
    filled = find_prompts(prompts)
    if not 0 <= description_weight <= 1:
        raise VocabularyError(
            f"the weight of descriptions is {description_weight}, not a share",
            hint="give 0 (names alone) to 1 (descriptions alone)",
        )
    texts: list[tuple[list[str], list[str]]] = []
    for entry in entries:
        own = ("{}",) if isinstance(encoder, CompositionalEncoder) else entry.templates or filled
        behind = [s if "{}" in s else f"{own[0].rstrip('.')}, {s}" for s in entry.descriptions]
        said = [s.replace("{}", entry.name) for s in (*entry.sentences, *behind)]
        named = [fill(prompt, word) for word in entry.words for prompt in own]
        if description_weight == 1 and said:
            named = []
        texts.append((named, said if description_weight else []))
    rows_TD = iter(encoder.encode([text for pair in texts for group in pair for text in group]))
    rows_CD = []
    for named, said in texts:
        of_name_TD, of_said_TD = [[next(rows_TD) for _ in group] for group in (named, said)]
        if len(of_name_TD) == 1 and not said:
            rows_CD.append(of_name_TD[0])
        elif not named or not said:
            rows_CD.append(_mean(of_name_TD or of_said_TD))
        else:
            means_GD = _normalise(np.stack([_mean(of_name_TD), _mean(of_said_TD)]))
            rows_CD.append(
                description_weight * means_GD[1] + (1 - description_weight) * means_GD[0]
            )
    return Vocabulary.from_arrays([entry.name for entry in entries], np.stack(rows_CD))


def _mean(rows_TD: Sequence[FloatArray]) -> FloatArray:
    """Return the mean of embeddings that are normalised first: float32 (D,)."""
    table_TD = np.stack(rows_TD)
    return np.asarray((table_TD / np.linalg.norm(table_TD, axis=1, keepdims=True)).mean(axis=0))
