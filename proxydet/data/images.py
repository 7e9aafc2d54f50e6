"""Images: finding their files below the roots of a data set, decoding them to 8-bit RGB, resizing and augmenting them.

A file that cannot be read is an error that names it, never a grey image. Geometry and pixels are separate: a `View` says
where the pixels of the result come from; it is drawn or computed once and then applied to the image and to everything
annotated on it. No torch here.

Dimensions: A annotations, H, W the image, h, w the result.
"""

from __future__ import annotations

import functools
import io
import math
import os
import posixpath
import re
import stat
import struct
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from proxydet.errors import ConfigError, DataError, InputError
from proxydet.files import PlaceholderError, open_regular, refuse_placeholder, walk

if TYPE_CHECKING:
    from proxydet.data.config import SourceConfig
    from proxydet.data.store import AnnotationStore, ImageRecord

Pixels = npt.NDArray[np.uint8]
Source = Path | str | bytes
ImageInput = str | Path | Image.Image | Pixels
"""What users give as an image: a file, an opened Pillow image, or uint8 (H, W, 3)."""
ChannelOrder = Literal["rgb", "bgr"]

MOST_FILES = 1_000_000
"""Files that a folder may hold."""
_MOST_SEEN = 4 * MOST_FILES
"""Names of any kind that are listed below a folder."""
_HEADERS_AT_ONCE = 16384
_READERS = 8
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError,
    # What Pillow's readers raise besides: AVIF's decoder, and tables (EXIF, TIFF) whose numbers make no sense.
    RuntimeError, struct.error, ArithmeticError, LookupError, TypeError,
)  # fmt: skip
"""What Pillow raises about damaged images."""
_WHITE = (255, 255, 255, 255)
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# What Pillow opens besides images: pages, films and containers of measurements.
_NOT_IMAGES = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# The EXIF tag, its values that are not upright, and those that swap width and height.
_ORIENTATION = 0x0112
_TURNED, _SWAPPED = range(2, 9), range(5, 9)


def read_large_images() -> None:
    """Read images of up to a billion pixels from now on, in this process: for what takes them in tiles.

    Pillow takes an image of more than 179 million pixels for an attack.
    """
    Image.MAX_IMAGE_PIXELS = 500_000_000  # of which it refuses twice as many


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Endings, lower case, of the image files that can be read here: Pillow's, and HEIC's where pillow-heif is installed."""
    _register_heif()
    Image.init()
    formats = {*Image.OPEN, "MPO"} - _NOT_IMAGES
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in formats)


@functools.cache
def _register_heif() -> bool:
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def read_image(
    source: Source | Image.Image, *, name: str | None = None, exif_orientation: bool = True
) -> Pixels:
    """Decode an image.

    Grey, palette and CMYK images are converted; transparency is laid over white; 16 bits are scaled to 8; of an
    animation the first frame is taken.

    Args:
        source: A file, its bytes, or an image that Pillow opened.
        name: What to call the image in errors where ``source`` does not name a file.
        exif_orientation: Turn the image as its EXIF orientation says.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        DataError: the file is absent, not an image, cut short, or of a kind without a stated range of values.
    """
    return np.array(open_image(source, name=name, exif_orientation=exif_orientation))


def as_pixels(image: ImageInput, channel_order: ChannelOrder = "rgb") -> Pixels:
    """Decode or check an image.

    Args:
        image: A file, a Pillow image, or uint8 (H, W, 3).
        channel_order: Of an array.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        InputError: The file cannot be read, or the array is of another shape or type.
    """
    if channel_order not in ("rgb", "bgr"):
        raise ConfigError(f'channel_order is {channel_order!r}; it can be "rgb" or "bgr"')
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return read_image(image)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"an image must be a path, a Pillow image or a numpy array, not {type(image).__name__}",
            hint="give the file's path, or numpy.asarray(image)",
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"an image array must be uint8 of shape (height, width, 3), not {image.dtype} {image.shape}",
            hint="convert it: RGB, 0 to 255, channels last",
        )
    return image if channel_order == "rgb" else np.ascontiguousarray(image[:, :, ::-1])


def checked_boxes(
    boxes: npt.ArrayLike, size: tuple[int, int], where: str
) -> npt.NDArray[np.float32]:
    """Return boxes that a user gives, cut off where they reach out of their image: float32 (N, 4).

    Args:
        boxes: (N, 4), xyxy in pixels.
        size: Height and width of the image.
        where: What to call the image in messages.

    Raises:
        DataError: A box is not four finite numbers, its corners are exchanged, or it has no pixel in the image.
    """
    hint = "a box is left, top, right, bottom, in pixels of the image"
    try:
        given = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the boxes are not numbers: {error}", hint=hint) from error
    given = given.reshape(-1, 4) if given.size == 0 else given
    if given.ndim != 2 or given.shape[1] != 4:
        raise DataError(f"{where}: boxes must be of shape (boxes, 4), not {given.shape}", hint=hint)
    height, width = size
    cut = np.clip(given, 0, [width, height, width, height])
    problems = {
        "is not four finite numbers": ~np.isfinite(given).all(axis=1),
        "has its corners exchanged": (given[:, 2:] < given[:, :2]).any(axis=1),
        f"has no pixel in the image of {width} x {height} pixels": (
            (cut[:, 2:] - cut[:, :2] < 1).any(axis=1)
        ),
    }
    for problem, wrong in problems.items():
        for row in np.flatnonzero(wrong)[:1]:
            shown = f"box {row} (counted from 0), {given[row].tolist()}"
            raise DataError(f"{where}: {shown}, {problem}", hint=hint)
    return cut.astype(np.float32)


def open_image(
    source: Source | Image.Image, *, name: str | None = None, exif_orientation: bool = True
) -> Image.Image:
    """Decode an image as `read_image` does, without copying it out of Pillow.

    Returns:
        An image of mode RGB, loaded.

    Raises:
        DataError: as `read_image`.
    """
    label = name or (str(source) if isinstance(source, Path | str) else "an image")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, label, exif_orientation)
        with _opened(source) as image:
            return _to_rgb(image, label, exif_orientation)
    except DAMAGE as error:
        raise _unreadable(label, error, source) from error


def image_size(
    source: Source, *, name: str | None = None, exif_orientation: bool = True
) -> tuple[int, int]:
    """Read height and width of an image from its header, as `read_image` would return them.

    Raises:
        DataError: the file is absent or not an image.
    """
    try:
        with _opened(source) as image:
            width, height = image.size
            swapped = exif_orientation and image.getexif().get(_ORIENTATION) in _SWAPPED
    except DAMAGE as error:
        label = name or (str(source) if isinstance(source, Path | str) else "an image")
        raise _unreadable(label, error, source) from error
    return (width, height) if swapped else (height, width)


def open_annotated_image(
    record: ImageRecord, roots: Sequence[Path], exif_orientation: bool | None
) -> Image.Image:
    """Decode the image of an annotation record as `open_image` does.

    Args:
        record: The image's entry in the annotation file.
        roots: Folders of the images.
        exif_orientation: Whether the image is turned as its EXIF orientation says; None turns it unless only the
            unturned image has the annotated size.

    Raises:
        DataError: it cannot be read, or its size is not the annotated one.
    """
    path, turn = _annotated_file(record, roots, exif_orientation)
    image = open_image(path, exif_orientation=turn)
    _require_size(path, (image.height, image.width), record, turn)
    return image


def check_annotated_image(
    record: ImageRecord, roots: Sequence[Path], exif_orientation: bool | None
) -> None:
    """Check that the image of a record is there, of the annotated size and not cut short; errors as `open_annotated_image`."""
    path, turn = _annotated_file(record, roots, exif_orientation)
    _require_size(path, image_size(path, exif_orientation=turn), record, turn)
    require_end(path)


def require_end(path: Path) -> None:
    """Check that an image file is not cut short, by its last bytes where its format says how it ends (JPEG, PNG, WebP).

    Many files have something after their end, or lack the mark and are whole; where it is not there, pixels are decoded.

    Raises:
        DataError: it cannot be read to its end.
    """
    try:
        with open_regular(path) as file:
            start = file.read(12)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - len(_PNG_END), 0))
            end = file.read()
    except OSError as error:
        raise _unreadable(str(path), error, path) from error
    whole = True
    if start[:2] == b"\xff\xd8":
        whole = end[-2:] == b"\xff\xd9"
    elif start[:4] == b"\x89PNG":
        whole = end == _PNG_END
    elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
        whole = size >= 8 + int.from_bytes(start[4:8], "little")
    if not whole:
        open_image(path)


def _annotated_file(
    record: ImageRecord, roots: Sequence[Path], exif_orientation: bool | None
) -> tuple[Path, bool]:
    """Return the file of a record, and whether to turn it as its EXIF orientation says."""
    path = find_image(record.file_name, roots)
    annotated = (record.height, record.width)
    turn = exif_orientation
    if turn is None:
        turn = image_size(path) == annotated
        turn = turn or image_size(path, exif_orientation=False) != annotated
    return path, turn


def _require_size(path: Path, size: tuple[int, int], record: ImageRecord, turn: bool) -> None:
    height, width = size
    annotated = (record.height, record.width)
    if size == annotated:
        return
    message = f"{path} is {width} x {height} pixels, its annotations are for {record.width} x {record.height}"
    hint = "use the images that the annotations were made on"
    if image_size(path, exif_orientation=not turn) == annotated:
        message += f", its size {'without' if turn else 'with'} its EXIF orientation applied"
        hint = f"set data.exif_orientation={'false' if turn else 'true'}"
    elif (width, height) == annotated:
        message += ": width and height are swapped"
        hint = "correct width and height in the annotation file, and its boxes where they are swapped too"
    raise DataError(message, hint=hint, path=path)


def find_image(file_name: str, roots: Sequence[Path]) -> Path:
    """Find an image below one of several folders: by its whole name, else by the last part of it.

    Where the name has no ending, any that images have will do. LVIS draws its images from two folders of COCO and names the folder (``train2017/000000000009.jpg``); both the
    folder above them and the folders themselves serve as roots. Backslashes, drives and folders of another machine are
    no obstacle, and nothing outside the roots is returned. Where the last part alone would give several entries one file,
    `require_distinct_files` refuses the data set.

    Args:
        file_name: The image's path as the annotation file has it.
        roots: Folders, searched in order.

    Raises:
        DataError: it is in none of them, or has no ending and several images have its name.
    """
    relative = PurePosixPath(posixpath.normpath(file_name.replace("\\", "/")))
    if not relative.name:
        raise DataError(
            f"the image {file_name!r} has no file name", hint="write each image's file_name"
        )
    tried: dict[Path, str] = {}
    for root in roots:
        for candidate in [root / relative, root / relative.name][".." in relative.parts :]:
            if candidate in tried or not candidate.is_relative_to(root):
                continue
            if os.path.isfile(candidate):  # noqa: PTH113 - false, no error, for a name too long for the disk
                return candidate
            # Pascal VOC's writers may leave the ending out. It is found here, not kept: the folder may change.
            ends = sorted(readable_suffixes()) if "." not in candidate.name else []
            spelt = (candidate.name + end for low in ends for end in (low, low.upper()))
            found = [path for name in spelt if os.path.isfile(path := candidate.with_name(name))]  # noqa: PTH113
            if len({path.stat().st_ino for path in found}) > 1:  # one, where the disk ignores case
                raise DataError(
                    f"the image {file_name!r} is any of {', '.join(path.name for path in found)} in {candidate.parent}",
                    hint="write the ending of the file's name (file_name; Pascal VOC: filename)",
                    path=found[0],
                )
            if found:
                return found[0]
            tried[candidate] = _why_not_a_file(candidate)
    looked = " and ".join(f"{path}{why}" for path, why in list(tried.items())[:4])
    raise DataError(
        f"the image {file_name!r} is not there; looked for {looked}",
        hint="check the folder of the images: 'images' in the dataset config; of annotations alone JPEGImages (Pascal VOC), "
        "the folder of the file, or --images of proxydet data preview",
        path=next(iter(tried), None),
    )


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Return the files below a folder with one of some endings (lower case), sorted; hidden ones are left out.

    Raises:
        DataError: there are more than `MOST_FILES`, or too many others.
    """
    ends = tuple(suffixes)
    found: list[Path] = []
    seen = 0
    for place, folders, names in walk(folder):
        found += [place / name for name in names if name.lower().endswith(ends)]
        seen += len(names) + len(folders)
        if len(found) > MOST_FILES or seen > _MOST_SEEN:
            raise DataError(
                f"{folder} holds more than {MOST_FILES if len(found) > MOST_FILES else _MOST_SEEN:,} files",
                hint="name the folder of one data set",
                path=folder,
            )
    return sorted(found)


def images_below(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted."""
    return files_below(folder, sorted(readable_suffixes()))


def named_images_below(roots: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return the images below folders, each with its path in its folder."""
    return [(i.relative_to(root).as_posix(), i) for root in roots for i in images_below(root)]


def sizes_of(images: Sequence[Path | None]) -> Iterator[tuple[int, int] | None]:
    """Yield the height and width of images, from their headers; None for one that is absent or cannot be read."""

    def size(image: Path | None) -> tuple[int, int] | None:
        try:
            return None if image is None else image_size(image)
        except DataError:
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(images), _HEADERS_AT_ONCE):
            yield from pool.map(size, images[start : start + _HEADERS_AT_ONCE])


def found_image(name: str, roots: Sequence[Path]) -> Path | None:
    """Return the file of an image below one of some folders; None where it is absent."""
    try:
        return find_image(name, roots)
    except DataError:
        return None


def image_sizes(
    names: Sequence[str], given: Sequence[tuple[int, int] | None], roots: Sequence[Path]
) -> Iterator[tuple[int, int] | None]:
    """Yield height and width of images: as given, else from the header of the file; None where neither is there.

    Args:
        names: Of the images, as `find_image` takes them.
        given: What the format says, of each.
        roots: Folders of the images.
    """
    unknown = [
        None if size else found_image(name, roots) for name, size in zip(names, given, strict=True)
    ]
    return (size or header for size, header in zip(given, sizes_of(unknown), strict=True))


def require_distinct_files(store: AnnotationStore, roots: Sequence[Path]) -> None:
    """Refuse a data set in which several entries are one image file: all but one would get a wrong image.

    Only entries that share the last part of their name are looked for on the disk.

    Raises:
        DataError: two entries name one file, or are found in one.
    """
    names = [store.file_name(row) for row in range(len(store))]
    if "" in names:
        row = names.index("")
        raise DataError(
            f"{store.source_name}: {names.count('')} of {len(names)} images have no file_name and no coco_url, e.g. the image "
            f"with id {store.image_ids[row]}",
            hint="write each image's file_name; results on such annotations can be scored with: proxydet eval --results",
        )
    # Without the ending, which a name may lack.
    stems = [name.replace("\\", "/").rpartition("/")[2].rpartition(".") for name in names]
    lasts = [stem or last for stem, _, last in stems]
    counts = Counter(lasts)
    row_of: dict[str, int] = {}
    shared: list[tuple[int, int, str]] = []
    for row, name in enumerate(names):
        if counts[lasts[row]] > 1:
            try:
                place = str(find_image(name, roots))
            except DataError:  # another fault, reported where the image is read
                place = posixpath.normpath(name.replace("\\", "/"))
            if (earlier := row_of.setdefault(place, row)) != row:
                shared.append((earlier, row, place))
    if shared:
        one, other, place = shared[0]
        entries = " and ".join(f"{store.image_ids[row]} ({names[row]!r})" for row in (one, other))
        more = f", as are {len(shared) - 1} more entries" if len(shared) > 1 else ""
        raise DataError(
            f"{store.source_name}: the images {entries} are one file, {place}{more}",
            hint="put each image where its file_name says, or correct file_name; two entries of one image must be merged",
        )


# --- The images of a source ----------------------------------------------------------------------------------------------


class LabelledImages(ABC):
    """Image files of which the classes are known. They can be pickled.

    Attributes:
        shapes_I2: int32 (I, 2), height and width of each image in pixels.
    """

    shapes_I2: npt.NDArray[np.int32]

    @abstractmethod
    def name(self, row: int) -> str:
        """Return the name of an image, for messages: the file's, or ``tar/member``."""

    @abstractmethod
    def encoded(self, row: int) -> Path | bytes:
        """Return the file of an image, or its bytes; DataError where it is not there. Any thread may call it."""

    @abstractmethod
    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the vocabulary rows of an image's classes: int64 (L,)."""

    def __len__(self) -> int:
        return len(self.shapes_I2)

    def image(self, row: int, *, exif_orientation: bool) -> Image.Image:
        """Decode an image: mode RGB.

        Raises:
            DataError: it cannot be read.
        """
        source = self.encoded(row)
        name = self.name(row) if isinstance(source, bytes) else str(source)
        try:
            return open_image(source, name=name, exif_orientation=exif_orientation)
        except DataError as error:
            hint = "fetch the file again, or leave such images out with data.unreadable_images=skip"
            raise DataError(error.message, hint=hint) from error


class FolderImages(LabelledImages):
    """Images in folders, with their classes in the ``pos_category_ids`` of an annotation file.

    Attributes:
        store: The annotation file.
        roots: The folders.
        rows_K: int64 (K,), the vocabulary's row of each category of the store.
    """

    def __init__(
        self, store: AnnotationStore, roots: tuple[Path, ...], rows_K: npt.NDArray[np.int64]
    ) -> None:
        self.store = store
        self.roots = roots
        self.rows_K = rows_K
        self.shapes_I2 = store.sizes_I2

    def name(self, row: int) -> str:
        """Return the file name."""
        return self.store.file_name(row)

    def encoded(self, row: int) -> Path:
        """Return the file."""
        return find_image(self.name(row), self.roots)

    def labels(self, row: int) -> npt.NDArray[np.int64]:
        """Return the classes that the file gives for the image."""
        return self.rows_K[self.store.labels(row, "pos_category_ids")]


def quiet_worker(_number: int = 0) -> None:
    """Silence Pillow's warnings in a process that only reads images, for example a loader worker.

    Photographs from the web often have damaged EXIF blocks, which do not touch the pixels.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def _opened(source: Source) -> Image.Image:
    if not isinstance(source, bytes):
        open_regular(Path(source)).close()
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError:
        if not _register_heif():
            raise
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _to_rgb(image: Image.Image, label: str, exif_orientation: bool) -> Image.Image:
    image.load()
    # Pillow copies an image that it need not turn.
    if exif_orientation and image.getexif().get(_ORIENTATION) in _TURNED:
        image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:
        wide_HW = np.asarray(image).astype(np.int64)
        if wide_HW.size and (wide_HW.min() < 0 or wide_HW.max() > 65535):
            raise DataError(
                f"{label} holds values outside 0 to 65535", hint="convert it to 8 bits a channel"
            )
        grey_HW = ((wide_HW * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(np.repeat(grey_HW[:, :, None], 3, axis=2))
    if image.mode == "F":
        raise DataError(
            f"{label} holds floating-point values, whose range is not stated",
            hint="convert it to 8 bits a channel",
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image if image.mode == "RGB" else image.convert("RGB")


_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_STARTS = {
    b"<svg": "SVG, which is not made of pixels",
    b"<?xml": "XML",
    b"%pdf": "a PDF",
    b"pk\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
}
"""What a file is that is not an image, by its first bytes in lower case."""


def _unreadable(label: str, error: Exception, source: Source | Image.Image) -> DataError:
    why, hint = str(error), "replace the file, or leave it out (of annotations: its entry)"
    if isinstance(error, FileNotFoundError):
        why = "there is no such file"
    elif isinstance(error, Image.DecompressionBombError):
        hint = "run on it in tiles: proxydet predict --tiles 800; in Python, call proxydet.data.images.read_large_images() first"
    elif isinstance(error, UnidentifiedImageError):
        start = source[:512] if isinstance(source, bytes) else b"\0"
        if isinstance(source, Path | str):
            with suppress(OSError), open_regular(Path(source)) as file:
                start = file.read(512)
        found = "" if start else "empty"
        text = start.lstrip().lower()
        if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
            found = "HEIC, which Pillow does not read by itself"
            hint = "run: pip install pillow-heif (or convert it to JPEG)"
        elif start[4:8] == b"ftyp":
            avif = start[8:11] == b"avi"
            found = "AVIF, which this Pillow does not read" if avif else "a video"
        elif known := [kind for mark, kind in _STARTS.items() if text.startswith(mark)]:
            found = known[0]
        elif text and not re.search(rb"[^\t\n\r\f -~\x80-\xff]", start):
            found = "a text file"
        why = f"it is {found}" if found else "it is not an image of a known format"
        try:
            refuse_placeholder(start)
        except PlaceholderError as placeholder:
            why, hint = placeholder.what, placeholder.remedy
    return DataError(f"cannot read the image {label}: {why}", hint=hint)


def _why_not_a_file(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return " (a broken link)" if path.is_symlink() else ""
    except (OSError, ValueError) as error:  # no permission, a name that the disk cannot have
        return f" ({getattr(error, 'strerror', None) or error})"
    return " (a folder)" if stat.S_ISDIR(mode) else " (not a regular file)"


# --- Resizing, cropping, mirroring, with boxes and polygons ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class View:
    """Scale, then crop, then mirror.

    Attributes:
        scaled: (height, width) of the whole image after scaling, in pixels.
        offset: (y, x) of the crop in the scaled image.
        size: (height, width) of the crop, which lies inside the scaled image.
        factor_xy: What coordinates are multiplied by before the offset is taken off.
        mirrored: Whether the crop is then mirrored left to right.
    """

    scaled: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    factor_xy: tuple[float, float]
    mirrored: bool = False

    def image(self, pixels_HW3: Pixels) -> Pixels:
        """Return the view of an image: uint8 (h, w, 3), contiguous."""
        return np.array(self.apply(Image.fromarray(pixels_HW3)))

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the view of a Pillow image; where nothing has to be done, the image itself.

        The pixels are those of resizing the width of the whole image, then its height, and cutting the view out, whatever
        order Pillow's own resize takes: 13.0.0 sometimes takes the height first, whose pixels differ by 1. Rows that the
        view does not need are dropped before, columns in between.
        """
        height, width = self.scaled
        top, left = self.offset
        tall = image.height
        # The first row that the view's rows are mixed from, and the one after the last: a bilinear filter reaches a pixel of
        # the larger of both images; one row more against rounding.
        step = tall / height
        reach = max(step, 1.0) + 1.0
        first = max(math.floor(top * step - reach), 0)
        last = min(math.ceil((top + self.size[0]) * step + reach), tall)
        if image.width != width:
            if (first, last) != (0, tall):
                image = image.crop((0, first, image.width, last))
            image = image.resize((width, image.height), Image.Resampling.BILINEAR)
        else:
            first = 0
        # What was dropped above and below comes back as black rows: resizing the other side depends on the whole height.
        if image.size != (self.size[1], tall):
            image = image.crop((left, -first, left + self.size[1], tall - first))
        if tall != height:
            image = image.resize((image.width, height), Image.Resampling.BILINEAR)
        if height != self.size[0]:
            image = image.crop((0, top, image.width, top + self.size[0]))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image

    def mask(self, mask_HW: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return the view of a mask by nearest neighbour: bool (h, w)."""
        height, width = self.scaled
        top, left = self.offset
        whole = Image.fromarray(mask_HW.astype(np.uint8))
        resized = whole.resize((width, height), Image.Resampling.NEAREST)
        result = np.asarray(resized)[top : top + self.size[0], left : left + self.size[1]]
        return np.ascontiguousarray(result[:, ::-1] if self.mirrored else result, dtype=np.bool_)

    def points(self, points_N2: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Map points (N, 2) as x, y; the result may lie outside the view: float64 (N, 2)."""
        mapped: npt.NDArray[np.float64] = np.multiply(points_N2, self.factor_xy, dtype=np.float64)
        mapped -= np.array(self.offset[::-1], dtype=np.float64)
        if self.mirrored:
            mapped[:, 0] = self.size[1] - mapped[:, 0]
        return mapped

    def boxes(self, boxes_A4: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Map boxes (A, 4) as xyxy and clip them to the view: float64 (A, 4); outside ones get no area."""
        corners = self.points(np.asarray(boxes_A4).reshape(-1, 2)).reshape(-1, 2, 2)
        ordered = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        limit = np.array(self.size[::-1] * 2, dtype=np.float64)
        clipped: npt.NDArray[np.float64] = np.clip(ordered, 0, limit)
        return clipped

    def polygons(
        self, polygons: Sequence[npt.NDArray[np.floating]]
    ) -> list[npt.NDArray[np.float64]]:
        """Map polygons, each (2n,) as x, y, x, y, ...; they may reach outside the view."""
        return [self.points(polygon.reshape(-1, 2)).reshape(-1) for polygon in polygons]


def scaled_crop(
    height: int, width: int, *, size: int, scale_factor: float, crop_y: float, crop_x: float
) -> View:
    """Scale an image so that it fits a square, then crop it to at most a square of ``size``.

    The image is scaled to fit (``scale_factor`` x ``size``) squared with its proportions kept. Where that is larger than
    ``size``, a window is cut out.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        size: Largest side of the result, in pixels.
        scale_factor: Drawn from the source's jitter range.
        crop_y: In [0, 1), where between the topmost and the lowest place the window lies.
        crop_x: In [0, 1), likewise from left to right.
    """
    target = size * scale_factor
    factor = min(target / height, target / width)
    # A side never vanishes, however thin the image or small the factor.
    scaled = (max(1, int(height * factor)), max(1, int(width * factor)))
    offset = (int(max(0, scaled[0] - size) * crop_y), int(max(0, scaled[1] - size) * crop_x))
    return View(
        scaled=scaled,
        offset=offset,
        size=(min(size, scaled[0]), min(size, scaled[1])),
        factor_xy=(factor, factor),
    )


def shortest_side(height: int, width: int, *, shortest: int, longest: int) -> View:
    """Scale an image so that its shortest side is ``shortest``, or its longest is ``longest`` where that is less.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        shortest: Wanted shortest side, in pixels.
        longest: Largest longest side, in pixels.
    """
    factor = shortest / min(height, width)
    # In two steps, as detectron2 does it: in one, half pixels may round the other way.
    sides = [
        float(shortest) if side == min(height, width) else factor * side for side in (height, width)
    ]
    if max(sides) > longest:
        factor = longest / max(sides)
        sides = [side * factor for side in sides]
    scaled = (max(1, int(sides[0] + 0.5)), max(1, int(sides[1] + 0.5)))
    return View(
        scaled=scaled, offset=(0, 0), size=scaled, factor_xy=(scaled[1] / width, scaled[0] / height)
    )


def training_view(
    height: int,
    width: int,
    source: SourceConfig,
    *,
    flip_probability: float,
    rng: np.random.Generator,
) -> View:
    """Draw the augmentation of one training image.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        source: Size of the result, and range of the scale jitter.
        flip_probability: Of mirroring.
        rng: Source of the four numbers that are drawn: scale, crop y, crop x, mirror.
    """
    low, high = source.scale
    jitter, crop_y, crop_x, mirror = rng.random(4)
    view = scaled_crop(
        height,
        width,
        size=source.size,
        scale_factor=low + (high - low) * jitter,
        crop_y=crop_y,
        crop_x=crop_x,
    )
    return replace(view, mirrored=bool(mirror < flip_probability))
