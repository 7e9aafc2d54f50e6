"""Decoding images of any kind to 8-bit RGB, or an error that names the file. No grey square for an unreadable image."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from proxydet.errors import DataError

Pixels = npt.NDArray[np.uint8]

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError,
    # What Pillow's readers raise besides: AVIF's decoder, and tables (EXIF, TIFF) whose numbers make no sense.
    RuntimeError, struct.error, ArithmeticError, LookupError, TypeError,
)  # fmt: skip
_WHITE = (255, 255, 255, 255)
# The EXIF tag, and its values that are not upright.
_ORIENTATION = 0x0112
_TURNED = range(2, 9)


def read_image(
    source: Path | str | bytes, *, name: str | None = None, exif_orientation: bool = True
) -> Pixels:
    """Decode an image.

    Grey, palette and CMYK images are converted; transparency is laid over white; 16 bits are scaled to 8; of an
    animation the first picture counts.

    Args:
        source: A file, or its bytes.
        name: What to call the image in errors where ``source`` is bytes.
        exif_orientation: Turn the image as its EXIF orientation says.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        DataError: the file is absent, no image, cut short, or of a kind without a stated range of values.
    """
    return np.array(open_picture(source, name=name, exif_orientation=exif_orientation))


def open_picture(
    source: Path | str | bytes, *, name: str | None = None, exif_orientation: bool = True
) -> Image.Image:
    """Decode an image as `read_image` does, and leave it with Pillow, which need not be asked for a copy.

    Returns:
        An image of mode RGB, loaded.

    Raises:
        DataError: as `read_image`.
    """
    label = name or (str(source) if not isinstance(source, bytes) else "an image")
    try:
        with Image.open(_readable(source)) as image:
            return _picture(image, label, exif_orientation)
    except _DAMAGE as error:
        raise _unreadable(label, error) from error


def convert_image(
    image: Image.Image, *, name: str = "an image", exif_orientation: bool = True
) -> Pixels:
    """Convert an opened image as `read_image` does.

    Raises:
        DataError: the image is cut short, or of a kind without a stated range of values.
    """
    try:
        return np.array(_picture(image, name, exif_orientation))
    except _DAMAGE as error:
        raise _unreadable(name, error) from error


def _picture(image: Image.Image, label: str, exif_orientation: bool) -> Image.Image:
    image.load()
    # Pillow copies an image that it need not turn.
    if exif_orientation and image.getexif().get(_ORIENTATION) in _TURNED:
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image, label)


def image_size(
    source: Path | str | bytes, *, name: str | None = None, exif_orientation: bool = True
) -> tuple[int, int]:
    """Read height and width of an image from its header, as `read_image` would return them.

    Raises:
        DataError: the file is absent or no image.
    """
    label = name or (str(source) if not isinstance(source, bytes) else "an image")
    try:
        with Image.open(_readable(source)) as image:
            width, height = image.size
            turned = exif_orientation and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except _DAMAGE as error:
        raise _unreadable(label, error) from error
    return (width, height) if turned else (height, width)


def find_image(file_name: str, roots: tuple[Path, ...]) -> Path:
    """Find an image below one of several folders.

    LVIS draws its images from two folders of COCO and names the folder (``train2017/000000000009.jpg``); both the
    folder above them and the folders themselves serve as roots.

    Args:
        file_name: The image's path as the annotation file has it.
        roots: Folders, searched in turn.

    Raises:
        DataError: it is in none of them, or its name leads outside.
    """
    relative = PurePosixPath(file_name.replace("\\", "/"))
    tried = []
    for root in roots:
        for candidate in dict.fromkeys((root / relative, root / relative.name)):
            if ".." in relative.parts or not candidate.is_relative_to(root):
                continue
            if os.path.isfile(candidate):  # noqa: PTH113 - false, no error, for a name too long for the disk
                return candidate
            tried.append(str(candidate))
    if not tried:
        raise DataError(
            f"the image name {file_name!r} leads outside the image folders",
            hint="image names in annotation files are relative to the image folders, without '..'",
        )
    raise DataError(
        f"the image {file_name!r} is not there; looked for {' and '.join(tried[:4])}",
        hint="check 'images' in the data description",
    )


def _readable(source: Path | str | bytes) -> Path | BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source)


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        return Image.fromarray(_from_sixteen_bits(np.asarray(image), label))
    if image.mode == "F":
        raise DataError(
            f"{label} holds floating-point values, whose range is not stated",
            hint="convert it to 8 bits a channel",
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_sixteen_bits(values_HW: npt.NDArray[np.generic], label: str) -> Pixels:
    wide = values_HW.astype(np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > 65535):
        raise DataError(
            f"{label} holds values outside 0 to 65535", hint="convert it to 8 bits a channel"
        )
    grey_HW = ((wide * 255 + 32767) // 65535).astype(np.uint8)
    return np.repeat(grey_HW[:, :, None], 3, axis=2)


def quiet_worker(_number: int = 0) -> None:
    """Silence Pillow's warnings in a process that only reads images, for example a loader worker.

    Photographs from the web often have damaged EXIF blocks, which do not touch the pixels.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def _unreadable(label: str, error: Exception) -> DataError:
    why = str(error)
    if isinstance(error, FileNotFoundError):
        why = "there is no such file"
    elif isinstance(error, UnidentifiedImageError):
        why = "it is no image of a known kind"
    return DataError(
        f"cannot read the image {label}: {why}",
        hint="replace the file, or leave it out (of annotations: its entry)",
    )
