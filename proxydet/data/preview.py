"""Previews of a dataset with what is annotated on them: as annotated, or as training sees them.

Dimensions: A annotations of an image.
"""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from proxydet.data.config import DataConfig
from proxydet.data.dataset import ClassTable, Dataset
from proxydet.data.images import open_annotated_image
from proxydet.data.masks import decode, rasterize
from proxydet.data.stats import DatasetStats, dataset_stats
from proxydet.errors import ConfigError, DataError, VocabularyError
from proxydet.visualization.drawing import DrawnObject, contact_sheet, draw_objects
from proxydet.visualization.plots import long_tail_plot, svg_of
from proxydet.visualization.report import (
    CaptionedImage,
    Command,
    Report,
    Section,
    Table,
    write_report,
)
from proxydet.wording import counted, nearest

if TYPE_CHECKING:
    from proxydet.data.store import AnnotationStore, ImageRecord

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class PreviewRequest:
    """Which images to draw."""

    split: Literal["train", "val", "test"] = "train"
    """Which part."""
    count: int = 12
    """How many images."""
    seed: int = 0
    """Which ones: equal seeds draw equal images."""
    class_name: str | None = None
    """Draw only images on which this class is annotated."""
    augmented: bool = False
    """Draw what training sees (scaled, cropped, mirrored; no novel classes, no crowds) instead of what is annotated."""

    def __post_init__(self) -> None:
        """What training sees is drawn by its own plan, of its own part."""
        if self.augmented and (self.split != "train" or self.class_name is not None):
            raise ConfigError(
                "what training sees (--augmented) cannot be chosen by split or class",
                hint="leave --augmented out, or --split and --class",
            )


def preview_images(data: Dataset, request: PreviewRequest) -> list[CaptionedImage]:
    """Draw images of a data set with their annotations.

    Args:
        data: The data set.
        request: Which images.

    Raises:
        DataError: an image or annotation file cannot be used, or no image has the class.
    """
    if request.augmented:
        return _augmented(data, request)
    vocabulary, store = data.classes, data.store(request.split)
    candidates = np.arange(len(store))
    name = None if request.class_name is None else request.class_name.strip()
    if name is not None:
        if name not in vocabulary.names:
            raise VocabularyError(
                f"{name!r} is not a class of this data set.{nearest(name, vocabulary.names)}",
                hint="proxydet data stats --classes lists them",
            )
        wanted = vocabulary.names.index(name)
        shown = store.class_rows(vocabulary.names)[store.column("category")] == wanted
        candidates = np.unique(store.column("image")[shown])
    if not len(candidates):
        of_class = "" if name is None else f" with {name!r} on it"
        raise DataError(
            f"there is no image{of_class} in {request.split} of this data set",
            hint="proxydet data stats --classes counts the images of each class in each part",
        )
    rows = np.random.default_rng(request.seed).permutation(candidates)[: request.count]
    images = []
    # As training and evaluation do: the latter takes the orientation that fits.
    roots, exact = data.config.split(request.split).roots, request.split == "train" or None
    with data.progress.task("drawing", total=len(rows), unit="images") as task:
        for row in rows:
            record = store.record(int(row))
            image = open_annotated_image(record, roots, exact)
            objects = annotated_objects(store, record, vocabulary)
            drawn = draw_objects(image, objects)
            caption = f"{record.file_name}: {counted(len(objects), 'annotation')}"
            images.append(CaptionedImage(image=drawn, caption=caption))
            task.advance()
    return images


def write_preview(
    data: Dataset, path: Path, request: PreviewRequest, *, named: Path | None = None
) -> Path:
    """Write a preview: one sheet of images, or an HTML page with counts, plots and images.

    Args:
        data: The data set.
        path: ``.html``, ``.png``, ``.jpg`` or ``.webp``.
        request: Which images.
        named: The dataset config's file, for the commands that the page shows.

    Raises:
        DataError: a file cannot be used, or the image format is unknown.
    """
    html = path.suffix.lower() in (".html", ".htm")
    if not html and path.suffix.lower() not in _PICTURES:
        raise DataError(
            f"cannot write an image of the format {path.suffix!r}", hint="use .html, .png or .jpg"
        )
    images = preview_images(data, request)
    if not html:
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet([drawn.image for drawn in images]).save(path)
        return path
    stats = dataset_stats(data)
    trainable = data.config.vocabulary is not None
    named = named or Path("DATASET.toml")
    return write_report(_page(stats, images, request, named, trainable=trainable), path)


def annotated_objects(
    store: AnnotationStore, record: ImageRecord, vocabulary: ClassTable
) -> list[DrawnObject]:
    """Return the annotations of an image as objects to draw; labels say what is novel and what is a crowd."""
    rows_K = store.class_rows(vocabulary.names)
    size = (record.height, record.width)
    objects = []
    for place in range(len(record)):
        annotation = record.first_annotation + place
        row = int(rows_K[record.categories_A[place]])
        marks = [] if vocabulary.base[row] else ["novel"]
        marks += ["crowd"] if record.crowd_A[place] else []
        mask = None
        if store.masked_A[annotation]:
            counts = store.rle(annotation) or rasterize(store.polygons(annotation), size)
            mask = partial(decode, counts, size)  # drawn one after the other
        objects.append(
            DrawnObject(
                label=vocabulary.names[row] + (f" ({', '.join(marks)})" if marks else ""),
                box_xyxy=tuple(record.boxes_A4[place].tolist()),
                mask_HW=mask,
            )
        )
    return objects


def _augmented(data: Dataset, request: PreviewRequest) -> list[CaptionedImage]:
    from proxydet.data.loader import TrainingLoader, TrainingSources

    names = data.vocabulary.names
    sources = TrainingSources(DataConfig(workers=0), data)
    loader = TrainingLoader(sources, rank=0, world_size=1, seed=request.seed)
    images: list[CaptionedImage] = []
    for iteration in itertools.count():
        batch = loader.batch(iteration)
        # Two of a batch, so that a sheet shows several batches of either kind.
        for place in range(min(2, len(batch))):
            image = Image.fromarray(batch.images[place].permute(1, 2, 0).numpy())
            objects = []
            if hasattr(batch, "instances"):
                instances = batch.instances[place]
                for row, label in enumerate(instances.gt_classes.tolist()):
                    mask, size = None, instances.image_size
                    if instances.has("gt_masks") and instances.gt_masked[row]:
                        drawn = instances.gt_masks
                        if hasattr(drawn, "polygons"):
                            mask = decode(rasterize(drawn.polygons[row], size), size)
                        else:
                            mask = drawn.tensor[row].numpy()
                    box = tuple(instances.gt_boxes.tensor[row].tolist())
                    objects.append(DrawnObject(label=names[label], box_xyxy=box, mask_HW=mask))
                caption = f"image {batch.image_ids[place]}: {counted(len(objects), 'object')}"
            else:
                labels = [names[row] for row in batch.labels[place].tolist()]
                whole = (0.0, 0.0, float(image.width), float(image.height))
                objects = [DrawnObject(label=label, box_xyxy=whole) for label in labels]
                caption = f"{batch.image_ids[place]}: {', '.join(labels)}"
            images.append(CaptionedImage(image=draw_objects(image, objects), caption=caption))
        if len(images) >= request.count:
            break
    return images[: request.count]


def _page(
    stats: DatasetStats,
    images: list[CaptionedImage],
    request: PreviewRequest,
    named: Path,
    *,
    trainable: bool,
) -> Report:
    """Return the page; ``trainable``: whether the data set has text embeddings, which train and eval need."""
    kind = "as training sees them" if request.augmented else "as annotated"
    rows: list[list[str | int]] = []
    tails = []
    for part in stats.parts:
        groups = [part.group(base=base) for base in (True, False)]
        of = [f"{group['occurring']} of {group['classes']}" for group in groups]
        rows.append(
            [part.part, part.images, part.annotations, *of, part.images_without_annotations]
        )
        counts = {
            name: [c.images for c in part.classes if c.base == base]
            for name, base in (("base", True), ("novel", False))
        }
        tails.append(svg_of(long_tail_plot(counts, title=part.part)))
    file = shlex.quote(str(named))
    commands = {"check it": f"proxydet data check {file}"}
    parts = {part.part for part in stats.parts} if trainable else set()
    if "train" in parts:
        commands["train on this data set"] = f"proxydet train --recipe small --data {file}"
    if "val" in parts:
        commands["evaluate a run on it"] = f"proxydet eval --run runs/RUN --data {file}"
    head = ("part", "images", "annotations", "base classes", "novel classes", "without annotations")
    tail = "Images of each class, most frequent first; a class without any has no mark."
    sections = [
        Section(title="Counts", tables=[Table(columns=head, rows=rows)]),
        Section(title="Long tail", text=tail, plots=tails),
        Section(title=f"Images of {request.split}, {kind}", images=images),
        Section(
            title="Next steps", commands=[Command(command=c, does=d) for d, c in commands.items()]
        ),
    ]
    return Report(
        title=f"Data set {stats.name}",
        summary="What is in the data set, how long its tail is, and some of its images.",
        facts=[(part.part, counted(part.images, "image")) for part in stats.parts],
        sections=sections,
    )
