"""What a vocabulary's classes resemble: the training's classes, and each other.

Dimensions: C classes, R reference classes, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from proxydet.errors import VocabularyError
from proxydet.vocabulary.names import name_key
from proxydet.vocabulary.vocabulary import Vocabulary

_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A class of the reference vocabulary that a class resembles."""

    name: str
    cosine: float
    base: bool
    """Whether training may have used its annotations."""


@dataclass(frozen=True, kw_only=True)
class ClassReport:
    """One class next to the reference vocabulary."""

    name: str
    base: bool
    """Whether it counts as base by the published rule."""
    reason: str
    """Why, in words."""
    nearest: tuple[Neighbour, ...]
    """The most similar reference classes, the nearest first."""


@dataclass(frozen=True, kw_only=True)
class AlikePair:
    """Two classes of one vocabulary that the text encoder hardly distinguishes."""

    first: str
    second: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class VocabularyReport:
    """A vocabulary next to a reference."""

    classes: tuple[ClassReport, ...]
    alike: tuple[AlikePair, ...]
    """Pairs above the limit, the most alike first."""
    threshold: float
    shared: int
    """Classes that both vocabularies have, by name."""
    nearest_is_own: float | None
    """Share of the shared classes whose most similar reference class is that of the same name (top-1); None where there are none."""


def compare(
    vocabulary: Vocabulary,
    reference: Vocabulary,
    *,
    threshold: float = 0.9,
    neighbours: int = 3,
    alike_above: float = 0.95,
) -> VocabularyReport:
    """Compare a vocabulary with that of a training.

    Args:
        vocabulary: Classes to report on.
        reference: Classes of the training, with their base mask.
        threshold: A class counts as base where its largest cosine with a base reference class is above this.
        neighbours: Reference classes to name for each class.
        alike_above: Pairs of classes with a larger cosine are reported.

    Raises:
        VocabularyError: The vocabularies come from different encoders, or the reference has no base class.
    """
    if not reference.base.any():
        raise VocabularyError(
            "the reference vocabulary has no base class",
            hint="give the vocabulary that the model was trained with",
        )
    judged = vocabulary.base_as(reference, threshold)
    classes = []
    places = {name_key(name): place for place, name in enumerate(reference.names)}
    shared = own = 0
    table_RD = reference.normalised()
    for start in range(0, len(vocabulary), _ROWS):
        cosines_CR = vocabulary.normalised()[start : start + _ROWS] @ table_RD.T
        for offset, cosines_R in enumerate(cosines_CR):
            index = start + offset
            order = np.argsort(-cosines_R, kind="stable")[:neighbours]
            best = int(np.argmax(np.where(reference.base, cosines_R, -np.inf)))
            key = name_key(vocabulary.names[index])
            if key in places:
                shared += 1
                own += int(order[0]) == places[key]
            cosine, near = float(cosines_R[best]), reference.names[best]
            reason = f"cosine {cosine:.3f} with the base class {near!r} is {'' if cosine > threshold else 'not '}above {threshold:g}"
            if judged.base[index] and cosine <= threshold:
                reason = "it has the name of a base class"
            classes.append(
                ClassReport(
                    name=vocabulary.names[index],
                    base=bool(judged.base[index]),
                    reason=reason,
                    nearest=tuple(
                        Neighbour(
                            name=reference.names[i],
                            cosine=float(cosines_R[i]),
                            base=bool(reference.base[i]),
                        )
                        for i in order
                    ),
                )
            )
    return VocabularyReport(
        classes=tuple(classes),
        alike=_alike(vocabulary, alike_above),
        threshold=threshold,
        shared=shared,
        nearest_is_own=own / shared if shared else None,
    )


def _alike(vocabulary: Vocabulary, above: float) -> tuple[AlikePair, ...]:
    table_CD = vocabulary.normalised()
    pairs = []
    for start in range(0, len(vocabulary), _ROWS):
        cosines_CC = table_CD[start : start + _ROWS] @ table_CD[start:].T
        rows, columns = np.nonzero(np.triu(cosines_CC > above, k=1))
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            pairs.append(
                AlikePair(
                    first=vocabulary.names[start + row],
                    second=vocabulary.names[start + column],
                    cosine=float(cosines_CC[row, column]),
                )
            )
    return tuple(sorted(pairs, key=lambda pair: -pair.cosine))
