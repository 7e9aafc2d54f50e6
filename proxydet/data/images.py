"""Image files: finding them below the roots of a data set, and decoding them to 8-bit RGB.

A file that cannot be read is an error that names it, never a grey image. No torch here.
"""

from __future__ import annotations

import functools
import io
import os
import posixpath
import stat
import struct
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from proxydet.errors import ConfigError, DataError, InputError
from proxydet.files import PlaceholderError, refuse_placeholder

if TYPE_CHECKING:
    from proxydet.data.store import AnnotationStore, ImageRecord

Pixels = npt.NDArray[np.uint8]
Source = Path | str | bytes
ImageInput = str | Path | Image.Image | Pixels
"""What users give as an image: a file, an opened Pillow image, or uint8 (H, W, 3)."""
ChannelOrder = Literal["rgb", "bgr"]

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError,
    # What Pillow's readers raise besides: AVIF's decoder, and tables (EXIF, TIFF) whose numbers make no sense.
    RuntimeError, struct.error, ArithmeticError, LookupError, TypeError,
)  # fmt: skip
_WHITE = (255, 255, 255, 255)
# What Pillow opens besides images: pages, films and containers of measurements.
_NOT_IMAGES = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# The EXIF tag, its values that are not upright, and those that swap width and height.
_ORIENTATION = 0x0112
_TURNED, _SWAPPED = range(2, 9), range(5, 9)


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
    except _DAMAGE as error:
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
    except _DAMAGE as error:
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
    """Check by its header that the image of a record is there and of the annotated size; errors as `open_annotated_image`."""
    path, turn = _annotated_file(record, roots, exif_orientation)
    _require_size(path, image_size(path, exif_orientation=turn), record, turn)


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
        candidates: list[Path] = [root / relative, root / relative.name]
        for candidate in candidates[".." in relative.parts :]:
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
    if not names or counts.most_common(1)[0][1] == 1:
        return
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


def quiet_worker(_number: int = 0) -> None:
    """Silence Pillow's warnings in a process that only reads images, for example a loader worker.

    Photographs from the web often have damaged EXIF blocks, which do not touch the pixels.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def _opened(source: Source) -> Image.Image:
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
    elif isinstance(error, UnidentifiedImageError):
        try:
            start = b""
            if isinstance(source, bytes):
                start = source[:512]
            elif not isinstance(source, Image.Image):
                with Path(source).open("rb") as file:
                    start = file.read(512)
            found = "" if start else "empty"
        except OSError:
            start, found = b"\0", ""
        text = start.lstrip().lower()
        if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
            found = "HEIC, which Pillow does not read by itself"
            hint = "run: pip install pillow-heif (or convert it to JPEG)"
        elif start[4:8] == b"ftyp":
            avif = start[8:11] == b"avi"
            found = "AVIF, which this Pillow does not read" if avif else "a video"
        elif known := [kind for mark, kind in _STARTS.items() if text.startswith(mark)]:
            found = known[0]
        elif text and not any(
            (byte < 32 and byte not in b"\t\n\r\f") or byte == 0x7F for byte in start
        ):
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
