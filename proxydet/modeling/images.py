"""From images to the network's input.

Dimensions: B images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proxydet.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Normalised images, padded to one size with zeros at the right and the bottom.

    Attributes:
        pixels_B3HW: The images.
        sizes: Height and width of each, without padding.
        sizes_B2: The same as a tensor, on the device of the images.
    """

    pixels_B3HW: Tensor
    sizes: tuple[tuple[int, int], ...]
    sizes_B2: Tensor

    def channels_last(self) -> ImageBatch:
        """Return the same images with their channels innermost in memory."""
        return replace(
            self, pixels_B3HW=self.pixels_B3HW.contiguous(memory_format=torch.channels_last)
        )


def padded_size(height: int, width: int, divisor: int) -> tuple[int, int]:
    """Return the size rounded up to multiples of ``divisor``."""
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def check_images(images: Sequence[Tensor]) -> None:
    """Check that every image is (3, H, W) with pixels.

    Raises:
        DataError: One is not; the message says which.
    """
    for position, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise DataError(
                f"image {position} has the shape {tuple(image.shape)}, not (3, height, width)",
                hint="give RGB images, channels first",
            )


def stack_images(
    images: Sequence[Tensor], mean_311: Tensor, std_311: Tensor, divisor: int
) -> ImageBatch:
    """Normalise images and put them into one tensor.

    Args:
        images: (3, H, W) RGB, uint8 or float in [0, 255].
        mean_311: Subtracted from the values.
        std_311: Then they are divided by this.
        divisor: The padded size is a multiple of this.
    """
    sizes = tuple((int(image.shape[1]), int(image.shape[2])) for image in images)
    height, width = padded_size(max(h for h, _ in sizes), max(w for _, w in sizes), divisor)
    device = mean_311.device
    pixels_B3HW = torch.zeros(len(images), 3, height, width, device=device)
    for position, image in enumerate(images):
        moved = image.to(device, non_blocking=True)
        pixels_B3HW[position, :, : image.shape[1], : image.shape[2]] = (moved - mean_311) / std_311
    sizes_B2 = torch.tensor(sizes, dtype=torch.float32).to(device, non_blocking=True)
    return ImageBatch(pixels_B3HW=pixels_B3HW, sizes=sizes, sizes_B2=sizes_B2)
