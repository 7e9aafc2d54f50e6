"""Writes detections to files: drawn images and videos, JSON, data sets to correct, crops, CSV; and decides where the files go."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import os
import re
import shutil
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from proxydet.data import masks
from proxydet.data.formats import label_studio, voc, yolo
from proxydet.errors import ConfigError, MissingDependencyError, RuntimeEnvironmentError
from proxydet.files import discard, staged, write_bytes, write_errors, write_text
from proxydet.inference.pipeline import Writer
from proxydet.inference.sources import ImageFile, VideoSource, unique_name
from proxydet.wording import json_text, printable, table_cell

if TYPE_CHECKING:
    from proxydet.detections import Detections, FrameResult
    from proxydet.inference.jobs import ImageResult
    from proxydet.inference.sharded import PartFormat, Row
    from proxydet.inference.video import VideoInfo
    from proxydet.visualization.drawing import DrawingStyle

KINDS = ("images", "json", "coco", "yolo", "voc", "labelstudio", "crops", "csv")
"""What can be saved of images."""
PART_KINDS = ("jsonl", "jsonl.gz", "parquet")
"""What a job that can be continued saves of images, however many: see `proxydet.inference.sharded`."""
VIDEO_KINDS = {"images": ".mp4", "json": ".jsonl", "csv": ".csv"}
"""What can be saved of a video, and the file's suffix; ``images`` are an annotated video."""

TABLE_COLUMNS = ("label", "score", "x0", "y0", "x1", "y1", "mask_area")
"""Columns of a detection in tables."""

_COMMON = {
    "coco": "coco.json",
    "yolo": "yolo",
    "voc": "voc",
    "labelstudio": "labelstudio.json",
    "crops": "crops",
    "csv": "detections.csv",
}
"""Files and folders that results of all images go to."""


# --- Where files go ----------------------------------------------------------------------------------------------------


def reserved_names(kinds: Sequence[str]) -> frozenset[str]:
    """Names in the output folder that results of all images take, so that no single image's may have them.

    Args:
        kinds: What is saved.
    """
    beside = {
        "coco": {"json"},
        "labelstudio": {"json"},
        "crops": {"images"},
        "yolo": {"images", "json"},
        "voc": {"images", "json"},
    }
    return frozenset(kind for kind in kinds if beside.get(kind, set()) & set(kinds))


def output_files(kinds: Iterable[str], images: Iterable[ImageFile]) -> Iterator[Path]:
    """Yield what results will be written to, relative to the output folder; of crops and data sets their folder."""
    yield from (Path(_COMMON[kind]) for kind in kinds if kind in _COMMON)
    for image in images:
        yield from (_file(image, kind) for kind in kinds if kind not in _COMMON)


def _file(image: ImageFile, kind: str) -> Path:
    png = image.path.suffix.lower() == ".png"
    suffix = ".json" if kind == "json" else ".png" if png else ".jpg"
    # Not with_suffix: a name may hold dots.
    return image.name.with_name(image.name.name + suffix)


def choose_folder(folder: Path | None, files: Sequence[Path], *, overwrite: bool = False) -> Path:
    """Decide where results go, so that earlier ones are not replaced unasked.

    Args:
        folder: The folder that was asked for; None: ``predictions``, or ``predictions-2``, ... where that holds results.
        files: What will be written, relative to the folder.
        overwrite: Replace what is there.

    Raises:
        ConfigError: The folder that was asked for holds one of the files.
        RuntimeEnvironmentError: Files cannot be saved there; see `check_folder`.
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


def check_folder(folder: Path) -> None:
    """Make sure, before any work is done for them, that files can be saved in a folder.

    Args:
        folder: Where files will go; it may not be there yet.

    Raises:
        RuntimeEnvironmentError: The folder, or the nearest one above it that is there, is not a folder or not writable.
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
        raise RuntimeEnvironmentError(
            f"files cannot be saved in {folder}: {reason}",
            hint="give another folder with --output",
            path=nearest,
        )


# --- Parts of a job ----------------------------------------------------------------------------------------------------


def part_format(kind: str) -> PartFormat:
    """Return how the results of a part are written.

    Args:
        kind: One of `PART_KINDS`.

    Raises:
        ConfigError: There is no such kind.
        MissingDependencyError: Parquet without pyarrow.
    """
    check_kinds([kind], PART_KINDS)
    if kind == "parquet":
        _pyarrow()
        return ParquetParts()
    return JsonLinesParts(packed=kind.endswith(".gz"))


@dataclass(frozen=True)
class JsonLinesParts:
    """A JSON object an image and line: ``file`` with what `Detections.to_dict` gives, or ``file`` with ``error``."""

    packed: bool = False

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        return "jsonl.gz" if self.packed else "jsonl"

    @property
    def suffix(self) -> str:
        """Of the files."""
        return f".{self.name}"

    def write(self, target: Path, rows: Iterable[Row]) -> int:
        """Write a line for each row, when it comes; the same rows give the same bytes."""
        objects = 0
        with target.open("wb") as plain:
            # Without the time and the name that gzip notes in its header.
            packed = gzip.GzipFile("", "wb", 6, plain, mtime=0) if self.packed else None
            for row in rows:
                content = {"error": row.error} if row.error is not None else row.content.to_dict()
                objects += 0 if row.error is not None else len(row.content)
                line = json_text({"file": row.image.name, **content}) + "\n"
                (packed or plain).write(line.encode())
            if packed is not None:
                packed.close()
        return objects


class ParquetParts:
    """A row an image: ``file``, ``width``, ``height``, ``labels``, ``class_ids``, ``scores``, ``boxes`` (lists), ``masks`` (COCO's counts), ``error``."""

    name = "parquet"
    suffix = ".parquet"

    def write(self, target: Path, rows: Iterable[Row]) -> int:
        """Write a table, 128 rows at once."""
        pa = _pyarrow()
        import pyarrow.parquet as parquet

        texts, numbers = pa.list_(pa.string()), pa.list_(pa.int32())
        schema = pa.schema(
            [
                ("file", pa.string()),
                ("width", pa.int32()),
                ("height", pa.int32()),
                ("labels", texts),
                ("class_ids", numbers),
                ("scores", pa.list_(pa.float32())),
                ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
                ("masks", texts),
                ("error", pa.string()),
            ]
        )
        objects, upcoming = 0, iter(rows)
        with parquet.ParquetWriter(target, schema, compression="zstd") as writer:
            while chunk := list(islice(upcoming, 128)):
                lines = [columns(row) for row in chunk]
                objects += sum(len(line["scores"]) for line in lines)
                writer.write_table(pa.Table.from_pylist(lines, schema=schema))
        return objects


def columns(row: Row) -> dict[str, Any]:
    """Return a row with the columns of `ParquetParts`, as plain Python values; of an error all lists are empty."""
    # A name that is not UTF-8 is written with its escapes, in errors too, for no format of tables has such text.
    name, error = (
        None if text is None else text.encode("utf-8", "backslashreplace").decode()
        for text in (row.image.name, row.error)
    )
    found: Detections | None = row.content
    height, width = (None, None) if found is None else found.image_size
    return {
        "file": name,
        "width": width,
        "height": height,
        "labels": [] if found is None else list(found.labels),
        "class_ids": [] if found is None else found.class_ids.tolist(),
        "scores": [] if found is None else found.scores.tolist(),
        "boxes": [] if found is None else found.boxes_xyxy.tolist(),
        "masks": [rle["counts"] for rle in found.rles]
        if found is not None and found.has_masks
        else [],
        "error": error,
    }


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError(
            f"Parquet files need the package pyarrow, which cannot be imported: {error}",
            hint="run: pip install 'proxydet[parquet]' (or: pip install pyarrow), or save jsonl.gz",
        ) from error
    return pyarrow


# --- Writers -----------------------------------------------------------------------------------------------------------


def check_kinds(kinds: Iterable[str], known: Iterable[str] = KINDS) -> None:
    """Check that all kinds can be saved.

    Raises:
        ConfigError: One is not among those that are known.
    """
    for kind in kinds:
        if kind not in known:
            raise ConfigError(
                f"cannot save {kind!r}{' of a video' if known is VIDEO_KINDS else ''}",
                hint=f"choose from {', '.join(known)}; or none, alone",
            )


def make_writers(
    kinds: Sequence[str], folder: Path, names: Sequence[str], style: DrawingStyle | None = None
) -> list[Writer]:
    """Make the writers for images.

    Args:
        kinds: Some of `KINDS`.
        folder: Where files go; made when needed.
        names: The vocabulary's class names.
        style: How images are drawn.

    Raises:
        ConfigError: There is no such kind.
    """
    check_kinds(kinds)
    makers: dict[str, Callable[[], Writer]] = {
        "images": lambda: _FilePerImage(folder, "images", style),
        "json": lambda: _FilePerImage(folder, "json"),
        "coco": lambda: _CocoFile(folder / _COMMON["coco"], names),
        "yolo": lambda: _YoloSet(folder / _COMMON["yolo"], names),
        "voc": lambda: _VocSet(folder / _COMMON["voc"]),
        "labelstudio": lambda: _LabelStudioTasks(folder / _COMMON["labelstudio"], names),
        "crops": lambda: _Crops(folder / _COMMON["crops"]),
        "csv": lambda: CsvTable(
            folder / _COMMON["csv"], ["file"], lambda result: [table_cell(result.image.source.name)]
        ),
    }
    return [makers[kind]() for kind in dict.fromkeys(kinds)]


def make_frame_writers(
    kinds: Sequence[str],
    target: Path,
    *,
    source: VideoSource,
    info: VideoInfo,
    sound: bool = True,
    tracked: bool = False,
) -> list[Writer]:
    """Make the writers for the frames of a video.

    Args:
        kinds: Some of `VIDEO_KINDS`.
        target: The files' path without suffix; its folder is made when needed.
        source: The video.
        info: What is known of it.
        sound: Copy its sound.
        tracked: Objects have the ids of their tracks.

    Raises:
        ConfigError: There is no such kind, or the annotated video would replace the one that is read.
    """
    check_kinds(kinds, VIDEO_KINDS)
    targets = {kind: target.with_name(target.name + suffix) for kind, suffix in VIDEO_KINDS.items()}
    drawn = targets["images"]
    if "images" in kinds and source.path is not None and drawn.exists():
        _refuse_replacing(source.path, drawn, "the annotated video")
    sound_from = source.path if sound else None
    makers: dict[str, Callable[[], Writer]] = {
        "images": lambda: DrawnVideo(drawn, info, sound_from),
        "json": lambda: _JsonLines(targets["json"], source.name),
        "csv": lambda: CsvTable(
            targets["csv"],
            ["frame", "seconds"],
            lambda result: [result.index, round(result.seconds, 4)],
            tracked=tracked,
        ),
    }
    return [makers[kind]() for kind in dict.fromkeys(kinds)]


def _refuse_replacing(source: Path, target: Path, what: str) -> None:
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"{what} would replace {source}", hint="choose another --output folder")


class _FilePerImage(Writer):
    """A file for each image: its detections drawn (PNG for PNG files, JPEG for all others), or as JSON."""

    def __init__(self, folder: Path, kind: str, style: DrawingStyle | None = None) -> None:
        self._folder = folder
        self._kind = kind
        self._style = style
        self._written: list[Path] = []

    def prepare(self, result: ImageResult) -> bytes:
        if self._kind == "json":
            return json_text(result.to_dict()).encode("utf-8", "surrogateescape")
        target = self._folder / _file(result.image, self._kind)
        _refuse_replacing(result.image.path, target, "the drawn image")
        return _encoded(result.found.draw(result.pixels, self._style), target.suffix)

    def add(self, result: ImageResult, prepared: bytes) -> None:
        target = self._folder / _file(result.image, self._kind)
        self._written.append(write_bytes(target, prepared, durable=False))

    def finish(self) -> list[Path]:
        return self._written


class _CocoFile(Writer):
    """One file in COCO's annotation format, each annotation with its ``score``."""

    def __init__(self, target: Path, names: Sequence[str]) -> None:
        self._target = target
        self._categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def prepare(self, result: ImageResult) -> list[dict[str, Any]]:
        return result.found.to_coco(0)

    def add(self, result: ImageResult, prepared: list[dict[str, Any]]) -> None:
        import pycocotools.mask as coco_mask

        image_id = len(self._images) + 1
        height, width = result.found.image_size
        self._images.append(
            {
                "id": image_id,
                "file_name": result.image.source.name,
                "width": width,
                "height": height,
            }
        )
        for row in prepared:
            mask, (_, _, w, h) = row.get("segmentation"), row["bbox"]
            area = w * h if mask is None else float(coco_mask.area(mask))
            number = len(self._annotations) + 1
            self._annotations.append(
                {"id": number, **row, "image_id": image_id, "iscrowd": 0, "area": area}
            )

    def finish(self) -> list[Path]:
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": self._categories,
        }
        return [write_text(self._target, json_text(content), durable=False)]


class _DataSet(Writer):
    """A folder with a file an image, next to the images themselves, that annotation tools and trainings read."""

    images: str
    """Folder of the images below it."""
    texts: str
    """Folder of the files."""
    suffix: str
    """Of the files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[Path] = set()

    @abstractmethod
    def text(self, result: ImageResult, image: str, prepared: Any) -> str:
        """Return what is written of an image; ``image`` is the name of its file in the folder."""

    def add(self, result: ImageResult, prepared: Any) -> None:
        """Write the file, and put the image into the folder: as a hard link where the disk can, else as a copy."""
        # "a/b" and "a_b" are two images.
        name = unique_name(Path("_".join(result.image.name.parts)), self._taken).name
        file = result.image.path
        image = self._folder / self.images / f"{name}{file.suffix}"
        with write_errors(image):
            image.parent.mkdir(parents=True, exist_ok=True)
            # What is there is never written into: it may be a link to another photograph.
            content = result.image.source.encoded()
            if isinstance(content, bytes):
                image.unlink(missing_ok=True)
                image.write_bytes(content)
            elif not image.exists() or not image.samefile(file):
                image.unlink(missing_ok=True)
                try:
                    os.link(file.resolve(), image)
                except OSError:
                    shutil.copyfile(file, image)
        text = self.text(result, image.name, prepared)
        write_text(self._folder / self.texts / f"{name}{self.suffix}", text, durable=False)

    def finish(self) -> list[Path]:
        return [self._folder] if self._taken else []


class _YoloSet(_DataSet):
    """Ultralytics' layout: rows of boxes, or of outlines where there are masks, and ``data.yaml`` with the names."""

    images, texts, suffix = "images", "labels", ".txt"

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        super().__init__(folder)
        self._names = names

    def prepare(self, result: ImageResult) -> str:
        """Return the rows of an image; an object whose mask has no outline is written as the outline of its box."""
        rows = []
        for item in result.found:
            parts: list[list[float]] = []
            if (mask_HW := item.mask) is not None:
                left, top, right, bottom = item.box_xyxy
                parts = sorted(masks.outlines(mask_HW), key=_enclosed, reverse=True)
                parts = parts or [[left, top, right, top, right, bottom, left, bottom]]
            rows.append(yolo.row(item.class_id, item.box_xyxy, parts, result.found.image_size))
        return "".join(f"{row}\n" for row in rows)

    def text(self, result: ImageResult, image: str, prepared: str) -> str:  # noqa: ARG002
        return prepared

    def finish(self) -> list[Path]:
        made = super().finish()
        if made:
            write_text(self._folder / "data.yaml", yolo.config(self._names), durable=False)
        return made


def _enclosed(outline: Sequence[float]) -> float:
    """Return the area that an outline encloses, in pixels."""
    x, y = np.array(outline).reshape(-1, 2).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


class _VocSet(_DataSet):
    """Pascal VOC: an XML file an image, with boxes in whole pixels."""

    images, texts, suffix = "JPEGImages", "Annotations", ".xml"

    def text(self, result: ImageResult, image: str, prepared: Any) -> str:  # noqa: ARG002
        found = result.found
        boxes = ((item.label, item.box_xyxy) for item in found)
        return voc.annotation(image, found.image_size, boxes)


class _LabelStudioTasks(Writer):
    """Tasks with predictions to correct, and the labeling interface that they need (``labelstudio.xml``)."""

    def __init__(self, target: Path, names: Sequence[str]) -> None:
        self._target = target
        self._names = names
        self._tasks: list[dict[str, Any]] = []

    def prepare(self, result: ImageResult) -> dict[str, Any]:
        size = result.found.image_size
        regions = [
            label_studio.region(item.label, item.score, item.box_xyxy, item.mask, size)
            for item in result.found
        ]
        source = result.image.source
        place = result.image.path.absolute().as_posix() if source.is_file else source.name
        return label_studio.task(place, regions)

    def add(self, result: ImageResult, prepared: dict[str, Any]) -> None:  # noqa: ARG002
        self._tasks.append(prepared)

    def finish(self) -> list[Path]:
        interface = label_studio.labeling_config([printable(name) for name in self._names])
        return [
            write_text(self._target, json_text(self._tasks), durable=False),
            write_text(self._target.with_suffix(".xml"), interface, durable=False),
        ]


class _Crops(Writer):
    """Each detection as an image of its own, in a folder for its class; boxes are widened to whole pixels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[Path] = set()

    def add(self, result: ImageResult, prepared: Any) -> None:  # noqa: ARG002
        whole = Image.fromarray(result.pixels)
        # "a/b" and "a_b" are two images.
        flat = unique_name(Path("_".join(result.image.name.parts)), self._taken)
        for index, item in enumerate(result.found):
            left, top, right, bottom = item.box_xyxy
            box = (
                int(left),
                int(top),
                max(-int(-right), int(left) + 1),
                max(-int(-bottom), int(top) + 1),
            )
            target = self._folder / safe_name(item.label) / f"{flat}_{index:03d}.jpg"
            write_bytes(target, _encoded(whole.crop(box), ".jpg"), durable=False)

    def finish(self) -> list[Path]:
        return [self._folder] if self._folder.exists() else []


class DrawnVideo(Writer):
    """The frames with their detections drawn, as a video; none where there were no frames."""

    def __init__(self, target: Path, info: VideoInfo, sound_from: Path | None) -> None:
        from proxydet.inference.video import VideoWriter

        self._writer = VideoWriter(target, info, sound_from=sound_from)
        self._order: dict[int, int] = {}
        self._ordering = threading.Lock()

    def prepare(self, result: FrameResult) -> Any:
        """Draw at the frame's own size, with letters and colours that do not change from frame to frame."""
        from proxydet.visualization.drawing import DrawingStyle, letters_for

        image = Image.fromarray(result.frame.pixels)
        # Colours go to classes in the order in which they appear, so that the first ones have different colours.
        with self._ordering:
            for class_id in result.found.class_ids.tolist():
                self._order.setdefault(class_id, len(self._order))
        style = DrawingStyle(
            font_size=letters_for(image.size), shortest_edge=0, class_order=self._order
        )
        return np.asarray(result.found.draw(image, style))

    def add(self, result: FrameResult, prepared: Any) -> None:
        """Encode."""
        self._writer.write(result.frame.pts, prepared)

    def finish(self) -> list[Path]:
        """Complete the video."""
        made = self._writer.finish()
        return [] if made is None else [made]

    def abandon(self) -> None:
        """Remove what is not complete."""
        self._writer.abandon()


class _TextFile(Writer):
    """A file that is written bit by bit and appears under its name when it is complete; ``head`` is its first text."""

    def __init__(self, target: Path, head: str = "") -> None:
        self._target = target
        self._head = head
        self._stack = contextlib.ExitStack()
        self._temporary = target
        self._stream: Any = None

    def add(self, result: Any, prepared: str) -> None:  # noqa: ARG002
        """Write a piece of text."""
        self._write(prepared)

    def _write(self, text: str) -> None:
        with write_errors(self._target):
            if self._stream is None:
                self._temporary = self._stack.enter_context(staged(self._target))
                self._stream = self._temporary.open("w", encoding="utf-8", newline="")
                self._stream.write(self._head)
            self._stream.write(text)

    def finish(self) -> list[Path]:
        """Complete the file."""
        self._write("")
        with write_errors(self._target):
            self._stream.close()
        self._stack.close()
        return [self._target]

    def abandon(self) -> None:
        """Remove what is not complete."""
        if self._stream is None or self._stream.closed:
            return
        # On a full disk closing fails as writing did: the error is reported already, and the file is removed.
        with contextlib.suppress(OSError):
            self._stream.close()
        discard(self._temporary)
        self._stack.close()


class _JsonLines(_TextFile):
    """One JSON object a frame, each on a line."""

    def __init__(self, target: Path, video: str) -> None:
        super().__init__(target)
        self._video = video

    def prepare(self, result: FrameResult) -> str:
        return json_text(result.to_dict(self._video)) + "\n"


class CsvTable(_TextFile):
    """One table of all detections.

    Args:
        target: The file.
        columns: Names of the first columns.
        cells: Gives their values for a result.
        tracked: The last column is the id of the track; it is empty where there is none.
    """

    def __init__(
        self,
        target: Path,
        columns: Sequence[str],
        cells: Callable[[Any], list[object]],
        *,
        tracked: bool = False,
    ) -> None:
        last = ["track_id"] if tracked else []
        super().__init__(target, _rows([[*columns, *TABLE_COLUMNS, *last]]))
        self._cells = cells
        self._tracked = tracked

    def prepare(self, result: ImageResult | FrameResult) -> str:
        """Make the rows of a result; without a mask its area is empty."""
        rows = []
        for item in result.found:
            box = [round(value, 2) for value in item.box_xyxy]
            area = "" if item.mask_area is None else item.mask_area
            detection = [table_cell(item.label), round(item.score, 6), *box, area]
            if self._tracked:
                detection.append("" if item.track_id is None else item.track_id)
            rows.append([*self._cells(result), *detection])
        return _rows(rows)


def _rows(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def safe_name(label: str) -> str:
    """A file name made of a class name: nothing that leads elsewhere or that some system forbids."""
    clean = re.sub(r"[^\w.,()+-]+", "_", label).strip("._")[:80]
    return clean or "class"


def _encoded(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
