"""Decodes uploaded pictures: only known kinds, and only after the header said that they are small enough."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from proxydet.data.images import convert_image
from proxydet.serving.refusals import Refusal

Pixels = npt.NDArray[np.uint8]

_WANTED = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# What Pillow raises for a header that is damaged, as `proxydet.data.images` catches it too.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@cache
def accepted_formats() -> tuple[str, ...]:
    """The kinds of pictures that are accepted, by Pillow's names, as far as this Pillow has them.

    Its other readers are kept away from what strangers send: that of PostScript starts another program.
    """
    Image.init()
    return tuple(kind for kind in _WANTED if kind in Image.OPEN)


def check_header(data: bytes, max_pixels: int) -> None:
    """Refuse what is no picture, or too large a one, without decoding it.

    Args:
        data: The file.
        max_pixels: Most pixels.

    Raises:
        Refusal: 415 for no picture, 413 for too many pixels.
    """
    with _opened(data, max_pixels):
        pass


def decode(data: bytes, name: str, max_pixels: int) -> Pixels:
    """Decode a picture as `proxydet.data.images.read_image` does.

    Args:
        data: The file.
        name: What to call it in errors.
        max_pixels: Most pixels.

    Returns:
        uint8 (H, W, 3), RGB, turned as its EXIF orientation says.

    Raises:
        Refusal: As for `check_header`.
        DataError: The picture is cut short or damaged.
    """
    with _opened(data, max_pixels) as image:
        return convert_image(image, name=name)


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    try:
        image = Image.open(io.BytesIO(data), formats=accepted_formats())
    except _TOO_LARGE as error:
        raise _too_large(max_pixels) from error
    except _DAMAGE as error:
        raise Refusal(
            415,
            "picture-type",
            "the upload is no picture of a known kind",
            hint=f"send one of {', '.join(accepted_formats())}",
        ) from error
    with image:
        if image.width * image.height > max_pixels:
            raise _too_large(max_pixels, image.size)
        yield image


def _too_large(max_pixels: int, size: tuple[int, int] | None = None) -> Refusal:
    what = f"{size[0]} x {size[1]} pixels" if size else "far too many pixels"
    return Refusal(
        413,
        "picture-size",
        f"the picture has {what}, more than the {max_pixels / 1e6:g} million that are accepted",
        hint="send a smaller copy: the detector scales pictures down anyway",
    )
