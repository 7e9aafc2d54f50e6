"""A split of a data set, opened for evaluation: its annotations, its images, and the categories to average over.

Dimensions: C categories of the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from proxydet.data.config import Protocol
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.data.image_labels import match_tars, synset_of_wnid
from proxydet.data.images import Pixels, open_annotated_image, require_distinct_files
from proxydet.data.records import Identifier
from proxydet.data.store import AnnotationStore
from proxydet.errors import ConfigError, DataError
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.modeling.config import InferenceConfig
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.names import quote_names
from proxydet.vocabulary.vocabulary import Vocabulary

Masks = dict[str, NDArray[np.bool_]]
FOLDS = 5
"""Parts of the images, of which each is counted with what was learned from the others."""


def imagenet_groups(truth: GroundTruth) -> Masks:
    """Return LVIS's rare categories split into those that ImageNet-LVIS has images of, and the others.

    ProxyDet's published R50 has mask AP 26.98 on the first and 23.00 on the second. Empty for data without LVIS's
    synsets and frequencies, or with no class of ImageNet-LVIS among its rare ones.
    """
    if truth.frequencies is None or not all("." in key for key in truth.category_keys):
        return {}
    synsets = set(synset_of_wnid().values())
    rare_C = np.array([value == "r" for value in truth.frequencies])
    covered_C = np.array([key in synsets for key in truth.category_keys])
    if not (rare_C & covered_C).any():
        return {}  # synsets of another world than LVIS's
    return {
        "rare, in ImageNet-LVIS": rare_C & covered_C,
        "rare, not in ImageNet-LVIS": rare_C & ~covered_C,
    }


def described_groups(
    description: DatasetConfig, store: AnnotationStore, vocabulary: Vocabulary
) -> Masks:
    """Return base and novel categories, and which novel ones the description's image labels cover.

    Args:
        description: The data set.
        store: The split that is evaluated.
        vocabulary: The description's classes.

    Returns:
        Nothing where no class is novel; base and novel where some are; and where the description has a folder of tars
        that covers some novel classes and others not, these two sets.
    """
    reported = vocabulary.reported
    rows_C = store.class_rows(reported, vocabulary.names[len(reported) :])
    novel_C: NDArray[np.bool_] = ~vocabulary.base[rows_C]
    if not novel_C.any():
        return {}
    groups = {"base": ~novel_C, "novel": novel_C}
    labels = description.image_labels
    if labels is None or labels.tars is None or not labels.tars.is_dir():
        return groups
    covered = set(match_tars(labels, vocabulary, store.categories).class_of_tar.values())
    covered_C = np.array([row in covered for row in rows_C.tolist()], dtype=bool)
    if (novel_C & covered_C).any() and (novel_C & ~covered_C).any():
        groups["novel, with image labels"] = novel_C & covered_C
        groups["novel, without image labels"] = novel_C & ~covered_C
    return groups


@dataclass(frozen=True)
class DescribedSplit:
    """One of the splits of a data set. Make one with `open`.

    Attributes:
        data: The data set.
        name: ``"train"``, ``"val"`` or ``"test"``.
        store: The split's annotations.
        protocol: How to score; None leaves it to the annotations.
    """

    data: Dataset
    name: str
    store: AnnotationStore
    protocol: Protocol | None = None

    @classmethod
    def open(
        cls,
        data: Dataset | DatasetConfig | Path | str,
        name: str = "val",
        *,
        protocol: Protocol | None = None,
        progress: Progress = SILENT,
    ) -> DescribedSplit:
        """Open a split.

        Args:
            data: The data set, its config, or its TOML file; the latter two take stores from the user's cache folder. Without
                text embeddings it can be evaluated on classes that are given.
            name: ``"train"``, ``"val"`` or ``"test"``.
            protocol: How to score; None leaves it to the annotations.
            progress: Where the conversion of annotations is shown.

        Raises:
            DataError: The description or the annotations cannot be used.
            VocabularyError: The class names and embeddings do not fit each other.
        """
        if not isinstance(data, Dataset):
            config = data if isinstance(data, DatasetConfig) else DatasetConfig.from_toml(data)
            data = Dataset(config=config, progress=progress)
        store = data.store(name)
        if data.config.vocabulary is not None:
            _ = data.vocabulary
        return cls(data, name, store, protocol)

    def annotated(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of some classes that are categories of the split.

        Raises:
            DataError: None is.
        """
        categories = [category.name.strip() for category in self.store.categories]
        shared = tuple(name for name in names if name in categories)
        if not shared:
            raise DataError(
                f"{self.data.config.name}: none of the classes ({quote_names(names)}) is among its categories "
                f"({quote_names(categories)})",
                hint="name the classes as the annotations do, or calibrate on images in which they are annotated",
                path=self.data.config.split(self.name).annotations,
            )
        return shared

    def check_calibration(
        self,
        settings: InferenceConfig,
        *,
        precision: float | None = None,
        keep: float | None = None,
        scores: bool = False,
    ) -> None:
        """Refuse what `proxydet.evaluation.scorers.calibrate_vocabulary` cannot learn, before a detector is opened.

        Args:
            settings: The detector's.
            precision: As for `calibrate_vocabulary`, as are the others.
            keep: See there.
            scores: See there.

        Raises:
            ConfigError: A share is not in (0, 1), or both are given; or scores are to be calibrated with tiles or augmentation.
            DataError: There are too few images to calibrate scores.
        """
        if precision is not None and keep is not None:
            raise ConfigError("precision and keep cannot be combined", hint="leave one of them out")
        for name, share in {"precision": precision, "keep": keep}.items():
            if share is not None and not 0 < share < 1:
                raise ConfigError(
                    f"{name} is {share}; it must be above 0 and below 1", hint="0.9: nine of ten"
                )
        if scores and (settings.augmented or settings.tiles):
            raise ConfigError(
                "scores are calibrated on detections in one view of an image",
                hint="leave out --scores; or use a run without inference.flip, inference.scales and inference.tiles",
            )
        if scores and len(self.store) < 2 * FOLDS:
            raise DataError(
                f"{self.data.config.name} has {len(self.store)} images: too few to see whether calibrated scores are better",
                hint=f"calibrate scores on {2 * FOLDS} images or more",
                path=self.data.config.split(self.name).annotations,
            )

    @cached_property
    def roots(self) -> tuple[Path, ...]:
        """Folders of the images; DataError where several entries are one image file."""
        roots = self.data.config.split(self.name).roots
        require_distinct_files(self.store, roots)
        return roots

    def read(self, index: int) -> Pixels:
        """Read image ``index`` of the store: uint8 (H, W, 3), RGB.

        It is turned as its EXIF orientation says, as detectron2 does, unless only unturned it has the annotated size.

        Raises:
            DataError: It cannot be read, or has another size.
        """
        return np.array(open_annotated_image(self.store.record(index), self.roots, None))

    def read_id(self, image_id: Identifier) -> Pixels:
        """Read the image of an id; KeyError where the store has none of it."""
        return self.read(self._index[image_id])

    @cached_property
    def _index(self) -> dict[Identifier, int]:
        return {image_id: index for index, image_id in enumerate(self.store.image_ids)}

    @cached_property
    def truth(self) -> GroundTruth:
        """What to score against; DataError where the annotations cannot be."""
        return GroundTruth.from_store(
            self.store,
            name=self.data.config.name,
            path=self.data.config.split(self.name).annotations,
            protocol=self.protocol,
        )

    @cached_property
    def groups(self) -> Masks:
        """Sets of categories to average over: what is novel, and what image labels cover."""
        groups = imagenet_groups(self.truth)
        if self.data.config.vocabulary is not None:
            groups |= described_groups(self.data.config, self.store, self.data.vocabulary)
        return groups
