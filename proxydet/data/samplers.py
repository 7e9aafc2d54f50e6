"""Which images make up which batch, as a pure function of seed, step and rank.

Nothing here remembers anything: the batch of step 80,000 is computed as directly as that of step 0, by any process. So a
run resumes exactly, whatever the number of loader workers was.

A *group* is a source (boxes or image labels) with an orientation (landscape or not). A batch is drawn in two parts: first
its group, so often that in the long run each image comes up in proportion to its weight; then its images, independently
and with replacement, in proportion to their weights in the group. This gives the same mixture as drawing single
images and collecting them by group until a batch is full, which is how it was published, without the state that
collecting needs.

Dimensions: I images, K categories, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from proxydet.errors import DataError

FloatArray = npt.NDArray[np.float64]

_GROUP_STREAM, _IMAGE_STREAM, _AUGMENTATION_STREAM = 1, 2, 3
SourceName = Literal["boxes", "image_labels"]


def repeat_factors(
    images_P: npt.NDArray[np.integer],
    categories_P: npt.NDArray[np.integer],
    *,
    image_count: int,
    threshold: float,
) -> FloatArray:
    """Return how often each image should be repeated for the sake of its rarest category.

    A category in a share f of the images gets max(1, sqrt(threshold / f)); an image gets the largest of its categories'
    factors, and 1 without any (LVIS paper, appendix B.2).

    Args:
        images_P: Image row of each of P annotations.
        categories_P: Category of each.
        image_count: Number of images, I.
        threshold: Share of the images below which a category is repeated; 0 repeats none.

    Returns:
        float64 (I,), at least 1.
    """
    factors_I: FloatArray = np.ones(image_count, dtype=np.float64)
    if not len(images_P):
        return factors_I
    categories = np.asarray(categories_P, dtype=np.int64)
    width = int(categories.max()) + 1
    pairs = np.unique(np.asarray(images_P, dtype=np.int64) * width + categories)
    image_of, category_of = np.divmod(pairs, width)
    share_K = np.bincount(category_of, minlength=width) / image_count
    factor_K = np.maximum(1.0, np.sqrt(threshold / np.where(share_K > 0, share_K, np.inf)))
    np.maximum.at(factors_I, image_of, factor_K[category_of])
    return factors_I


def image_weights(factors: Sequence[FloatArray], ratios: Sequence[float]) -> list[FloatArray]:
    """Return the sampling weight of each image of each source.

    Within a source, weights are in proportion to the repeat factors; their sums over the sources are in proportion to the
    ratios, and all together as large as the largest source (the published scale, which matters only for comparison).

    Args:
        factors: Repeat factors of each source.
        ratios: Share of images to draw from each source.
    """
    total = max(len(source) for source in factors)
    return [
        source * (total * ratio / sum(ratios) / source.sum())
        for source, ratio in zip(factors, ratios, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class SourceImages:
    """What the plan needs to know of a source.

    Attributes:
        name: Which source it is.
        weights_I: float64 (I,), in proportion to how often each image is to be drawn, over all sources.
        landscape_I: bool (I,), whether each image is wider than high.
        batch_size: Images of a batch on one process.
    """

    name: SourceName
    weights_I: FloatArray
    landscape_I: npt.NDArray[np.bool_]
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """What a loader worker needs to make a batch.

    Attributes:
        source: Where the images come from.
        rows: Row of each image in its source.
        seeds: Seed of each image's augmentation.
    """

    source: SourceName
    rows: tuple[int, ...]
    seeds: tuple[tuple[int, ...], ...]


class BatchPlan:
    """The infinite sequence of batches of a run.

    Args:
        sources: The sources that have images.
        seed: Of the run.
        group_by_orientation: Whether a batch holds only landscape or only other images.
        ranks_share_group: Whether all processes of a step draw from one group, and then successive parts of one larger batch.

    Raises:
        DataError: no source has images that are drawn at all.
    """

    def __init__(
        self,
        sources: Sequence[SourceImages],
        *,
        seed: int,
        group_by_orientation: bool = True,
        ranks_share_group: bool = False,
    ) -> None:
        self._seed = seed
        self._shared = ranks_share_group
        self._groups: list[tuple[SourceImages, npt.NDArray[np.int64], FloatArray]] = []
        """The source, the rows of its images, and their cumulative weights."""
        for source in sources:
            landscape = np.flatnonzero(source.landscape_I), np.flatnonzero(~source.landscape_I)
            whole = (np.arange(len(source.weights_I)),)
            for rows in landscape if group_by_orientation else whole:
                cumulative = np.cumsum(source.weights_I[rows])
                if len(rows) and cumulative[-1] > 0:
                    self._groups.append((source, rows, cumulative))
        if not self._groups:
            raise DataError(
                "there are no images to train on",
                hint="see what is in the data set: proxydet data check",
            )
        # A group that fills its batch with n images comes up 1/n as often as its images do.
        rates = [cumulative[-1] / source.batch_size for source, _, cumulative in self._groups]
        self._cumulative_G: FloatArray = np.cumsum(rates)

    def batch(self, step: int, *, rank: int, world_size: int, start: int = 0) -> PlannedBatch:
        """Return the batch of one process in one step.

        The batches of all processes are one sequence: process r of N takes number ``start + step * N + r``. One process that
        accumulates the gradients of N batches therefore sees the same images as N processes.

        Args:
            step: Counted from 0; where gradients are accumulated, each batch is a step here.
            rank: Number of the process.
            world_size: How many processes there are.
            start: Numbers that were used before: batches of all processes, or, where these share a group, steps.
        """
        number = start + (step if self._shared else step * world_size + rank)
        drawn = self._pick(self._cumulative_G, (_GROUP_STREAM, number), 1)
        source, rows, cumulative = self._groups[drawn[0]]
        first = rank * source.batch_size if self._shared else 0
        needed = first + source.batch_size
        drawn = self._pick(cumulative, (_IMAGE_STREAM, number), needed)[first:]
        return PlannedBatch(
            source=source.name,
            rows=tuple(rows[drawn].tolist()),
            seeds=tuple(
                (self._seed, _AUGMENTATION_STREAM, number, place) for place in range(first, needed)
            ),
        )

    def _pick(
        self, cumulative: FloatArray, stream: tuple[int, int], count: int
    ) -> npt.NDArray[np.int64]:
        """Draw rows in proportion to weights, of which the cumulative sums are given."""
        uniform = np.random.default_rng([self._seed, *stream]).random(count)
        # The largest double below 1 times a total is never rounded up to the total, so that every number falls into a slice.
        picked: npt.NDArray[np.int64] = np.searchsorted(
            cumulative, uniform * cumulative[-1], side="right"
        )
        return picked
