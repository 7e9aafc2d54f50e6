"""What training and evaluation read, how images are scaled, how batches are put together, and by which protocol is scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from proxydet.errors import ConfigError, DataError
from proxydet.wording import first_of

if TYPE_CHECKING:
    from proxydet.data.store import AnnotationStore


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


Protocol: TypeAlias = Literal["lvis", "coco", "openimages"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
PROTOCOL_NAMES = {
    "lvis": "LVIS (federated annotations)",
    "coco": "COCO (exhaustive annotations)",
    "openimages": "OpenImages (verified image labels)",
}
FREQUENCIES = ("r", "c", "f")


def protocol_of(store: AnnotationStore) -> Protocol:
    """Return the protocol that a data set's annotations ask for.

    OpenImages: every image has ``pos_category_ids``, and the categories have no LVIS frequencies. LVIS: every image has
    ``neg_category_ids`` and every category a ``frequency``. COCO: neither an image nor a category has any of these,
    or the categories alone have a frequency.

    Raises:
        DataError: the annotations are almost of a federated protocol; the message names what is missing.
    """
    images = len(store)
    negative, positive = (store.label_lists[f"{kind}_category_ids"] for kind in ("neg", "pos"))
    lacking = [c.name for c in store.categories if c.frequency not in FREQUENCIES]
    short = ""
    if positive and len(lacking) < len(store.categories) and negative < images:
        short = "neg"
    elif images and positive == images and lacking and len(lacking) == len(store.categories):
        return "openimages"
    elif negative == 0 and positive == 0:
        return "coco"
    elif negative < images:
        short = "pos" if 0 < positive < images else "neg"
    if short:
        ids = store.without_list(f"{short}_category_ids")
        raise DataError(
            f"{store.source_name}: {len(ids)} of {images} images lack {short}_category_ids while others have it "
            f"(image ids {first_of(ids)})",
            hint="give every image the list (empty where nothing is verified), or choose how to score with --protocol "
            f"{'lvis' if short == 'neg' else 'openimages'} or --protocol coco",
        )
    if lacking:
        raise DataError(
            f"{store.source_name}: every image has neg_category_ids (LVIS's federated annotations), but "
            f"{len(lacking)} of {len(store.categories)} categories have no frequency r, c or f ({first_of(lacking)})",
            hint="add 'frequency' (or 'image_count') to them, or choose how to score with --protocol coco, "
            f"{'--protocol openimages ' if positive == images else ''}or --protocol lvis (evaluation.protocol in a "
            "configuration)",
        )
    return "lvis"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
