"""What training and evaluation read, how images are scaled, and how batches are put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from proxydet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of training images."""

    batch_size: int
    """Images of one batch, on one process."""

    size: int
    """Largest side of an image after augmentation, in pixels."""

    scale: tuple[float, float]
    """Range of the scale jitter: the image is resized to fit a square of ``size`` times a factor drawn from it."""

    ratio: float
    """Share of images drawn from this source, relative to the other one."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        _require(self.size >= 1, f"size must be at least 1 pixel, not {self.size}")
        low, high = self.scale
        _require(0 < low <= high, f"scale must be a range of positive factors, not {self.scale}")
        _require(
            self.ratio > 0,
            f"ratio must be positive, not {self.ratio}; to leave image labels out, set them to null",
        )


def mean_batch(*sources: SourceConfig | None) -> Fraction:
    """Return the images of a batch, on average over some sources: they are drawn by image, each as often as its ratio says."""
    drawn = [(Fraction(s.ratio), s.batch_size) for s in sources if s is not None]
    return sum(ratio for ratio, _ in drawn) / Fraction(sum(ratio / size for ratio, size in drawn))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data of a run. Defaults are those of the published R50 recipe, for one of its 8 processes."""

    description: Path | None = None
    """The dataset config (TOML) that names annotations, images and classes."""

    boxes: SourceConfig = field(
        default_factory=lambda: SourceConfig(batch_size=8, size=640, scale=(0.1, 2.0), ratio=1.0)
    )
    """Images with annotated objects."""

    image_labels: SourceConfig | None = field(
        default_factory=lambda: SourceConfig(batch_size=32, size=320, scale=(0.5, 1.5), ratio=4.0)
    )
    """Images of which only the class is known; null trains without them."""

    repeat_threshold: float = 0.001
    """Images are repeated for the sake of classes that occur in less than this share of the annotated images; 0 repeats
    none. Image-label sources are never repeated."""

    count_novel_classes: bool = True
    """Whether the weights of the federated loss count the training images of novel classes too. On is published: training
    then learns how frequent the classes are that it is not supposed to know. Off counts 0 for them."""

    flip_probability: float = 0.5
    """Probability of mirroring a training image left to right."""

    keep_empty_images: bool = True
    """Whether to train on images that are left without objects (all of novel classes, or none at all)."""

    masks: Literal["auto"] | bool = "auto"
    """Whether masks are trained, on the objects that have one; boxes and classes are trained on all objects. auto: where
    an object to train on has a mask; where none has, and for false, the detector has no mask head and finds boxes only."""

    group_by_orientation: bool = True
    """Whether a batch holds only landscape or only portrait images, which wastes less on padding."""

    ranks_share_group: bool = False
    """Whether all processes of a step get batches of one source and orientation. Off is published: each draws its own.
    On, a step of N processes holds exactly the images that one process with N times the batch size would get."""

    exif_orientation: bool = True
    """Whether images are turned as their EXIF orientation says; off for annotations that were made on unturned ones."""

    unreadable_images: Literal["error", "skip"] = "error"
    """What an unreadable training image does: stop the run, or leave its place in the batch empty and be counted."""

    workers: int = 2
    """Processes that read and augment images, per training process; 0 reads in the training process itself."""

    prefetch: int = 2
    """Batches that each worker keeps ready."""

    worker_timeout_s: float = 600.0
    """Seconds without a batch after which the run stops because its workers are stuck; 0 waits for ever."""

    test_shortest_side: int = 800
    """Shortest side of an image in evaluation, in pixels."""

    test_longest_side: int = 1333
    """Largest longest side of an image in evaluation, in pixels."""

    cache: Path | None = None
    """Folder of annotation stores and tar indexes; null is the user's cache folder."""

    def __post_init__(self) -> None:
        _require(self.repeat_threshold >= 0, "repeat_threshold must not be negative")
        _require(0 <= self.flip_probability <= 1, "flip_probability must be in [0, 1]")
        _require(self.workers >= 0, "workers must not be negative")
        _require(self.prefetch >= 1, "prefetch must be at least 1")
        _require(self.worker_timeout_s >= 0, "worker_timeout_s must not be negative")
        _require(
            1 <= self.test_shortest_side <= self.test_longest_side,
            "test_shortest_side must be at least 1 and at most test_longest_side",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
