"""Class names with their text embeddings: the classes to detect.

A vocabulary is a value: immutable, comparable, hashable. It goes into the model as an argument and never changes it.

Dimensions: C classes, R reference classes, D embedding.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.format import MAGIC_PREFIX

from proxydet.errors import CheckpointError, VocabularyError
from proxydet.files import PLACEHOLDER_BYTES, PlaceholderError, refuse_placeholder, write_bytes
from proxydet.paths import how_to_restore
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.names import ClassWords, quote_names
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
    return [ClassWords(name, entry.synonyms) for name, entry in zip(names, entries, strict=True)]


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

    Attributes:
        names: C class names, in the order of the rows of ``embeddings``.
        embeddings: float32 (C, D), as the text encoder gave them (not normalised), read-only.
        base: bool (C,), True for classes whose annotations training may use; all True where unknown; read-only.
        digest: SHA-256 over the three, hexadecimal.
        known: float32 (R, D) of base classes of the detector that training started from, which are not among the classes; read-only.
    """

    names: tuple[str, ...]
    embeddings: FloatArray
    base: BoolArray
    digest: str
    known: FloatArray

    @classmethod
    def from_arrays(
        cls,
        names: Iterable[str],
        embeddings: npt.ArrayLike,
        base: npt.ArrayLike | None = None,
        known: npt.ArrayLike | None = None,
    ) -> Vocabulary:
        """Check and freeze names and arrays.

        Args:
            names: C class names; blanks around them are removed.
            embeddings: (C, D) finite numbers, one non-zero row a name.
            base: (C,) of bool (or 0 / 1); None means that all classes are base.
            known: (R, D) embeddings of further base classes; None for none.

        Raises:
            VocabularyError: a name is empty or there twice, or an array has the wrong shape, type or values.
        """
        checked_names = check_names(names)
        embeddings_CD = _check_embeddings(embeddings, len(checked_names))
        base_C = _check_base(base, len(checked_names))
        known_RD = np.zeros((0, embeddings_CD.shape[1]), np.float32)
        if known is not None and len(np.asarray(known)):
            known_RD = _check_embeddings(known, None)
            if known_RD.shape[1] != embeddings_CD.shape[1]:
                raise VocabularyError(
                    f"classes known before have {known_RD.shape[1]} dimensions, the others {embeddings_CD.shape[1]}",
                    hint="embed both with the same text encoder",
                )
        for array in (embeddings_CD, base_C, known_RD):
            array.setflags(write=False)
        return cls(
            names=checked_names,
            embeddings=embeddings_CD,
            base=base_C,
            digest=_digest(checked_names, embeddings_CD, base_C),
            known=known_RD,
        )

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
            raise VocabularyError(f"there is no vocabulary file {path}", hint=hint, path=path)
        if not path.is_file():
            raise VocabularyError(f"the vocabulary {path} is not a file", hint=hint, path=path)
        try:
            arrays = read_arrays(path, ("names", "embeddings", "base"), optional=("known",))
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
        return cls.from_arrays(names, arrays["embeddings"], arrays["base"], arrays.get("known"))

    def save(self, path: Path | str) -> Path:
        """Write a ``.npz`` that `load` reads; an existing file is replaced in one step.

        Raises:
            RuntimeEnvironmentError: The file cannot be written.
        """
        file = io.BytesIO()
        arrays: dict[str, Any] = {"names": np.array(self.names), "embeddings": self.embeddings}
        arrays["base"] = self.base
        if len(self.known):
            arrays["known"] = self.known
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

    def with_base(self, mask: npt.ArrayLike) -> Vocabulary:
        """Return the same classes with another base mask, bool (C,)."""
        return Vocabulary.from_arrays(self.names, self.embeddings, mask, self.known)

    def with_known(self, start: Vocabulary) -> Vocabulary:
        """Return the same classes with the base classes of the detector that training starts from as known ones.

        Raises:
            VocabularyError: their embeddings have other dimensions.
        """
        return Vocabulary.from_arrays(self.names, self.embeddings, self.base, start.base_embeddings)

    @property
    def base_embeddings(self) -> FloatArray:
        """Text embeddings of all base classes, those that were known before too: float32 (R, D), not normalised."""
        return np.concatenate([self.embeddings[self.base], self.known])

    def base_by_similarity(self, reference_RD: npt.ArrayLike, threshold: float = 0.9) -> Vocabulary:
        """Return the same classes, base where they resemble a class that training saw.

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
        return self.with_base(cosines_CR.max(axis=1) > threshold)

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
        return Vocabulary.from_arrays(wanted, self.embeddings[rows], self.base[rows])

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
        with path.open("rb") as file:
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
        raise VocabularyError(
            f"there is no file {path}", hint="check the spelling of its path", path=path
        ) from error
    except PlaceholderError as error:
        message = f"cannot read embeddings from {path}: {error.what}"
        raise VocabularyError(message, hint=error.remedy, path=path) from error
    except Exception as error:  # numpy raises errors of any kind for damaged files
        reason = "it holds Python objects, not numbers" if "bject" in str(error) else error
        raise VocabularyError(
            f"cannot read embeddings from {path}: {reason}", hint=hint, path=path
        ) from error


def _check_embeddings(embeddings: npt.ArrayLike, count: int | None) -> FloatArray:
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
    if count is not None and given.shape[0] != count:
        raise VocabularyError(
            f"{count} class names but {given.shape[0]} embeddings",
            hint="give one embedding row a class name, in the same order",
        )
    table = np.array(given, dtype=np.float32, order="C")
    bad: BoolArray = np.logical_not(np.isfinite(table).all(axis=1))
    if bad.any():
        raise VocabularyError(
            f"embeddings that are not finite, rows {_positions(bad)} (counted from 0)",
            hint="encode these class names again",
        )
    zero: BoolArray = np.logical_not(table.any(axis=1))
    if zero.any():
        raise VocabularyError(
            f"embeddings that are all zero, rows {_positions(zero)} (counted from 0)",
            hint="a zero row for the background does not belong into the file; encode other rows again",
        )
    return table


def _check_base(base: npt.ArrayLike | None, count: int) -> BoolArray:
    if base is None:
        return np.ones(count, dtype=np.bool_)
    given = np.asarray(base)
    if given.shape != (count,):
        raise VocabularyError(
            f"the base mask has shape {given.shape} for {count} classes",
            hint="a mask with one entry more holds the background: leave that one out",
        )
    if given.dtype != np.bool_ and not np.isin(given, (0, 1)).all():
        raise VocabularyError(
            "the base mask must hold only True and False (or 1 and 0)",
            hint="give one truth value a class",
        )
    return np.array(given, dtype=np.bool_)


def _normalise(table: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(table.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(table / lengths, dtype=np.float32)


def _digest(names: tuple[str, ...], embeddings: FloatArray, base: BoolArray) -> str:
    digest = hashlib.sha256()
    for name in names:
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    digest.update(repr(embeddings.shape).encode())
    digest.update(np.ascontiguousarray(embeddings, dtype="<f4").data)
    digest.update(np.ascontiguousarray(base).data)
    return digest.hexdigest()


def _positions(mask: BoolArray, limit: int = 5) -> str:
    rows = np.flatnonzero(mask)
    shown = ", ".join(str(row) for row in rows[:limit])
    return shown if len(rows) <= limit else f"{shown} and {len(rows) - limit} more"


def build_vocabulary(
    classes: Sequence[str | ClassWords],
    encoder: TextEncoder,
    *,
    prompts: str | Sequence[str] = PUBLISHED,
) -> Vocabulary:
    """Embed class names.

    A class with one word and one prompt has the text's embedding as it is. With synonyms or several
    prompts it has the mean of the texts' embeddings, each normalised first, as CLIP's authors do.

    Args:
        classes: Names, or names with synonyms.
        encoder: Turns texts into embeddings.
        prompts: Sentences or the name of a prompt set; a `CompositionalEncoder` reads names without prompts.

    Raises:
        VocabularyError: A name is empty or there twice, or cannot be encoded.
    """
    entries = check_classes(classes)
    filled = find_prompts(prompts)
    if isinstance(encoder, CompositionalEncoder):
        filled = ("{}",)
    texts = [[fill(prompt, word) for word in entry.words for prompt in filled] for entry in entries]
    rows_TD = encoder.encode([text for group in texts for text in group])
    ends = np.cumsum([len(group) for group in texts])
    rows_CD = [_merged(part) for part in np.split(rows_TD, ends[:-1])]
    return Vocabulary.from_arrays([entry.name for entry in entries], np.stack(rows_CD))


def _merged(rows_TD: FloatArray) -> FloatArray:
    if len(rows_TD) == 1:
        single: FloatArray = rows_TD[0]
        return single
    mean_D: FloatArray = (rows_TD / np.linalg.norm(rows_TD, axis=1, keepdims=True)).mean(axis=0)
    return mean_D
