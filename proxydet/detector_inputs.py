"""What a detector is given: pictures, classes, a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from proxydet.data.images import read_image
from proxydet.data.transforms import shortest_side
from proxydet.errors import ConfigError, EnvironmentProblem, InputError
from proxydet.modeling.augmentation import View
from proxydet.modeling.config import InferenceConfig
from proxydet.vocabulary.vocabulary import Vocabulary

Pixels = npt.NDArray[np.uint8]
Picture = str | Path | Image.Image | Pixels
"""A file, an opened Pillow image, or uint8 (H, W, 3)."""

Classes = Vocabulary | Sequence[str] | str | Path | None
"""What to look for: a vocabulary, class names, a published vocabulary's name or a file (see
`proxydet.vocabulary.files.open_vocabulary`), or None for the classes of the training."""

ChannelOrder = Literal["rgb", "bgr"]


def as_pixels(image: Picture, channel_order: ChannelOrder = "rgb") -> Pixels:
    """Decode or check a picture.

    Args:
        image: A file, a Pillow image, or uint8 (H, W, 3).
        channel_order: Of an array.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        InputError: The file cannot be read, or the array is of another kind.
    """
    if channel_order not in ("rgb", "bgr"):
        raise ConfigError(f'channel_order is {channel_order!r}; it can be "rgb" or "bgr"')
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return read_image(image)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"a picture must be a path, a Pillow image or a numpy array, not {type(image).__name__}",
            hint="give the file's path, or numpy.asarray(picture)",
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"a picture as an array must be uint8 of shape (height, width, 3), not {image.dtype} {image.shape}",
            hint="convert it: RGB, 0 to 255, channels last",
        )
    return image if channel_order == "rgb" else np.ascontiguousarray(image[:, :, ::-1])


def to_network(pixels_HW3: Pixels, sides: tuple[int, int]) -> torch.Tensor:
    """Scale a picture for the network.

    Args:
        pixels_HW3: uint8, RGB.
        sides: Wanted shortest side, and largest longest side, in pixels.

    Returns:
        uint8 (3, h, w).
    """
    height, width = pixels_HW3.shape[:2]
    view = shortest_side(height, width, shortest=sides[0], longest=sides[1])
    return torch.from_numpy(view.image(pixels_HW3)).permute(2, 0, 1)


def views_of(pixels_HW3: Pixels, sides: tuple[int, int], settings: InferenceConfig) -> list[View]:
    """Prepare the views of a picture that the settings ask for: each size, plain and then mirrored.

    Args:
        pixels_HW3: uint8, RGB.
        sides: As for `to_network`, of size 1.
        settings: With test-time augmentation.
    """
    views = []
    for scale in settings.scales:
        scaled = (max(round(sides[0] * scale), 1), max(round(sides[1] * scale), 1))
        image = to_network(pixels_HW3, scaled)
        views.append(View(image=image))
        if settings.flip:
            views.append(View(image=image.flip(2), mirrored=True))
    return views


def choose_device(device: str) -> torch.device:
    """Return the device of that name; ``"auto"`` is a GPU where there is one.

    Raises:
        ConfigError: There is no such kind of device.
        EnvironmentProblem: It is not there, or cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"there is no kind of device {device!r}", hint="choose auto, cpu, cuda, or cuda:1, ..."
        ) from error
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentProblem(
            f"the device {device!r} cannot be used: {reason}",
            hint="try cpu, or auto; proxydet env says what hinders a GPU",
        ) from error
    return chosen


def in_batches(images: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Split pictures into lists of at most ``size``.

    Raises:
        InputError: ``images`` is a single picture, or the size is below 1.
    """
    if size < 1:
        raise ConfigError(f"batch_size is {size}; it must be at least 1")
    if isinstance(images, str | Path | Image.Image):
        raise InputError(
            "predict_batch takes several pictures", hint="use predict for a single one"
        )
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch
