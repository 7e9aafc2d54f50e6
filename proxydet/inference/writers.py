"""Writes detections to files: drawn images, JSON, COCO, crops, CSV."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from proxydet.errors import ConfigError, EnvironmentProblem
from proxydet.files import write_bytes, write_text
from proxydet.inference.image_files import ImageFile, unique_name
from proxydet.wording import json_text, table_cell

if TYPE_CHECKING:
    from proxydet.data.images import Pixels
    from proxydet.detections import Detection, Detections
    from proxydet.visualization.drawing import DrawingStyle

KINDS = ("images", "json", "coco", "crops", "csv")
"""What can be saved."""

TABLE_COLUMNS = ("label", "score", "x0", "y0", "x1", "y1", "mask_area")
"""Columns of a detection in tables; `table_cells` gives the values."""

_COCO, _CROPS, _CSV = "coco.json", "crops", "detections.csv"


class Writer(Protocol):
    """Writes the detections of one image after the other, in their order."""

    def add(self, image: ImageFile, pixels: Pixels, found: Detections) -> None:
        """Write, or keep, the detections of an image."""

    def finish(self) -> list[Path]:
        """Write what is written at the end, and return the files and folders that were made."""


def reserved_names(kinds: Sequence[str]) -> frozenset[str]:
    """Names in the output folder that results of all images take, so that no single image's may have them.

    Args:
        kinds: What is saved.
    """
    together = {("json", "coco"): "coco", ("images", "crops"): "crops"}
    return frozenset(name for pair, name in together.items() if set(pair) <= set(kinds))


def output_files(kinds: Iterable[str], images: Iterable[ImageFile]) -> Iterator[Path]:
    """Yield what results will be written to, relative to the output folder; of crops their folder."""
    common = {"coco": _COCO, "crops": _CROPS, "csv": _CSV}
    yield from (Path(common[kind]) for kind in kinds if kind in common)
    for image in images:
        yield from (_file(image, kind) for kind in kinds if kind not in common)


def choose_folder(folder: Path | None, files: Sequence[Path], *, overwrite: bool = False) -> Path:
    """Decide where results go, so that earlier ones are not replaced unasked.

    Args:
        folder: The folder that was asked for; None: ``predictions``, or ``predictions-2``, ... where that holds results.
        files: What will be written, relative to the folder.
        overwrite: Replace what is there.

    Raises:
        ConfigError: The folder that was asked for holds one of the files.
        EnvironmentProblem: Files cannot be saved there; see `check_folder`.
    """
    chosen = folder or Path("predictions")
    number = 1
    while not overwrite and (taken := next(filter(Path.exists, map(chosen.joinpath, files)), None)):
        if folder is not None:
            raise ConfigError(
                f"the folder {folder} already holds results: {taken.relative_to(folder)}",
                hint="give another folder with --output, or replace what is there: --overwrite",
                path=taken,
            )
        number += 1
        chosen = Path(f"predictions-{number}")
    check_folder(chosen)
    return chosen


def _file(image: ImageFile, kind: str) -> Path:
    png = image.path.suffix.lower() == ".png"
    suffix = ".json" if kind == "json" else ".png" if png else ".jpg"
    # Not with_suffix: a name may hold dots.
    return image.name.with_name(image.name.name + suffix)


def check_folder(folder: Path) -> None:
    """Make sure, before any work is done for them, that files can be saved in a folder.

    Args:
        folder: Where files will go; it may not be there yet.

    Raises:
        EnvironmentProblem: The folder, or the nearest one above it that is there, is not a folder or not writable.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    reason = None
    if not nearest.is_dir():
        reason = f"{nearest} is a file, not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"{nearest} cannot be written to"
    if reason is not None:
        raise EnvironmentProblem(
            f"files cannot be saved in {folder}: {reason}",
            hint="give another folder with --output",
            path=nearest,
        )


def make_writers(
    kinds: Sequence[str], folder: Path, names: Sequence[str], style: DrawingStyle | None = None
) -> list[Writer]:
    """Make the writers of the kinds that are to be saved.

    Args:
        kinds: Some of `KINDS`.
        folder: Where files go; made when needed.
        names: The vocabulary's class names.
        style: How images are drawn.

    Raises:
        ConfigError: There is no such kind.
    """
    makers: dict[str, Callable[[], Writer]] = {
        "images": lambda: _DrawnImages(folder, style),
        "json": lambda: _JsonFiles(folder),
        "coco": lambda: _CocoFile(folder / _COCO, names),
        "crops": lambda: _Crops(folder / _CROPS),
        "csv": lambda: _Table(folder / _CSV),
    }
    unknown = [kind for kind in kinds if kind not in makers]
    if unknown:
        raise ConfigError(
            f"cannot save {unknown[0]!r}", hint=f"choose from {', '.join(KINDS)}; none stands alone"
        )
    return [makers[kind]() for kind in dict.fromkeys(kinds)]


class _DrawnImages:
    """Each image with its detections drawn: PNG for PNG files, JPEG for all others."""

    def __init__(self, folder: Path, style: DrawingStyle | None) -> None:
        self._folder = folder
        self._style = style
        self._written: list[Path] = []

    def add(self, image: ImageFile, pixels: Pixels, found: Detections) -> None:
        target = self._folder / _file(image, "images")
        if target.exists() and target.samefile(image.path):
            raise ConfigError(
                f"the drawn image would replace {image.path}",
                hint="choose another --output folder",
            )
        _save_image(found.draw(pixels, self._style), target)
        self._written.append(target)

    def finish(self) -> list[Path]:
        return self._written


class _JsonFiles:
    """A JSON file for each image: `Detections.to_dict` with the file's name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: list[Path] = []

    def add(self, image: ImageFile, pixels: Pixels, found: Detections) -> None:  # noqa: ARG002
        content = {"file": str(image.path), **found.to_dict()}
        target = self._folder / _file(image, "json")
        self._written.append(write_text(target, json_text(content), durable=False))

    def finish(self) -> list[Path]:
        return self._written


class _CocoFile:
    """One file in COCO's annotation format, each annotation with its ``score``."""

    def __init__(self, target: Path, names: Sequence[str]) -> None:
        self._target = target
        self._categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, image: ImageFile, pixels: Pixels, found: Detections) -> None:
        import pycocotools.mask as coco_mask

        image_id = len(self._images) + 1
        height, width = pixels.shape[:2]
        self._images.append(
            {"id": image_id, "file_name": str(image.path), "width": width, "height": height}
        )
        for row in found.to_coco(image_id):
            mask, (_, _, w, h) = row.get("segmentation"), row["bbox"]
            area = w * h if mask is None else float(coco_mask.area(mask))
            number = len(self._annotations) + 1
            self._annotations.append({"id": number, **row, "iscrowd": 0, "area": area})

    def finish(self) -> list[Path]:
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": self._categories,
        }
        return [write_text(self._target, json_text(content), durable=False)]


class _Crops:
    """Each detection as an image of its own, in a folder for its class; boxes are widened to whole pixels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[Path] = set()

    def add(self, image: ImageFile, pixels: Pixels, found: Detections) -> None:
        whole = Image.fromarray(pixels)
        # "a/b" and "a_b" are two images.
        flat = unique_name(Path("_".join(image.name.parts)), self._taken)
        for index, item in enumerate(found):
            left, top, right, bottom = item.box_xyxy
            box = (
                int(left),
                int(top),
                max(-int(-right), int(left) + 1),
                max(-int(-bottom), int(top) + 1),
            )
            target = self._folder / safe_name(item.label) / f"{flat}_{index:03d}.jpg"
            _save_image(whole.crop(box), target)

    def finish(self) -> list[Path]:
        return [self._folder] if self._folder.exists() else []


class _Table:
    """One table of all detections."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text)
        self._writer.writerow(("file", *TABLE_COLUMNS))

    def add(self, image: ImageFile, pixels: Pixels, found: Detections) -> None:  # noqa: ARG002
        file = table_cell(str(image.path))
        self._writer.writerows([file, *table_cells(item)] for item in found)

    def finish(self) -> list[Path]:
        return [write_text(self._target, self._text.getvalue(), durable=False)]


def table_cells(item: Detection) -> list[object]:
    """Values of a detection, in the order of `TABLE_COLUMNS`; without a mask its area is empty."""
    area = "" if item.mask_area is None else item.mask_area
    box = [round(value, 2) for value in item.box_xyxy]
    return [table_cell(item.label), round(item.score, 6), *box, area]


def safe_name(label: str) -> str:
    """A file name made of a class name: nothing that leads elsewhere or that some system forbids."""
    clean = re.sub(r"[^\w.,()+-]+", "_", label).strip("._")[:80]
    return clean or "class"


def _save_image(image: Image.Image, target: Path) -> None:
    buffer = io.BytesIO()
    if target.suffix == ".png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    write_bytes(target, buffer.getvalue(), durable=False)
