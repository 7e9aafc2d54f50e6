"""Reading the image of an annotation record. No torch here."""

from __future__ import annotations

from pathlib import Path

from proxydet.data.images import Pixels, find_image, read_image
from proxydet.data.store import ImageRecord
from proxydet.errors import DataError


def read_annotated_image(
    record: ImageRecord, roots: tuple[Path, ...], exif_orientation: bool
) -> Pixels:
    """Decode the image of a record: uint8 (H, W, 3), RGB.

    Raises:
        DataError: it cannot be read, or its size is not the annotated one.
    """
    path = find_image(record.file_name, roots)
    pixels = read_image(path, exif_orientation=exif_orientation)
    height, width = pixels.shape[:2]
    if (height, width) != (record.height, record.width):
        turned = (width, height) == (record.height, record.width)
        raise DataError(
            f"{path} is {width} x {height} pixels, its annotations are for {record.width} x {record.height}",
            hint="the annotations may be for the image without its EXIF orientation: set data.exif_orientation=false"
            if turned
            else "use the images that the annotations were made on",
            path=path,
        )
    return pixels
