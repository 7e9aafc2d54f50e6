"""Exemplars as users keep them: crops in folders or annotated images, read, embedded by a detector or by CLIP, and made into classes.

Finding them loads no torch, so that mistakes are reported before a detector is opened.

Dimensions: A boxes of an image, N exemplars of a class, S steps of the detection branch, D embedding, C classes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from proxydet.data.dataset import PARTS, Dataset, DatasetConfig
from proxydet.data.images import (
    ChannelOrder,
    ImageInput,
    Pixels,
    as_pixels,
    checked_boxes,
    images_below,
    open_annotated_image,
    read_image,
)
from proxydet.data.sources import holds_annotations, open_config
from proxydet.errors import DataError, InputError, RuntimeEnvironmentError, VocabularyError
from proxydet.models import configuration_of
from proxydet.paths import cache_folder
from proxydet.reporting import SILENT, Progress
from proxydet.vocabulary.exemplars import (
    STATISTICS_NAME,
    ExemplarClasses,
    RegionStatistics,
    classes_of_exemplars,
    classes_of_images,
)
from proxydet.vocabulary.vocabulary import FloatArray, Vocabulary, check_names
from proxydet.wording import counted, first_of

if TYPE_CHECKING:
    from proxydet.detector import Detector
    from proxydet.vocabulary.encoder import ClipTextEncoder

    Embed = Callable[[list[Pixels], list[FloatArray]], list[FloatArray]]

logger = logging.getLogger(__name__)

MOST_OF_A_CLASS = 100
"""Exemplars of a class that are used; of more a random choice."""
_MOST_FOR_STATISTICS = 60
_MOST_IMAGES = 1000
_FOUND_ABOVE = 0.3
_IMAGES_AT_ONCE = 8
_BOXES_AT_ONCE = 512
_SMALLEST_SIDE = 1.0
"""Pixels of a box's shorter side below which there is nothing to see."""
_FRAME = 0.5
"""Width of the frame around a crop, in sides of the crop."""
_CONTEXT = 1.25
"""Side of the square that CLIP sees of a box, in longer sides of the box."""
_MOST_WHOLE = 200
"""Whole images that CLIP sees."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownImage:
    """An image with exemplars.

    Attributes:
        name: What to call it in messages.
        read: Decodes it.
        boxes_A4: float32, xyxy in its pixels; None: a crop, which shows one thing from edge to edge.
        classes_A: int64, rows of the names; one for a crop.
    """

    name: str
    read: Callable[[], Pixels]
    boxes_A4: FloatArray | None
    classes_A: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownClasses:
    """Exemplars, found and chosen; no image is decoded yet.

    Attributes:
        names: C class names.
        images: Images with exemplars.
        given_C: int64, exemplars of each class that there are.
    """

    names: tuple[str, ...]
    images: list[ShownImage] = field(repr=False)
    given_C: npt.NDArray[np.int64]
    _told: set[str] = field(default_factory=set, repr=False)

    def warn(self, text: str) -> None:
        """Log a warning about exemplars, once however often they are embedded: by a detector, by CLIP, for statistics."""
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)

    @classmethod
    def of_images(cls, files: Sequence[Path]) -> ShownClasses:
        """Return images that show nothing in particular."""
        none = np.zeros(0, np.int64)
        images = [
            ShownImage(name=str(f), read=partial(read_image, f), boxes_A4=None, classes_A=none)
            for f in files
        ]
        return cls(names=(), images=images, given_C=none)


def find_exemplars(
    source: Path | str,
    *,
    split: str | None = None,
    most: int = MOST_OF_A_CLASS,
    seed: int = 0,
    progress: Progress = SILENT,
) -> ShownClasses:
    """Find exemplars, and choose which are used.

    Args:
        source: A folder with one subfolder of crops for each class; or annotations: a file or folder of any format, or a
            dataset config.
        split: Which part of annotations; None: the first of train, val and test that there is.
        most: Exemplars of a class that are used.
        seed: Of the choice among more.
        progress: Where the conversion of annotations is shown.

    Raises:
        DataError: There are none, or they cannot be read.
        VocabularyError: A class is there twice.
    """
    path = Path(source)
    rng = np.random.default_rng(seed)
    if path.is_dir() and split is None and not holds_annotations(path):
        return _crops(path, most, rng)
    config = open_config(path)
    return _annotated(config, split, most, rng, progress)


def given_exemplars(
    images: Sequence[ImageInput],
    boxes: Sequence[npt.ArrayLike],
    labels: Sequence[Sequence[str]],
    channel_order: ChannelOrder = "rgb",
) -> ShownClasses:
    """Take exemplars from Python; arguments and errors as of `vocabulary_of_exemplars`."""
    if not len(images) == len(boxes) == len(labels):
        raise InputError(
            f"{len(images)} images, boxes of {len(boxes)} and labels of {len(labels)}",
            hint="give a list of boxes and a list of their class names for each image",
        )
    listed = [[label.strip() for label in own] for own in labels]
    names = check_names(dict.fromkeys(label for own in listed for label in own))
    row_of = {name: row for row, name in enumerate(names)}
    found = []
    for number, (image, given, own) in enumerate(zip(images, boxes, listed, strict=True)):
        name = str(image) if isinstance(image, str | Path) else f"image {number}"
        pixels_HW3 = as_pixels(image, channel_order)
        box_A4 = checked_boxes(given, pixels_HW3.shape[:2], name)
        if len(box_A4) != len(own):
            raise InputError(
                f"{name}: {len(box_A4)} boxes, but {len(own)} labels",
                hint="give the class name of each box",
            )
        rows = np.array([row_of[label] for label in own], dtype=np.int64)
        read = partial(as_pixels, image, channel_order)
        found.append(ShownImage(name=name, read=read, boxes_A4=box_A4, classes_A=rows))
    given_C = np.bincount(np.concatenate([i.classes_A for i in found]), minlength=len(names))
    return ShownClasses(names=names, images=found, given_C=given_C)


def _crops(folder: Path, most: int, rng: np.random.Generator) -> ShownClasses:
    by_class = {place: images_below(place) for place in sorted(folder.iterdir()) if place.is_dir()}
    by_class = {place: files for place, files in by_class.items() if not place.name.startswith(".")}
    empty = [place.name for place, files in by_class.items() if not files]
    if empty:
        raise DataError(
            f"{folder}: no images of {first_of(empty)}",
            hint="put crops of each class into its folder, or remove the folder",
            path=folder,
        )
    if not by_class:
        loose = images_below(folder)
        raise DataError(
            f"{folder} holds {counted(len(loose), 'image')} and no subfolder of a class"
            if loose
            else f"{folder} holds neither annotations nor subfolders with crops",
            hint="make a subfolder for each class, with its name: exemplars/red mug/1.jpg; or give an annotation file",
            path=folder,
        )
    names = check_names(place.name for place in by_class)
    images = [
        ShownImage(
            name=str(file.relative_to(folder)),
            read=partial(read_image, file),
            boxes_A4=None,
            classes_A=np.array([row]),
        )
        for row, files in enumerate(by_class.values())
        for file in (files[i] for i in _chosen(len(files), most, rng))
    ]
    given_C = np.array([len(files) for files in by_class.values()])
    return ShownClasses(names=names, images=images, given_C=given_C)


def _annotated(
    config: DatasetConfig,
    split: str | None,
    most: int,
    rng: np.random.Generator,
    progress: Progress,
) -> ShownClasses:
    part = split or next((p for p in PARTS if getattr(config, p) is not None), "train")
    store = Dataset(config=config, progress=progress).store(part)
    roots = config.split(part).roots

    def pixels(row: int) -> Pixels:
        return np.array(open_annotated_image(store.record(row), roots, None))

    names = check_names(category.name for category in store.categories)
    box_A4, class_A = store.column("box"), store.column("category")
    sides_A2 = box_A4[:, 2:] - box_A4[:, :2]
    single_A = ~(store.column("crowd") | store.column("ignore"))
    usable_A = (sides_A2 >= _SMALLEST_SIDE).all(axis=1) & single_A
    given_C = np.bincount(class_A[usable_A], minlength=len(names))
    if not given_C.any():
        raise DataError(
            f"{store.source_name}: none of its {counted(len(class_A), 'box', 'boxes')} shows a single thing of at least a pixel",
            hint="annotate one thing a box, inside the image",
            path=Path(store.source_name),
        )
    rows_of = [np.flatnonzero(usable_A & (class_A == row)) for row in range(len(names))]
    chosen = np.sort(np.concatenate([rows[_chosen(len(rows), most, rng)] for rows in rows_of]))
    image_A = store.column("image")
    starts = np.flatnonzero(np.diff(image_A[chosen], prepend=-1))
    images = []
    for rows in np.split(chosen, starts[1:]):
        record = store.record(int(image_A[rows[0]]))
        images.append(
            ShownImage(
                name=record.file_name,
                read=partial(pixels, record.index),
                boxes_A4=box_A4[rows],
                classes_A=class_A[rows].astype(np.int64),
            )
        )
    return ShownClasses(names=names, images=images, given_C=given_C)


def _chosen(count: int, most: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    chosen: npt.NDArray[np.int64] = np.sort(rng.permutation(count)[:most])
    return chosen


# --- Embedding -------------------------------------------------------------------------------------------------------


def framed(pixels_HW3: Pixels) -> tuple[Pixels, FloatArray]:
    """Put a crop into a larger image, as things are seen in images: with something around them.

    Returns:
        The image, and the box (1, 4) of the crop in it.
    """
    height, width = pixels_HW3.shape[:2]
    top, left = max(round(_FRAME * height), 1), max(round(_FRAME * width), 1)
    edge = np.concatenate(
        [pixels_HW3[[0, -1]].reshape(-1, 3), pixels_HW3[:, [0, -1]].reshape(-1, 3)]
    )
    image = np.empty((height + 2 * top, width + 2 * left, 3), np.uint8)
    image[:] = edge.mean(axis=0).round().astype(np.uint8)
    image[top : top + height, left : left + width] = pixels_HW3
    return image, np.array([[left, top, left + width, top + height]], np.float32)


def in_detector(detector: Detector) -> Embed:
    """Return what embeds boxes by what a detector sees in them: the mean over its steps."""
    return lambda images, boxes: [own.mean(axis=1) for own in detector.embed_boxes(images, boxes)]


def in_clip(encoder: ClipTextEncoder) -> Embed:
    """Return what embeds boxes by CLIP's image tower: squares around them, in their images."""

    def square(pixels_HW3: Pixels, box_4: FloatArray) -> Pixels:
        side = _CONTEXT * float((box_4[2:] - box_4[:2]).max())
        centre, limit = (box_4[:2] + box_4[2:]) / 2, np.array(pixels_HW3.shape[1::-1])
        # Moved into the image where it fits there, else cut off.
        low = np.clip(centre - side / 2, 0, np.maximum(limit - side, 0))
        left, top = np.floor(low).astype(int)
        right, bottom = np.ceil(np.minimum(low + side, limit)).astype(int)
        return pixels_HW3[top:bottom, left:right]

    def embed(images: list[Pixels], boxes: list[FloatArray]) -> list[FloatArray]:
        crops = [
            square(image, box) for image, own in zip(images, boxes, strict=True) for box in own
        ]
        ends = np.cumsum([len(own) for own in boxes])
        return np.split(encoder.encode_images(crops), ends[:-1])

    return embed


def embed_shown(
    embed: Embed, shown: ShownClasses, *, progress: Progress = SILENT
) -> Iterator[tuple[ShownImage, npt.NDArray[np.int64], FloatArray]]:
    """Embed exemplars, a few images at a time.

    Args:
        embed: `in_detector` or `in_clip`.
        shown: The exemplars.
        progress: Where progress is shown.

    Yields:
        An image, which of its exemplars show anything (regions of one colour are left out, and counted in a warning), and
        their embeddings (A, D).

    Raises:
        DataError: An image cannot be read.
    """
    plain: list[str] = []
    with progress.task("embedding exemplars", total=len(shown.images), unit="images") as task:
        for start in range(0, len(shown.images), _IMAGES_AT_ONCE):
            some = shown.images[start : start + _IMAGES_AT_ONCE]
            images, boxes, kept = [], [], []
            for image in some:
                pixels_HW3 = image.read()
                box_A4 = image.boxes_A4
                if box_A4 is None:
                    lively = [bool(np.ptp(pixels_HW3, axis=(0, 1)).any())]
                    pixels_HW3, box_A4 = framed(pixels_HW3)
                else:
                    lively = [_is_lively(pixels_HW3, box) for box in box_A4]
                plain += [image.name for alive in lively if not alive]
                kept.append(np.flatnonzero(lively))
                images.append(pixels_HW3)
                boxes.append(box_A4[kept[-1]])
            if sum(map(len, boxes)) <= _BOXES_AT_ONCE:
                found = embed(images, boxes)
            else:  # crowded images alone, in pieces
                found = [
                    np.concatenate(
                        [
                            embed([pixels_HW3], [own[first : first + _BOXES_AT_ONCE]])[0]
                            for first in range(0, max(len(own), 1), _BOXES_AT_ONCE)
                        ]
                    )
                    for pixels_HW3, own in zip(images, boxes, strict=True)
                ]
            for image, own_K, own_AD in zip(some, kept, found, strict=True):
                yield image, own_K, own_AD
                task.advance()
    if plain:
        shown.warn(f"{counted(len(plain), 'exemplar')} of one colour left out: {first_of(plain)}")


def _is_lively(pixels_HW3: Pixels, box_4: FloatArray) -> bool:
    left, top, right, bottom = np.concatenate([np.floor(box_4[:2]), np.ceil(box_4[2:])]).astype(int)
    return bool(np.ptp(pixels_HW3[top:bottom, left:right].reshape(-1, 3), axis=0).any())


# --- What the detector's regions look like -----------------------------------------------------------------------------


def find_statistics_images(source: Path | str, *, progress: Progress = SILENT) -> ShownClasses:
    """Find the images that `region_statistics` are computed from, at most 1,000, chosen at random.

    Args:
        source: Annotations, or a folder of any images.
        progress: Where the conversion of annotations is shown.

    Raises:
        DataError: There are none, or they cannot be read.
    """
    path = Path(source)
    if path.is_dir() and not holds_annotations(path):
        shown = ShownClasses.of_images(images_below(path))
        if not shown.images:
            raise DataError(
                f"{path} holds no images", hint="name a folder of images, or annotations", path=path
            )
    else:
        shown = find_exemplars(path, most=_MOST_FOR_STATISTICS, progress=progress)
    some = np.sort(np.random.default_rng(0).permutation(len(shown.images))[:_MOST_IMAGES])
    return replace(shown, images=[shown.images[index] for index in some])


def region_statistics(
    detector: Detector,
    images: ShownClasses | Path | str | None = None,
    *,
    otherwise: ShownClasses | None = None,
    seconds: float = math.inf,
    progress: Progress = SILENT,
) -> RegionStatistics:
    """Return the statistics of a detector's regions: those that are stored, or computed and stored.

    They are stored in the run's folder, or in the cache for a detector of no run, with a digest of the weights.

    Args:
        detector: The detector.
        images: What to compute them from: annotations with names of the training's base classes; or any images, in which the
            detector finds these classes itself; or what `find_statistics_images` found there. None: stored ones, or the training
            images of the run.
        otherwise: Images to see the spread of regions in where there are none of these; how regions and texts belong together is
            then assumed, and nothing is stored.
        seconds: After so much time the images are enough, and nothing is stored.
        progress: Where progress is shown.

    Raises:
        VocabularyError: There is nothing to compute them from, or too little is found in it.
        DataError: Images or annotations cannot be read.
    """
    from proxydet.modeling.weights import weights_digest

    weights = weights_digest(detector.network)
    temperature = detector.network.config.classifier.temperature
    home = detector.folder or cache_folder("statistics") / weights[:32]
    place, until = home / STATISTICS_NAME, time.monotonic() + seconds
    if images is None:
        if place.exists():
            try:
                if (kept := RegionStatistics.load(place)).weights == weights:
                    return kept
            except VocabularyError as error:
                logger.warning("%s; made again", error.message)
        images = _training_data(detector)
    if images is None:
        if otherwise is None:
            raise VocabularyError(
                "there are no region statistics of this detector, and no training images to compute them from",
                hint="compute them once from any images: proxydet vocab build --exemplars ... --statistics IMAGES",
            )
        logger.warning(
            "there are no region statistics of this detector: classes of exemplars are worse for it; --statistics IMAGES of "
            "proxydet vocab build makes them, once"
        )
        regions, _ = _found_regions(detector, otherwise, progress, above=0.0, until=until)
        seen = embed_shown(in_detector(detector), otherwise, progress=progress)
        regions += [own_KD for _, _, own_KD in seen]
        return RegionStatistics.assumed(
            np.concatenate(regions), detector.vocabulary, weights=weights, temperature=temperature
        )
    shown = (
        images
        if isinstance(images, ShownClasses)
        else find_statistics_images(images, progress=progress)
    )
    # Of base classes only: regions of novel ones are not where the training wants them.
    trained = {n: r for r, n in enumerate(detector.vocabulary.names) if detector.vocabulary.base[r]}
    row_C = np.array([trained.get(name, -1) for name in shown.names], dtype=np.int64)
    if np.count_nonzero(row_C >= 0) > 1:
        regions, rows = [], []
        seen = embed_shown(in_detector(detector), shown, progress=progress)
        for image, kept_K, own_KD in seen:
            row_K = row_C[image.classes_A[kept_K]]
            regions.append(own_KD[row_K >= 0])
            rows.append(row_K[row_K >= 0])
            if time.monotonic() > until:
                break
    else:
        regions, rows = _found_regions(detector, shown, progress, above=_FOUND_ABOVE, until=until)
    made = RegionStatistics.from_regions(
        np.concatenate(regions),
        np.concatenate(rows),
        detector.vocabulary,
        weights=weights,
        temperature=temperature,
    )
    if time.monotonic() <= until:
        try:
            made.save(place)
        except RuntimeEnvironmentError as error:
            logger.warning("the region statistics are not stored: %s", error.message)
    return made


def _found_regions(
    detector: Detector, shown: ShownClasses, progress: Progress, *, above: float, until: float
) -> tuple[list[FloatArray], list[npt.NDArray[np.int64]]]:
    """Detect the training classes in images, and embed what is found."""
    from proxydet.modeling.postprocess import to_host

    vocabulary = detector.vocabulary
    settings = detector.settings(
        score_threshold=above,
        agnostic_nms=above > 0,
        masks=False if detector.inference.masks else None,
    )
    dimension = vocabulary.dimension
    regions, rows = [np.zeros((0, dimension), np.float32)], [np.zeros(0, np.int64)]
    with progress.task("embedding regions", total=len(shown.images), unit="images") as task:
        for image in shown.images:
            if time.monotonic() > until:
                break
            pixels_HW3 = image.read()
            (found,) = to_host(detector.predict_images([pixels_HW3], None, settings))
            box_N4, row_N = found.boxes_N4.numpy(), found.classes_N.numpy()
            large_N = (box_N4[:, 2:] - box_N4[:, :2] >= _SMALLEST_SIDE).all(axis=1)
            usable_N = (vocabulary.base[row_N] | (above == 0)) & large_N
            if usable_N.any():
                (own_NSD,) = detector.embed_boxes([pixels_HW3], [box_N4[usable_N]])
                regions.append(own_NSD.mean(axis=1))
                rows.append(row_N[usable_N])
            task.advance()
    return regions, rows


def _training_data(detector: Detector) -> Path | None:
    """Return the dataset config of a run's training where it is there."""
    if detector.folder is None:
        return None
    data = configuration_of(detector.folder).get("data")
    description = data.get("description") if isinstance(data, Mapping) else None
    path = Path(description) if isinstance(description, str) else None
    return path if path is not None and path.is_file() else None


# --- Classes ---------------------------------------------------------------------------------------------------------


TextOf = Callable[[Sequence[str]], Vocabulary]
"""Embeds names, to make each class of its exemplars and of its name."""


class _Exemplars:
    """Embeddings of exemplars by class; those without any usable one are left out, with a warning.

    Attributes:
        names: C class names.
        embeddings: Those of each class (N, D).

    Raises:
        VocabularyError: No class has a usable exemplar.
        DataError: An image cannot be read.
    """

    def __init__(self, embed: Embed, shown: ShownClasses, progress: Progress) -> None:
        rows: list[list[FloatArray]] = [[] for _ in shown.names]
        places: list[list[str]] = [[] for _ in shown.names]
        for image, kept_K, own_KD in embed_shown(embed, shown, progress=progress):
            for number, row_D in zip(kept_K.tolist(), own_KD, strict=True):
                row = int(image.classes_A[number])
                rows[row].append(row_D)
                box = (
                    ""
                    if image.boxes_A4 is None
                    else f" {image.boxes_A4[number].round().astype(int).tolist()}"
                )
                places[row].append(f"{image.name}{box}")
        present = [row for row, own in enumerate(rows) if own]
        if not present:
            raise VocabularyError(
                "no exemplar can be used: all show one colour",
                hint="give regions that show the things",
            )
        if absent := [name for row, name in enumerate(shown.names) if not rows[row]]:
            shown.warn(f"no exemplars of {first_of(absent)}: left out")
        self.names = [shown.names[row] for row in present]
        self.embeddings = [np.stack(rows[row]) for row in present]
        self._places, self._shown = [places[row] for row in present], shown

    def report_outliers(self, made: ExemplarClasses) -> ExemplarClasses:
        """Log which exemplars were left out; return the classes."""
        for name, places, outlier_N in zip(self.names, self._places, made.outliers, strict=True):
            listed = [place for place, out in zip(places, outlier_N, strict=True) if out]
            if listed:
                count = counted(len(listed), "exemplar")
                self._shown.warn(
                    f"{name!r}: {count} unlike the others left out: {first_of(listed)}"
                )
        return made


def build_from_exemplars(
    detector: Detector,
    shown: ShownClasses,
    statistics: RegionStatistics,
    *,
    text_of: TextOf | None = None,
    images: Vocabulary | None = None,
    progress: Progress = SILENT,
) -> ExemplarClasses:
    """Make classes of what a detector sees in exemplars; those without any usable one are left out, with a warning.

    Args:
        detector: What will look for them.
        shown: The exemplars.
        statistics: Of this detector.
        text_of: Makes each class of its exemplars and of its name; None: of its exemplars alone.
        images: What `build_in_clip` made of them: each class is the mean of both.
        progress: Where progress is shown.

    Raises:
        VocabularyError: No class has a usable exemplar, or the names cannot be embedded.
        DataError: An image cannot be read.
    """
    found = _Exemplars(in_detector(detector), shown, progress)
    text = None if text_of is None else text_of(found.names)
    made = classes_of_exemplars(found.names, found.embeddings, statistics, text, images=images)
    return found.report_outliers(made)


def build_in_clip(
    encoder: ClipTextEncoder,
    shown: ShownClasses,
    reference: Vocabulary,
    *,
    others: ShownClasses | None = None,
    text_of: TextOf | None = None,
    progress: Progress = SILENT,
) -> ExemplarClasses:
    """Make classes of what CLIP's image tower sees in exemplars, for every detector that was trained with its texts.

    Args:
        encoder: CLIP.
        shown: The exemplars. Of boxes in images, the whole images show what the classes are distinguished from.
        reference: Names of any things, embedded by the same CLIP.
        others: Further images, to distinguish the classes from.
        text_of: As of `build_from_exemplars`.
        progress: Where progress is shown.

    Raises:
        VocabularyError: As of `build_from_exemplars`; or there is nothing to distinguish the only class from.
        CheckpointError: The weights have no image tower.
        DataError: An image cannot be read.
    """
    found = _Exemplars(in_clip(encoder), shown, progress)
    whole = [image for image in shown.images if image.boxes_A4 is not None]
    whole += [] if others is None else others.images
    some = np.random.default_rng(0).permutation(len(whole))[:_MOST_WHOLE]
    seen = [np.zeros((0, encoder.dim), np.float32)]
    with progress.task("embedding whole images", total=len(some), unit="images") as task:
        for index in some:
            seen.append(encoder.encode_images([whole[index].read()]))
            task.advance()
    text = None if text_of is None else text_of(found.names)
    made = classes_of_images(found.names, found.embeddings, np.concatenate(seen), reference, text)
    return found.report_outliers(made)


def vocabulary_of_exemplars(
    detector: Detector,
    images: Sequence[ImageInput],
    boxes: Sequence[npt.ArrayLike],
    labels: Sequence[Sequence[str]],
    *,
    fuse: bool = False,
    channel_order: ChannelOrder = "rgb",
) -> Vocabulary:
    """Make the vocabulary that finds more of what some boxes show.

    Args:
        detector: What will look for them.
        images: Files, Pillow images, or uint8 (H, W, 3).
        boxes: The boxes (N, 4) of each image, xyxy in its pixels.
        labels: The class name of each box.
        fuse: Whether each class is made of its exemplars and of its name.
        channel_order: Of arrays: ``"rgb"`` or ``"bgr"``.

    Raises:
        InputError: An image or a box cannot be used.
    """
    shown = given_exemplars(images, boxes, labels, channel_order)
    statistics = region_statistics(detector, otherwise=shown)
    text_of = detector.vocabulary_of if fuse else None
    return build_from_exemplars(detector, shown, statistics, text_of=text_of).vocabulary
