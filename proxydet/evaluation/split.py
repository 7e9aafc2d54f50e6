"""A split of a described data set, opened for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from proxydet.data.dataset import DatasetConfig, load_vocabulary, open_split
from proxydet.data.protocol import Protocol
from proxydet.data.store import AnnotationStore
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.evaluation.groups import Masks, described_groups, imagenet_groups
from proxydet.evaluation.images import AnnotatedImages
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True)
class DescribedSplit:
    """One of the splits of a data set. Make one with `open`.

    Attributes:
        description: The data set.
        name: ``"train"`` or ``"val"``.
        store: The split's annotations.
        vocabulary: The data set's classes.
        protocol: How to score; None leaves it to the annotations.
    """

    description: DatasetConfig
    name: str
    store: AnnotationStore
    vocabulary: Vocabulary
    protocol: Protocol | None = None

    @classmethod
    def open(
        cls,
        description: DatasetConfig | Path | str,
        name: str = "val",
        *,
        protocol: Protocol | None = None,
        progress: Progress = SILENT,
    ) -> DescribedSplit:
        """Open a split.

        Args:
            description: The data set, or its TOML file.
            name: ``"train"`` or ``"val"``.
            protocol: How to score; None leaves it to the annotations.
            progress: Where the conversion of annotations is shown.

        Raises:
            DataError: The description or the annotations cannot be used.
            VocabularyError: The class names and embeddings do not fit each other.
        """
        if not isinstance(description, DatasetConfig):
            description = DatasetConfig.from_toml(description)
        store = open_split(description, name, progress=progress)
        return cls(
            description, name, store, load_vocabulary(description, progress=progress), protocol
        )

    @property
    def images(self) -> AnnotatedImages:
        """The split's images."""
        return AnnotatedImages(self.store, self.description.split(self.name).roots)

    @cached_property
    def truth(self) -> GroundTruth:
        """What to score against; DataError where the annotations cannot be."""
        return GroundTruth.from_store(
            self.store,
            name=self.description.name,
            path=self.description.split(self.name).annotations,
            protocol=self.protocol,
        )

    @cached_property
    def groups(self) -> Masks:
        """Sets of categories to average over: what is novel, and what image labels cover."""
        described = described_groups(self.description, self.store, self.vocabulary)
        return {**imagenet_groups(self.truth), **described}
