"""Reading the image of an annotation record. No torch here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from proxydet.data.images import Pixels, find_image, open_picture
from proxydet.data.store import ImageRecord
from proxydet.errors import DataError


def read_annotated_image(
    record: ImageRecord, roots: tuple[Path, ...], exif_orientation: bool
) -> Pixels:
    """Decode the image of a record: uint8 (H, W, 3), RGB.

    Raises:
        DataError: it cannot be read, or its size is not the annotated one.
    """
    return np.array(open_annotated_picture(record, roots, exif_orientation))


def open_annotated_picture(
    record: ImageRecord, roots: tuple[Path, ...], exif_orientation: bool
) -> Image.Image:
    """Decode the image of a record as `read_annotated_image` does, and leave it with Pillow: mode RGB.

    Raises:
        DataError: as `read_annotated_image`.
    """
    path = find_image(record.file_name, roots)
    picture = open_picture(path, exif_orientation=exif_orientation)
    width, height = picture.size
    if (height, width) != (record.height, record.width):
        turned = (width, height) == (record.height, record.width)
        raise DataError(
            f"{path} is {width} x {height} pixels, its annotations are for {record.width} x {record.height}",
            hint="the annotations may be for the image without its EXIF orientation: set data.exif_orientation=false"
            if turned
            else "use the images that the annotations were made on",
            path=path,
        )
    return picture
