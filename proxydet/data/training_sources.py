"""All that training batches are made of, and the plan of how they are put together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from proxydet.data.config import DataConfig, SourceConfig
from proxydet.data.samplers import (
    BatchPlan,
    FloatArray,
    SourceImages,
    SourceName,
    image_weights,
    repeat_factors,
)
from proxydet.data.sources import BoxSource, LabelSource
from proxydet.errors import DataError

_SAMPLE = 16


@dataclass(frozen=True, kw_only=True)
class TrainingSources:
    """All that batches are made of. It can be pickled and does not change."""

    boxes: BoxSource
    """Images with annotated objects."""

    labels: LabelSource | None
    """Images of which only the class is known."""

    def digests(self) -> dict[str, str]:
        """Return digests by which changed images are noticed, in much less time than reading all of them takes.

        Of each source, ``images`` and ``image labels``: 16 files spread over it, and the sizes of all images.
        """
        found = {"images": _sample_digest(self.boxes.encoded, self.boxes.rows_I)}
        if self.labels is not None:
            images = self.labels.images
            files = _sample_digest(images.encoded, np.arange(len(images)))
            sizes = np.ascontiguousarray(images.shapes_I2)
            found["image labels"] = hashlib.sha256(sizes.tobytes() + files.encode()).hexdigest()
        return found

    def plan(self, config: DataConfig, *, seed: int) -> BatchPlan:
        """Return the sequence of batches of a run.

        Raises:
            DataError: there is no image, or no annotated object, to train on.
        """
        described: list[tuple[FloatArray, npt.NDArray[np.int32], SourceName, SourceConfig]] = [
            (self._box_factors(config), self.boxes.store.sizes_I2, "boxes", config.boxes)
        ]
        if self.labels is not None and config.image_labels is not None:
            images = self.labels.images
            factors = np.ones(len(images))
            described.append((factors, images.shapes_I2, "image_labels", config.image_labels))
        for factors, _, name, _ in described:
            if not factors.any():
                raise DataError(
                    f"the data set has no images to train on in its part {name!r}",
                    hint="look at it with: proxydet data check",
                )
        if not self.boxes.usable.any():
            # Training would end well and have learnt that nothing is ever there.
            store = self.boxes.store
            raise DataError(
                f"{store.source_name} has no object to train on among its {store.report.annotations_kept} annotations: "
                "crowds and novel classes are left out",
                hint="look at it with: proxydet data stats",
            )
        weights = image_weights([d[0] for d in described], [d[3].ratio for d in described])
        sources = [
            SourceImages(
                name=name,
                weights_I=weight,
                landscape_I=size_I2[:, 1] > size_I2[:, 0],
                batch_size=source.batch_size,
            )
            for weight, (_, size_I2, name, source) in zip(weights, described, strict=True)
        ]
        return BatchPlan(
            sources,
            seed=seed,
            group_by_orientation=config.group_by_orientation,
            ranks_share_group=config.ranks_share_group,
        )

    def _box_factors(self, config: DataConfig) -> FloatArray:
        """Repeat factors of the annotated images; 0 for those that are not trained on."""
        boxes = self.boxes
        rows = boxes.rows_I
        whole: FloatArray = np.zeros(len(boxes.store))
        whole[rows] = repeat_factors(
            np.searchsorted(rows, boxes.store.column("image")[boxes.usable]),
            boxes.store.column("category")[boxes.usable],
            image_count=len(rows),
            threshold=config.repeat_threshold,
        )
        return whole


def _sample_digest(encoded: Callable[[int], Path | bytes], rows: npt.NDArray[np.int64]) -> str:
    """Return a digest of the files of some rows; one that cannot be read counts as absent."""
    digest = hashlib.sha256()
    for row in (
        np.unique(np.linspace(0, len(rows) - 1, _SAMPLE).astype(np.int64)) if len(rows) else ()
    ):
        try:
            source = encoded(int(rows[row]))
            content = source if isinstance(source, bytes) else source.read_bytes()
        except (DataError, OSError):
            content = b"absent"
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
