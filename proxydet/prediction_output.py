"""Writes what was found in files: pictures, JSON, COCO, crops, CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from proxydet.detections import Detection, Detections
from proxydet.errors import ConfigError, EnvironmentProblem
from proxydet.files import write_bytes, write_text
from proxydet.picture_files import PictureFile, named_apart

if TYPE_CHECKING:
    from proxydet.detector_inputs import Pixels
    from proxydet.visualization.drawing import DrawingStyle

KINDS = ("pictures", "json", "coco", "crops", "csv")
"""What can be saved."""

TABLE_COLUMNS = ("label", "score", "x0", "y0", "x1", "y1", "mask_area")
"""What tables tell of a detection; `table_cells` gives the values."""


def reserved_names(kinds: Sequence[str]) -> frozenset[str]:
    """Names in the output folder that results of all pictures take, so that no single picture's may have them.

    Args:
        kinds: What is saved.
    """
    together = {("json", "coco"): "coco", ("pictures", "crops"): "crops"}
    return frozenset(name for pair, name in together.items() if set(pair) <= set(kinds))


class Saver(Protocol):
    """Saves the results of one picture after the other, in their order."""

    def add(self, picture: PictureFile, pixels: Pixels, found: Detections) -> None:
        """Save the results of a picture."""

    def finish(self) -> list[Path]:
        """Write what is written at the end; the files and folders that were made."""


def check_folder(folder: Path) -> None:
    """Make sure, before any work is done for them, that files can be saved in a folder.

    Args:
        folder: Where files will go; it may not be there yet.

    Raises:
        EnvironmentProblem: The folder, or the nearest one above it that is there, is no folder or cannot be written to.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise EnvironmentProblem(
            f"files cannot be saved in {folder}: {nearest} is a file, not a folder",
            hint="give another folder with --output",
            path=nearest,
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise EnvironmentProblem(
            f"files cannot be saved in {folder}: {nearest} cannot be written to",
            hint="give another folder with --output",
            path=nearest,
        )


def make_savers(
    kinds: Sequence[str], folder: Path, names: Sequence[str], style: DrawingStyle | None = None
) -> list[Saver]:
    """Make the savers of the wanted kinds.

    Args:
        kinds: Some of `KINDS`.
        folder: Where files go; made when needed.
        names: The vocabulary's class names.
        style: How pictures are drawn.

    Raises:
        ConfigError: There is no such kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(
            f"cannot save {unknown[0]!r}", hint=f"choose from {', '.join(KINDS)}; none stands alone"
        )
    makers: dict[str, Callable[[], Saver]] = {
        "pictures": lambda: PictureSaver(folder, style),
        "json": lambda: JsonSaver(folder),
        "coco": lambda: CocoSaver(folder / "coco.json", names),
        "crops": lambda: CropSaver(folder / "crops"),
        "csv": lambda: CsvSaver(folder / "detections.csv"),
    }
    return [makers[kind]() for kind in dict.fromkeys(kinds)]


class PictureSaver:
    """Saves each picture with what was found drawn on it: PNG for PNG files, JPEG for all others."""

    def __init__(self, folder: Path, style: DrawingStyle | None) -> None:
        self._folder = folder
        self._style = style
        self._written: list[Path] = []

    def add(self, picture: PictureFile, pixels: Pixels, found: Detections) -> None:
        """Draw and save; never over a picture that was read."""
        suffix = ".png" if picture.path.suffix.lower() == ".png" else ".jpg"
        target = _below(self._folder, picture.name, suffix)
        if target.exists() and target.samefile(picture.path):
            raise ConfigError(
                f"the drawn picture would replace {picture.path}",
                hint="choose another --output folder",
            )
        _save_picture(found.draw(pixels, self._style), target)
        self._written.append(target)

    def finish(self) -> list[Path]:
        """Return the drawn pictures."""
        return self._written


class JsonSaver:
    """Saves a JSON file for each picture."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: list[Path] = []

    def add(self, picture: PictureFile, pixels: Pixels, found: Detections) -> None:  # noqa: ARG002
        """Save ``Detections.to_dict`` with the file's name."""
        target = _below(self._folder, picture.name, ".json")
        _write_text({"file": str(picture.path), **found.to_dict()}, target)
        self._written.append(target)

    def finish(self) -> list[Path]:
        """Return the JSON files."""
        return self._written


class CocoSaver:
    """Saves one file in COCO's annotation format, each annotation with its ``score``."""

    def __init__(self, target: Path, names: Sequence[str]) -> None:
        self._target = target
        self._categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, picture: PictureFile, pixels: Pixels, found: Detections) -> None:
        """Keep the rows of a picture."""
        image_id = len(self._images) + 1
        height, width = pixels.shape[:2]
        self._images.append(
            {"id": image_id, "file_name": str(picture.path), "width": width, "height": height}
        )
        for row in found.to_coco(image_id):
            entry = {"id": len(self._annotations) + 1, **row, "iscrowd": 0}
            entry["area"] = _area(row)
            self._annotations.append(entry)

    def finish(self) -> list[Path]:
        """Write the file."""
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": self._categories,
        }
        return [_write_text(content, self._target)]


class CropSaver:
    """Saves each detection as a picture of its own, in a folder for its class."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[Path] = set()

    def add(self, picture: PictureFile, pixels: Pixels, found: Detections) -> None:
        """Cut out and save; boxes are widened to whole pixels."""
        whole = Image.fromarray(pixels)
        # "a/b" and "a_b" are two pictures.
        flat = named_apart(Path("_".join(picture.name.parts)), self._taken)
        for index, item in enumerate(found):
            left, top, right, bottom = item.box_xyxy
            box = (
                int(left),
                int(top),
                max(-int(-right), int(left) + 1),
                max(-int(-bottom), int(top) + 1),
            )
            target = self._folder / safe_name(item.label) / f"{flat}_{index:03d}.jpg"
            _save_picture(whole.crop(box), target)

    def finish(self) -> list[Path]:
        """Return the folder."""
        return [self._folder] if self._folder.exists() else []


class CsvSaver:
    """Saves one table of all detections."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text)
        self._writer.writerow(("file", *TABLE_COLUMNS))

    def add(self, picture: PictureFile, pixels: Pixels, found: Detections) -> None:  # noqa: ARG002
        """Keep the rows of a picture."""
        self._writer.writerows([picture.path, *table_cells(item)] for item in found)

    def finish(self) -> list[Path]:
        """Write the table."""
        return [write_text(self._target, self._text.getvalue(), durable=False)]


def table_cells(item: Detection) -> list[object]:
    """What a table tells of a detection, in the order of `TABLE_COLUMNS`; without a mask its area is empty."""
    area = "" if item.mask_area is None else item.mask_area
    box = [round(value, 2) for value in item.box_xyxy]
    return [item.label, round(item.score, 6), *box, area]


def safe_name(label: str) -> str:
    """A file name made of a class name: nothing that leads elsewhere or that some system forbids."""
    clean = re.sub(r"[^\w.,()+-]+", "_", label).strip("._")[:80]
    return clean or "class"


def _area(row: dict[str, Any]) -> float:
    if "segmentation" not in row:
        return float(row["bbox"][2] * row["bbox"][3])
    import pycocotools.mask as coco_mask

    return float(coco_mask.area(row["segmentation"]))


def _below(folder: Path, name: Path, suffix: str) -> Path:
    # Not with_suffix: a name may hold dots.
    return folder / name.with_name(name.name + suffix)


def _save_picture(picture: Image.Image, target: Path) -> None:
    buffer = io.BytesIO()
    if target.suffix == ".png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=92, subsampling=0)
    write_bytes(target, buffer.getvalue(), durable=False)


def _write_text(content: object, target: Path) -> Path:
    return write_text(target, json.dumps(content, ensure_ascii=False), durable=False)
