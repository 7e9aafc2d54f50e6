"""What is detected in images as rows: for `proxydet.inference.sharded`, and as a callable for Ray Data, Daft and others.

::

    import ray
    from proxydet.inference.rows import DetectRows

    images = ray.data.read_images("photos/", include_paths=True)      # or a column of paths, or of encoded bytes
    found = images.map_batches(
        DetectRows, fn_constructor_kwargs={"detector": "runs/pets", "classes": ["dog", "ball"]},
        batch_size=32, concurrency=2,
    )
    found.write_parquet("found")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from proxydet.data.images import as_pixels, read_image, read_large_images
from proxydet.detections import Detections
from proxydet.detector import Detector, ScaledImage, open_named
from proxydet.errors import ConfigError, DataError, InputError
from proxydet.inference.pipeline import run_images
from proxydet.inference.sharded import Row
from proxydet.inference.sources import SourceImage
from proxydet.inference.writers import columns
from proxydet.modeling.postprocess import to_host
from proxydet.modeling.weights import weights_digest
from proxydet.models import NamedDetector, find_detector
from proxydet.runtime.processes import keep_freed_memory

if TYPE_CHECKING:
    from proxydet.data.images import Pixels
    from proxydet.modeling.config import InferenceConfig
    from proxydet.vocabulary.sources import Classes
    from proxydet.vocabulary.vocabulary import Vocabulary


# --- The detector as the work of a job -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionWork:
    """Detects objects: the `ImageWork` of ``proxydet predict``; the content of a row is a `Detections`."""

    detector: Detector
    vocabulary: Vocabulary
    settings: InferenceConfig

    def read(self, image: SourceImage, root: str) -> ScaledImage:
        """Read an image and scale it for the network."""
        return self.prepare(image.read(root))

    def prepare(self, pixels_HW3: Pixels) -> ScaledImage:
        """Scale an image for the network."""
        return self.detector.scaled(pixels_HW3, self.settings)

    def shape(self, read: ScaledImage) -> tuple[int, ...]:
        """Return the size that the network sees."""
        return tuple(read.views[0].image.shape) if read.views else read.size

    def run(self, batch: list[ScaledImage]) -> list[Detections]:
        """Detect objects in a batch."""
        found = to_host(self.detector.predict_images(batch, self.vocabulary, self.settings))
        return [Detections(prediction, self.vocabulary.reported) for prediction in found]

    @property
    def large(self) -> bool:
        """Whether images are cut into tiles: the network is given batches of those."""
        return bool(self.settings.tiles)

    @property
    def identity(self) -> dict[str, Any]:
        """What the results depend on, besides the images: digests and settings, as JSON values."""
        settings = {**dataclasses.asdict(self.settings), "sides": self.detector.sides}
        return {
            "detector": weights_digest(self.detector.network),
            "vocabulary": self.vocabulary.digest,
            "settings": settings,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenDetection:
    """Opens a `DetectionWork` in each worker process.

    Attributes:
        named: The detector.
        device: As `Detector.from_run` takes it; ``cuda`` with ``gpus``: each worker has a GPU of its own.
        gpus: GPUs that workers are spread over; 0: all use ``device``.
        vocabulary: What to detect.
        settings: Which detections are kept.
    """

    named: NamedDetector
    device: str
    gpus: int
    vocabulary: Vocabulary
    settings: InferenceConfig

    def __call__(self, number: int) -> DetectionWork:
        """Open it in the worker of that number."""
        device = f"cuda:{number % self.gpus}" if self.gpus else self.device
        if self.settings.tiles:
            read_large_images()
        detector = open_named(self.named, device=device)
        if detector.network.device.type == "cpu":
            keep_freed_memory()
        return DetectionWork(detector=detector, vocabulary=self.vocabulary, settings=self.settings)


# --- The callable ----------------------------------------------------------------------------------------------------------


class DetectRows:
    """Detects objects in batches that an engine hands out: made once in each of its workers, called with batch after batch.

    Ray Data calls it with a mapping of columns and takes one back; Daft and others with a sequence of images, and take a list of
    mappings, one an image.

    Args:
        detector: A run folder, a checkpoint, a published model, a repository of the Hugging Face hub, or an open `Detector`.
        classes: What to detect: as `Detector.predict` takes it; None: the classes of the training.
        score_threshold: Only detections that score above this.
        max_detections: At most this many an image, the best.
        one_label: One label a box.
        masks: Predict masks; None: where the detector has a mask head.
        batch_size: Images of one shape in the network at once; with 1 results do not depend on how an engine cuts its batches,
            to the last bit.
        device: ``"cpu"``, ``"cuda"``, ...; ``"auto"``: a GPU where there is one.
        column: Which column has the images; None: ``image``, ``bytes``, ``path`` or ``file``, the first that is there.
        channel_order: Of arrays: ``"rgb"`` or ``"bgr"``.

    Raises:
        ConfigError: An option is none of its values.
        InputError: The detector or the classes cannot be used.
    """

    def __init__(
        self,
        detector: Detector | Path | str,
        classes: Classes = None,
        *,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        one_label: bool = True,
        masks: bool | None = None,
        batch_size: int = 4,
        device: str = "auto",
        column: str | None = None,
        channel_order: str = "rgb",
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        if channel_order not in ("rgb", "bgr"):
            raise ConfigError(f'channel_order is {channel_order!r}; it can be "rgb" or "bgr"')
        if not isinstance(detector, Detector):
            named = find_detector(run=None, weights=str(detector), config=None)
            detector = open_named(named, device=device)
        settings = detector.settings(
            score_threshold=score_threshold,
            max_detections=max_detections,
            agnostic_nms=one_label,
            masks=masks,
        )
        self._work = DetectionWork(
            detector=detector, vocabulary=detector.resolve(classes), settings=settings
        )
        self._batch_size = batch_size
        self._column = column
        self._order = channel_order

    def __call__(self, batch: Any) -> Any:
        """Detect objects in a batch.

        Args:
            batch: Columns by name, as numpy arrays or lists; or a sequence of images. An image is uint8 (H, W, 3), an encoded
                file's bytes, or a path or URL.

        Returns:
            Of columns: a mapping of those that came, but for arrays and bytes of images, and those of `ParquetParts` (without
            ``file``), each a list. Of a sequence: for each image a mapping of these. An image that cannot be read, or a value
            that is not an image (null, an array of another shape or type), has its ``error``, and empty lists.

        Raises:
            InputError: There is no column of images.
        """
        if not isinstance(batch, Mapping):
            images = batch.to_pylist() if hasattr(batch, "to_pylist") else list(batch)
            return [content for _, content in self._rows(images)]
        known = [self._column] if self._column else ["image", "bytes", "path", "file"]
        column = next((name for name in known if name in batch), None)
        if column is None:
            raise InputError(
                f"the batch has no column {' or '.join(known)}: it has {', '.join(batch)}",
                hint="name the column of the images: column='...'",
            )
        images = list(batch[column])
        named = any(isinstance(image, str | Path) for image in images)
        kept = {k: v for k, v in batch.items() if named or k != column}
        rows = [content for _, content in self._rows(images)]
        names = columns(Row(SourceImage(""), None, "")).keys() - {"file"}
        return {**kept, **{name: [row[name] for row in rows] for name in sorted(names)}}

    def _rows(self, images: Sequence[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield the columns of each image, in order."""

        def read(image: Any) -> ScaledImage:
            if isinstance(image, bytes | bytearray | memoryview):
                return self._work.prepare(read_image(bytes(image)))
            if isinstance(image, str | Path):
                return self._work.prepare(SourceImage(str(image)).read())
            if image is None:
                raise DataError(
                    "there is no image: the value is null",
                    hint="give uint8 arrays (H, W, 3), or paths",
                )
            try:
                if not isinstance(image, Image.Image):
                    image = np.ascontiguousarray(image)
                pixels = as_pixels(image, self._order)  # type: ignore[arg-type]
            except (InputError, TypeError, ValueError) as error:
                what = error.message if isinstance(error, InputError) else f"not an image: {error}"
                raise DataError(what, hint="give uint8 arrays (H, W, 3), or paths") from error
            return self._work.prepare(pixels)

        running = run_images(
            images,
            read,
            self._work.run,
            batch_size=1 if self._work.large else self._batch_size,
            shape=None if self._work.large else self._work.shape,
        )
        for image, made in running:
            error = made.message if isinstance(made, DataError) else None
            content = None if isinstance(made, DataError) else made[1]
            row = columns(Row(SourceImage(""), content, error))
            del row["file"]
            yield image, row
