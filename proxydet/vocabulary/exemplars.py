"""Classes from exemplars: what a detector sees in a few regions, made into the embedding that finds more of the same.

The mean region embedding of a class is a bad scorer: all region embeddings share a direction, and lie away from the text.
How regions and texts of the training classes vary together says how to read it. Over classes the two are taken as jointly
Gaussian, so that the embedding that n exemplars of the mean x call for is

::

    t = mean_t + C_tx (C_xx + W / n)^-1 (x - mean_x)

with the covariance W of regions within a class, C_xx of the class means, and C_tx between texts and class means. That is a
linear discriminant with shared covariances whose scores are in the units of text classes: classes of both kinds can stand in
one vocabulary, and the two embeddings of a class can be averaged.

Without a detector, CLIP's embeddings of images make classes in the space of its texts (`classes_of_images`).

Dimensions: K classes with statistics, C classes of exemplars, N exemplars of a class, M other images, R names, D embedding.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from proxydet.errors import CheckpointError, VocabularyError
from proxydet.files import write_bytes
from proxydet.vocabulary.vocabulary import FloatArray, Vocabulary, check_names
from proxydet.weight_files import read_arrays

STATISTICS_NAME = "region_statistics.npz"
"""File of the statistics of a run's detector, in its folder."""
FOLDS = 5
_SHRINKAGES = (0.0, 0.03, 0.1, 0.3, 1.0)
# Of the mean variance, added to the covariance within classes: regions may be fewer than dimensions.
_RIDGE = 0.02
_FEWEST_TO_TRIM = 4
# Deviations from the median distance, in standard deviations of a normal distribution, beyond which an exemplar is left out.
_TRIMMED_BEYOND = 3.0
# And in typical distances of a region from the centre of its class.
_TRIMMED_TIMES = 1.8
_MAD = 1.4826
# Of embeddings of length 1: below it the exemplars are all that there is.
_LEAST_DISTANCE = 1e-4
# Exemplars that a name counts as much as (benchmarks/exemplars_cpu2_202611.md).
_TEXT_COUNTS = 10.0
# Steeper logits than names have rank better; a bias keeps the scores of what belongs to the class where those of names are (same).
_STEEPER = 1.6


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionStatistics:
    """What regions of known classes look like to a detector; make one with `from_regions` or `load`.

    Attributes:
        weights: Digest of the weights that made the region embeddings.
        temperature: The detector's factor from cosine to logit.
        means_KD: float32, mean region embedding of each class.
        counts_K: int64, regions of each.
        texts_KD: float32, normalised text embedding of each.
        within_DD: float32, covariance of regions within their class.
        shrinkage: Share in [0, 1] of an isotropic covariance in those over classes, by which texts of held-out classes are predicted best.
    """

    weights: str
    temperature: float
    means_KD: FloatArray
    counts_K: npt.NDArray[np.int64]
    texts_KD: FloatArray
    within_DD: FloatArray
    shrinkage: float

    @classmethod
    def from_regions(
        cls,
        regions_ND: FloatArray,
        class_N: npt.NDArray[np.int64],
        vocabulary: Vocabulary,
        *,
        weights: str,
        temperature: float,
    ) -> RegionStatistics:
        """Measure.

        Args:
            regions_ND: Region embeddings.
            class_N: Rows of the vocabulary.
            vocabulary: Text embeddings of the classes.
            weights: Digest of the weights that made the region embeddings.
            temperature: The detector's factor from cosine to logit.

        Raises:
            VocabularyError: There are regions of fewer than two classes, or no class has two.
        """
        rows_K, place_N = np.unique(class_N, return_inverse=True)
        counts_K = np.bincount(place_N, minlength=len(rows_K))
        if len(rows_K) < 2 or counts_K.max() < 2:
            raise VocabularyError(
                f"{len(class_N)} regions of {len(rows_K)} training classes do not show how regions of a class differ",
                hint="give more images of the training's classes: --statistics IMAGES",
            )
        regions = regions_ND.astype(np.float64)
        means_KD = np.zeros((len(rows_K), regions.shape[1]))
        np.add.at(means_KD, place_N, regions)
        means_KD /= counts_K[:, None]
        apart_ND = regions - means_KD[place_N]
        within_DD = apart_ND.T @ apart_ND / max(len(regions) - len(rows_K), 1)
        ridge = _RIDGE * np.trace(within_DD) / len(within_DD)
        within_DD[np.diag_indices_from(within_DD)] += max(ridge, 1e-6)
        measured: dict[str, Any] = {
            "weights": weights,
            "temperature": temperature,
            "means_KD": means_KD.astype(np.float32),
            "counts_K": counts_K.astype(np.int64),
            "texts_KD": vocabulary.normalised()[rows_K],
            "within_DD": within_DD.astype(np.float32),
        }
        plain = cls(shrinkage=0.5, **measured)
        return cls(shrinkage=plain._best_shrinkage(), **measured)

    @classmethod
    def assumed(
        cls, regions_ND: FloatArray, vocabulary: Vocabulary, *, weights: str, temperature: float
    ) -> RegionStatistics:
        """Take it that regions vary over classes as the texts do, around the mean of some regions of any kind.

        Args:
            regions_ND: Region embeddings.
            vocabulary: The training classes.
            weights: Digest of the weights that made the region embeddings.
            temperature: The detector's factor from cosine to logit.

        Raises:
            VocabularyError: There is no region.
        """
        if not len(regions_ND):
            raise VocabularyError(
                "there are no regions that show what the detector sees in images",
                hint="give other images: proxydet vocab build --exemplars ... --statistics IMAGES",
            )
        texts_KD = vocabulary.normalised()
        texts_KD = np.concatenate([texts_KD, texts_KD])[: max(len(texts_KD), 2)]
        regions = regions_ND.astype(np.float64)
        within_DD = np.cov(regions.T, bias=True)
        ridge = max(_RIDGE * np.trace(within_DD) / len(within_DD), 1e-6)
        within_DD[np.diag_indices_from(within_DD)] += ridge
        means_KD = texts_KD - texts_KD.mean(axis=0) + regions.mean(axis=0)
        return cls(
            weights=weights,
            temperature=temperature,
            means_KD=means_KD.astype(np.float32),
            counts_K=np.full(len(texts_KD), 1_000_000, dtype=np.int64),
            texts_KD=texts_KD,
            within_DD=within_DD.astype(np.float32),
            shrinkage=0.3,
        )

    def _best_shrinkage(self) -> float:
        """Return the shrinkage by which the texts of held-out classes are predicted best from their region means."""
        classes = len(self.means_KD)
        folds_K = np.random.default_rng(0).permutation(classes) % FOLDS
        lost = np.zeros(len(_SHRINKAGES))
        for fold in range(min(FOLDS, classes)):
            own_K = folds_K != fold
            if own_K.sum() < 2:
                return 1.0
            rest = replace(
                self,
                means_KD=self.means_KD[own_K],
                counts_K=self.counts_K[own_K],
                texts_KD=self.texts_KD[own_K],
            )
            for place, shrinkage in enumerate(_SHRINKAGES):
                found = replace(rest, shrinkage=shrinkage).texts_of(
                    self.means_KD[~own_K], self.counts_K[~own_K]
                )
                lost[place] += float(np.square(found - self.texts_KD[~own_K]).sum())
        return _SHRINKAGES[int(lost.argmin())]

    @cached_property
    def _over_classes(self) -> tuple[npt.NDArray[np.float64], ...]:
        """Mean region, mean text, and the covariances of class means, and of them with texts: (D,), (D,), (D, D), (D, D)."""
        means, texts = self.means_KD.astype(np.float64), self.texts_KD.astype(np.float64)
        mean_D, text_D = means.mean(axis=0), texts.mean(axis=0)
        means, texts = means - mean_D, texts - text_D
        both_DD = means.T @ texts / len(means)
        own_DD = means.T @ means / len(means)
        # What the class means vary by because few regions were seen counts for the isotropic part too, by its trace alone.
        noise = float(np.trace(self.within_DD) * (1 / self.counts_K).mean())
        spread = max(float(np.trace(own_DD)) - noise, 0.1 * float(np.trace(own_DD)), 1e-9)
        eye_DD = np.eye(len(mean_D)) * spread / len(mean_D)
        slope = max(float(np.trace(both_DD)) / spread, 1e-3)
        own_DD = (1 - self.shrinkage) * own_DD + self.shrinkage * eye_DD
        both_DD = (1 - self.shrinkage) * both_DD + self.shrinkage * slope * eye_DD
        return mean_D, text_D, own_DD, both_DD

    def texts_of(self, means_CD: npt.ArrayLike, counts_C: npt.ArrayLike) -> FloatArray:
        """Return the embedding that finds more of what some regions show: float32 (C, D), in units of text embeddings.

        Args:
            means_CD: Mean embedding of the regions of each class.
            counts_C: How many regions of each; the fewer, the nearer the result is to the mean text.
        """
        mean_D, text_D, own_DD, both_DD = self._over_classes
        apart_CD = np.asarray(means_CD, dtype=np.float64) - mean_D
        counts = np.asarray(counts_C)
        found_CD = np.empty_like(apart_CD)
        for count in np.unique(counts):
            rows = counts == count
            factor_DD = np.linalg.solve(own_DD + self.within_DD / count, both_DD)
            found_CD[rows] = text_D + apart_CD[rows] @ factor_DD
        return found_CD.astype(np.float32)

    @cached_property
    def expected_distance(self) -> float:
        """How far what a single region calls for is from what its class calls for, on average (root mean square)."""
        _, _, own_DD, both_DD = self._over_classes
        factor_DD = np.linalg.solve(own_DD + self.within_DD, both_DD)
        return float(np.sqrt(max(np.trace(factor_DD.T @ self.within_DD @ factor_DD), 0.0)))

    def save(self, path: Path) -> Path:
        """Write a ``.npz`` that `load` reads; an existing file is replaced in one step.

        Raises:
            RuntimeEnvironmentError: The file cannot be written.
        """
        file = io.BytesIO()
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {name: np.array([getattr(self, name)]) for name in _VALUES}
        np.savez(file, **arrays)
        return write_bytes(path, file.getvalue())

    @classmethod
    def load(cls, path: Path) -> RegionStatistics:
        """Read what `save` wrote.

        Raises:
            VocabularyError: The file is absent, damaged, or holds something else.
        """
        try:
            arrays = read_arrays(path, (*_VALUES, *_ARRAYS))
            means, dimension = arrays["means_KD"], arrays["within_DD"].shape[-1]
            shapes = {
                "means_KD": (len(means), dimension),
                "texts_KD": (len(means), dimension),
                "within_DD": (dimension, dimension),
                "counts_K": (len(means),),
                **dict.fromkeys(_VALUES, (1,)),
            }
            for name, shape in shapes.items():
                values = arrays[name]
                if values.shape != shape or len(means) < 2:
                    raise ValueError(f"{name} is of shape {values.shape}")
                if name != "weights" and not np.isfinite(values.astype(np.float64)).all():
                    raise ValueError(f"{name} is not finite")
            if arrays["counts_K"].min() < 1 or not 0 <= float(arrays["shrinkage"][0]) <= 1:
                raise ValueError("its numbers are out of range")
        except (CheckpointError, ValueError, TypeError, IndexError) as error:
            raise VocabularyError(
                f"{path} does not hold region statistics: {str(error).replace(str(path), 'it')}",
                hint="remove the file; it is made again from images: proxydet vocab build --exemplars ... --statistics IMAGES",
                path=path,
            ) from error
        return cls(
            weights=str(arrays["weights"][0]),
            temperature=float(arrays["temperature"][0]),
            shrinkage=float(arrays["shrinkage"][0]),
            **{name: arrays[name] for name in _ARRAYS},
        )


_VALUES = ("weights", "temperature", "shrinkage")
_ARRAYS = ("means_KD", "counts_K", "texts_KD", "within_DD")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExemplarClasses:
    """Classes made of exemplars.

    Attributes:
        vocabulary: The C classes. Those of a detector's regions all count as base, which their scale keeps
            (`Vocabulary.base_by_similarity`).
        counts_C: int64, exemplars that count.
        outliers: For each class bool (N,), exemplars that look so unlike the others that they were left out.
    """

    vocabulary: Vocabulary
    counts_C: npt.NDArray[np.int64]
    outliers: tuple[npt.NDArray[np.bool_], ...]


def classes_of_exemplars(
    names: Sequence[str],
    regions: Sequence[npt.ArrayLike],
    statistics: RegionStatistics,
    text: Vocabulary | None = None,
    *,
    images: Vocabulary | None = None,
) -> ExemplarClasses:
    """Make classes of what a detector sees in exemplars of them.

    Exemplars that are there twice count once. Of four or more of a class, those that look unlike the others are left out.

    Args:
        names: C class names.
        regions: The region embeddings (N, D) of each class, at least one.
        statistics: Of the same detector.
        text: Text embeddings of the same names, in the same order: each class is a mean of both, in which a name counts as
            much as ten exemplars.
        images: What `classes_of_images` made of the same exemplars: each class is the mean of both.

    Raises:
        VocabularyError: A class has no exemplar or is there twice, or embeddings do not fit the statistics or are not finite.
    """
    checked = check_names(names)

    def seen(regions_ND: npt.NDArray[np.float64]) -> FloatArray:
        # What tells classes from each other, not what all regions differ by.
        return statistics.texts_of(regions_ND, np.ones(len(regions_ND)))

    dimension = statistics.means_KD.shape[1]
    means_CD, counts_C, outliers = _averaged(
        checked, regions, dimension, seen, statistics.expected_distance
    )
    found_CD = statistics.texts_of(means_CD, counts_C)
    if images is not None:
        _require_same(images, checked, dimension)
        found_CD = (found_CD + images.embeddings) / np.float32(2)
    found_CD = _fused(found_CD, counts_C, checked, text)
    own_K = (statistics.means_KD * statistics.texts_KD).sum(axis=1)
    bias = (1 - _STEEPER) * statistics.temperature * float(own_K.mean())
    scale_C = np.maximum(_STEEPER * np.linalg.norm(found_CD, axis=1), 1e-6).astype(np.float32)
    scale_C[scale_C == 1] = np.nextafter(np.float32(1), np.float32(2))  # 1 would say: of text
    return ExemplarClasses(
        vocabulary=Vocabulary.from_arrays(
            checked, found_CD, scale=scale_C, bias=np.full(len(checked), bias)
        ),
        counts_C=counts_C,
        outliers=outliers,
    )


def classes_of_images(
    names: Sequence[str],
    images: Sequence[npt.ArrayLike],
    others_MD: FloatArray,
    reference: Vocabulary,
    text: Vocabulary | None = None,
) -> ExemplarClasses:
    """Make classes of what CLIP's image tower sees in exemplars of them, for any detector that was trained with its texts.

    CLIP's images lie apart from its texts, all in one direction. What is common to the images is taken away, and what is common to
    names put in its place; what is left of the images is made as long as that of names is.

    Args:
        names: C class names.
        images: The embeddings (N, D) of the exemplars of each class, at least one.
        others_MD: Those of images that show other things too; with several classes there may be none.
        reference: Names of any things, embedded by the text tower.
        text: As of `classes_of_exemplars`.

    Returns:
        Classes whose scores are in the units of text classes, without a scale or bias of their own.

    Raises:
        VocabularyError: As of `classes_of_exemplars`; or there is nothing to distinguish the only class from.
    """
    checked = check_names(names)
    unit = [_unit(given) for given in images]
    means_CD, counts_C, outliers = _averaged(checked, unit, reference.dimension, np.asarray, 0.0)
    apart_CD = means_CD - np.concatenate([means_CD, _unit(others_MD)]).mean(axis=0)
    texts_RD = reference.normalised().astype(np.float64)
    mean_D = texts_RD.mean(axis=0)
    own, wanted = (np.sqrt((a**2).sum(axis=1).mean()) for a in (apart_CD, texts_RD - mean_D))
    if own < _LEAST_DISTANCE:
        raise VocabularyError(
            f"the exemplars of {checked[0]!r} show nothing to distinguish it from",
            hint="give boxes in whole images, exemplars of other classes too, or any images: --statistics IMAGES",
        )
    found_CD = (mean_D + apart_CD * (wanted / own)).astype(np.float32)
    return ExemplarClasses(
        vocabulary=Vocabulary.from_arrays(checked, _fused(found_CD, counts_C, checked, text)),
        counts_C=counts_C,
        outliers=outliers,
    )


def _unit(rows: npt.ArrayLike) -> FloatArray:
    table = np.asarray(rows, dtype=np.float32)
    lengths = np.linalg.norm(table, axis=-1, keepdims=True)
    return np.asarray(table / lengths.clip(1e-12), dtype=np.float32)


def _averaged(
    names: Sequence[str],
    embeddings: Sequence[npt.ArrayLike],
    dimension: int,
    seen: Callable[[npt.NDArray[np.float64]], FloatArray],
    expected: float,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], tuple[npt.NDArray[np.bool_], ...]]:
    """Return the mean of the exemplars of each class that count, their number, and which are outliers: (C, D), (C,), C of (N,).

    Args:
        names: C checked names.
        embeddings: (N, D) of each.
        dimension: D.
        seen: Turns embeddings into those in which outliers are far from the others.
        expected: How far a single one usually is from the centre of its class.

    Raises:
        VocabularyError: Embeddings are of another shape, not finite, or there are none of a class.
    """
    means, counts, outliers = [], [], []
    for name, given in zip(names, embeddings, strict=True):
        own_ND = np.asarray(given, dtype=np.float64)
        if own_ND.ndim != 2 or own_ND.shape[1] != dimension or not len(own_ND):
            raise VocabularyError(
                f"the exemplars of {name!r} must be embeddings of shape (exemplars, {dimension}), not {own_ND.shape}",
                hint="embed at least one, with the detector of the statistics, or with the image tower next to the names' text tower",
            )
        if not np.isfinite(own_ND).all():
            raise VocabularyError(
                f"embeddings of exemplars of {name!r} are not finite",
                hint="embed these regions again",
            )
        _, first = np.unique(own_ND.round(6), axis=0, return_index=True)
        distinct_ND = own_ND[np.sort(first)]
        outlier_N = _outliers(seen(distinct_ND), expected)
        means.append(distinct_ND[~outlier_N].mean(axis=0))
        counts.append(int((~outlier_N).sum()))
        whole_N = np.zeros(len(own_ND), dtype=np.bool_)
        whole_N[np.sort(first)[outlier_N]] = True
        outliers.append(whole_N)
    return np.stack(means), np.array(counts, dtype=np.int64), tuple(outliers)


def _fused(
    found_CD: FloatArray,
    counts_C: npt.NDArray[np.int64],
    names: tuple[str, ...],
    text: Vocabulary | None,
) -> FloatArray:
    if text is None:
        return found_CD
    _require_same(text, names, found_CD.shape[1])
    text_C1 = (_TEXT_COUNTS / (_TEXT_COUNTS + counts_C))[:, None]
    return np.asarray(text_C1 * text.normalised() + (1 - text_C1) * found_CD, dtype=np.float32)


def _require_same(other: Vocabulary, names: tuple[str, ...], dimension: int) -> None:
    if other.names != names or other.dimension != dimension:
        raise VocabularyError(
            f"what the classes are fused with are {len(other)} classes of {other.dimension} dimensions, not the {len(names)} "
            f"of {dimension}",
            hint="embed the same names with the text encoder of the detector's training",
        )


def _outliers(seen_ND: FloatArray, expected: float) -> npt.NDArray[np.bool_]:
    """Return which rows are far from the others, and farther than rows of a class usually are: bool (N,), never half of them."""
    outlier_N = np.zeros(len(seen_ND), dtype=np.bool_)
    if len(seen_ND) < _FEWEST_TO_TRIM:
        return outlier_N
    centre_D = np.median(seen_ND, axis=0)
    for _ in range(3):
        distance_N = np.linalg.norm(seen_ND - centre_D, axis=1)
        middle = float(np.median(distance_N))
        spread = _MAD * float(np.median(np.abs(distance_N - middle)))
        far = max(middle + _TRIMMED_BEYOND * spread, _TRIMMED_TIMES * expected)
        outlier_N = distance_N > far
        centre_D = seen_ND[~outlier_N].mean(axis=0)
    return outlier_N
