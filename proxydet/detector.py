"""The detector as a Python user sees it: images in, detections out, any class names as classes.

`Detector` comes first; below it, what it does with its inputs, and how run folders, checkpoints and published models are
opened.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from proxydet.config import merge
from proxydet.data.config import DataConfig
from proxydet.data.images import (
    ChannelOrder,
    ImageInput,
    Pixels,
    as_pixels,
    checked_boxes,
    shortest_side,
)
from proxydet.detections import Detections, FrameResult
from proxydet.errors import (
    ConfigError,
    DataError,
    InputError,
    NumericsError,
    RuntimeEnvironmentError,
)
from proxydet.extensions import source_digests
from proxydet.hub import damage_explained
from proxydet.modeling.config import TTA_SCALES, InferenceConfig, ModelConfig
from proxydet.modeling.network import ImageView, ProxyDetNetwork, usable_precision
from proxydet.modeling.postprocess import Prediction, to_host
from proxydet.modeling.roi_heads import RegionEmbeddings
from proxydet.modeling.tiles import TileMerger, Window, tile_windows
from proxydet.modeling.weights import load_weights
from proxydet.models import (
    DEFAULT_MODEL,
    PUBLISHED_MODELS,
    DetectorConfig,
    NamedDetector,
    check_sizes,
    classes_of_run,
    configuration_of,
    digests_of,
    find_detector,
    locate_published,
    newest_weights,
    settings_of,
    trained_classes,
)
from proxydet.paths import require_run
from proxydet.runtime.torch_probe import half_speed
from proxydet.vocabulary.sources import Classes, TrainedClasses
from proxydet.vocabulary.vocabulary import FloatArray, TextEncoder, Vocabulary
from proxydet.wording import first_line

if TYPE_CHECKING:
    from proxydet.inference.sources import VideoSource
    from proxydet.inference.video import Frame, VideoReader

logger = logging.getLogger(__name__)


# Tiles of an image that are in the network at once.
_TILES_AT_ONCE = 4


class Detector(TrainedClasses):
    """A trained network with what it needs to run on images.

    Predicting changes nothing in it: threads may share one, each with a vocabulary of its own.

    Attributes:
        network: The network with its weights, in evaluation mode. Predicting runs a copy of it that is made at first use
            (`ProxyDetNetwork.prepared`); after a change of its weights, make another detector.
        vocabulary: The classes of the training.
        inference: Settings of evaluation; `predict` changes thresholds only. Without a mask head, ``masks`` is False.
        sides: The shortest and the longest side, in pixels, that images are scaled to.
        folder: The run folder that it was opened from; None of a weight file or a published model.
    """

    def __init__(
        self,
        network: ProxyDetNetwork,
        *,
        inference: InferenceConfig | None = None,
        shortest: int = 800,
        longest: int = 1333,
        encoder: TextEncoder | Path | None = None,
        folder: Path | None = None,
    ) -> None:
        """Wrap a network.

        Args:
            network: Network with its weights, on the device that shall compute.
            inference: Settings; the published ones where None. Of the precision ``"auto"`` it keeps what that means here; one
                that the device has no units for is refused when it is predicted in: `with_settings` takes another.
            shortest: Images are scaled so that their shortest side has this many pixels,
            longest: but the longest at most this many.
            encoder: Embeds class names: an encoder, its file, or None for CLIP ViT-B/32's weights where ``proxydet
                download`` puts them. It is opened when names are first given.
            folder: The run folder that it comes from.
        """
        super().__init__(network.vocabulary, encoder)
        self.network = network.eval()
        settings = inference or InferenceConfig()
        if settings.precision == "auto":
            precision = usable_precision("auto", network.device)
            settings = dataclasses.replace(settings, precision=precision)
        self.inference = (
            settings if network.has_mask_head else dataclasses.replace(settings, masks=False)
        )
        self.sides = (shortest, longest)
        self.folder = folder
        # Made when first run, and kept; threads that come at once wait for one copy.
        copies = lru_cache(maxsize=2)(lambda precision, _device: network.prepared(precision))
        preparing = threading.Lock()

        def prepared(precision: str, device: str) -> ProxyDetNetwork:
            with preparing:
                return copies(precision, device)

        self._prepared = prepared

    # --- Opening -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_run(
        cls, folder: Path | str, *, checkpoint: Path | None = None, device: str = "auto"
    ) -> Detector:
        """Open what ``proxydet train`` or ``proxydet quickstart`` made.

        Args:
            folder: The run folder.
            checkpoint: A checkpoint of the run; None: the weights of the best evaluation where they are kept, else the
                final ones, or the newest checkpoint of a run that is not finished.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"``: a GPU where there is one.

        Raises:
            InputError: The folder is not a run folder, or a file in it is damaged.
            RuntimeEnvironmentError: The device is not there.
        """
        chosen = choose_device(device)
        run = require_run(Path(folder))
        settings = DetectorConfig.of(configuration_of(run))
        weights = checkpoint or newest_weights(run)
        detector = cls._open(settings, classes_of_run(run, settings.data), weights, chosen, run)
        recorded = digests_of(run)
        model = settings.model
        for name, digest in source_digests((model.backbone.kind, model.cascade.box_head)).items():
            if recorded.get(name, digest) != digest:
                logger.warning("%s: the %s changed since the run was trained", run, name)
        return detector

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str,
        *,
        config: ModelConfig | Path | str = "r50",
        vocabulary: Vocabulary | None = None,
        device: str = "auto",
    ) -> Detector:
        """Open a checkpoint of ours, or a published one of ProxyDet, Detic or BoxSup.

        Args:
            path: The checkpoint.
            config: The model's sizes: ``"r50"``, ``"swinb"``, a name that `from_pretrained` knows, a configuration, or
                the ``config.yaml`` of a run.
            vocabulary: The classes of its training; None: the run's where ``config`` lies in a run folder, else those
                of LVIS, from the downloaded metadata.
            device: See `from_run`.

        Raises:
            InputError: The checkpoint cannot be read or is of another model, or the vocabulary is missing.
            RuntimeEnvironmentError: The device is not there.
        """
        chosen = choose_device(device)
        if isinstance(config, ModelConfig):
            named = NamedDetector(weights=Path(path))
            settings = DetectorConfig(data=DataConfig(), model=config, inference=InferenceConfig())
        else:
            named = NamedDetector(weights=Path(path), config=check_sizes(config))
            settings = settings_of(named)
        trained = trained_classes(named) if vocabulary is None else TrainedClasses(vocabulary)
        return cls._open(settings, trained, Path(path), chosen)

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "auto") -> Detector:
        """Open a published model or one of the Hugging Face hub, downloading it first where it is not there.

        Args:
            name: ``proxydet-r50``, ``proxydet-r50-inl``, ``proxydet-swinb-inl``, ``detic-r50``, ``detic-swinb``,
                ``boxsup-r50`` or ``boxsup-swinb``; or ``owner/name`` or ``owner/name@revision`` (a branch, a tag, a commit) of
                what ``proxydet push`` wrote. A run folder or a file here comes before a repository of the same name.
            device: See `from_run`.

        Raises:
            InputError: There is no such model.
            ArtifactError: It cannot be downloaded, or its digest is wrong.
            RuntimeEnvironmentError: The device is not there.
        """
        from proxydet.artifacts import download

        chosen = choose_device(device)
        if name not in PUBLISHED_MODELS:
            return open_named(find_detector(run=None, weights=name, config=None), device=device)
        weights = download(name)
        download("lvis-metadata")
        trained = trained_classes(NamedDetector(published=name))
        return cls._open(PUBLISHED_MODELS[name], trained, weights, chosen)

    @classmethod
    def _open(
        cls,
        settings: DetectorConfig,
        trained: TrainedClasses,
        weights: Path,
        device: torch.device,
        folder: Path | None = None,
    ) -> Detector:
        network = ProxyDetNetwork(settings.model, trained.vocabulary)
        load_weights(network, weights)
        return cls(
            network.for_inference(device),
            inference=settings.inference,
            shortest=settings.data.test_shortest_side,
            longest=settings.data.test_longest_side,
            encoder=trained._encoder,
            folder=folder,
        )

    # --- Prediction --------------------------------------------------------------------------------------------------

    def predict(
        self,
        image: ImageInput,
        vocabulary: Classes = None,
        *,
        background: Classes = None,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        one_label: bool = True,
        tiles: int | None = None,
        channel_order: ChannelOrder = "rgb",
    ) -> Detections:
        """Detect objects in an image.

        Args:
            image: A file, a Pillow image, or uint8 (H, W, 3); files and Pillow images may be of any mode and are
                turned as their EXIF orientation says.
            vocabulary: What to detect, see `Classes`; names are embedded by `vocabulary_of`.
            background: Classes that absorb false hits and are not reported, see `with_background`.
            score_threshold: Only detections that score above this, 0 to 1.
            max_detections: At most this many, the best.
            one_label: One label a box: of overlapping detections of any classes only the best; else of each class.
            tiles: Run on a larger image in overlapping tiles of this side too, in its pixels, for small objects (`with_settings`
                sets their overlap, and whether the whole image is run on); 0: never; None: as the run's settings say.
            channel_order: ``"bgr"`` for arrays from OpenCV.

        Raises:
            InputError: The image or the vocabulary cannot be used.
        """
        (found,) = self.predict_batch(
            [image],
            vocabulary,
            background=background,
            score_threshold=score_threshold,
            max_detections=max_detections,
            one_label=one_label,
            tiles=tiles,
            channel_order=channel_order,
        )
        return found

    def predict_batch(
        self,
        images: Iterable[ImageInput],
        vocabulary: Classes = None,
        *,
        background: Classes = None,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        one_label: bool = True,
        tiles: int | None = None,
        channel_order: ChannelOrder = "rgb",
        batch_size: int = 8,
    ) -> list[Detections]:
        """Detect objects in several images, which may differ in size; results are in their order.

        Args:
            images: As for `predict`.
            vocabulary: As for `predict`.
            background: As for `predict`.
            score_threshold: As for `predict`.
            max_detections: As for `predict`.
            one_label: As for `predict`.
            tiles: As for `predict`.
            channel_order: As for `predict`.
            batch_size: Images that are in memory and in the network at once.

        Raises:
            InputError: An image or the vocabulary cannot be used, or ``images`` is a single image.
            ConfigError: A number is out of range.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        if isinstance(images, str | Path | Image.Image):
            raise InputError(
                "predict_batch takes several images", hint="use predict for a single one"
            )
        classes = self.resolve(vocabulary, background)
        settings = self.settings(
            score_threshold=score_threshold,
            max_detections=max_detections,
            agnostic_nms=one_label,
            tiles=tiles,
        )
        found: list[Detections] = []
        remaining = iter(images)
        while batch := list(islice(remaining, batch_size)):
            pixels = [as_pixels(image, channel_order) for image in batch]
            predictions = to_host(self.predict_images(pixels, classes, settings))
            found += [Detections(prediction, classes.reported) for prediction in predictions]
        return found

    def predict_video(
        self,
        source: str | Path | VideoSource,
        vocabulary: Classes = None,
        *,
        background: Classes = None,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        one_label: bool = True,
        tiles: int | None = None,
        track: bool = False,
        every: int = 1,
        batch_size: int = 4,
    ) -> Iterator[FrameResult]:
        """Detect objects in the frames of a video or a camera, which a thread decodes ahead.

        Args:
            source: A file; ``"webcam"`` or ``"webcam:1"``, of which only the newest frames are used.
            vocabulary: As for `predict`.
            background: As for `predict`.
            score_threshold: As for `predict`.
            max_detections: As for `predict`.
            one_label: As for `predict`.
            tiles: As for `predict`.
            track: Follow the objects: ``found.track_ids`` are the same for an object in all frames of a scene.
            every: Run on each frame (1), each second one (2), ...
            batch_size: Frames in the network at once; a camera's are run one by one.

        Returns:
            For each frame its number ``index``, its time ``seconds``, its ``frame.pixels``, and what was ``found``. The
            video is open until the iterator ends or is closed.

        Raises:
            MissingDependencyError: PyAV, or what tracks, is not installed.
            DataError: The video cannot be opened; from the iterator, after the frames before: it is damaged there.
        """
        from proxydet.inference.video import VideoReader

        classes = self.resolve(vocabulary, background)
        settings = self.settings(
            score_threshold=score_threshold,
            max_detections=max_detections,
            agnostic_nms=one_label,
            tiles=tiles,
        )
        reader = VideoReader(source, every=every)
        return self.predict_frames(reader, classes, settings, batch_size=batch_size, track=track)

    def predict_frames(
        self,
        reader: VideoReader,
        vocabulary: Vocabulary,
        settings: InferenceConfig,
        *,
        batch_size: int = 4,
        track: bool = False,
    ) -> Generator[FrameResult, None, None]:
        """Detect objects in every frame that a reader gives; a thread decodes ahead.

        Of a camera, frames that come while the network is busy are dropped, and batches hold one frame, so that results
        are never late.

        Args:
            reader: An open video; it is closed at the end.
            vocabulary: What to detect.
            settings: Thresholds and limits.
            batch_size: Frames that go through the network at once.
            track: Give detections the ids of their tracks.

        Raises:
            ConfigError: The batch size is below 1: at once, as the next, all others while iterating.
            MissingDependencyError: What tracks is not installed.
            DataError: The video is damaged or cut off; the frames before it come first.
        """
        from proxydet.inference.video import read_ahead

        if batch_size < 1:
            reader.close()
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        tracker = None
        if track:
            from proxydet.inference.tracking import Tracker

            try:
                tracker = Tracker(vocabulary, settings, reader.rate)
            except BaseException:
                reader.close()
                raise
        detecting = settings if tracker is None else tracker.detecting
        classes = vocabulary if tracker is None else tracker.vocabulary
        live = reader.source.live
        size = 1 if live else batch_size

        def results() -> Generator[FrameResult, None, None]:
            with (
                reader,
                closing(read_ahead(reader, 1 if live else 2 * size, newest=live)) as frames,
            ):
                broken: DataError | None = None
                while broken is None:
                    batch: list[Frame] = []
                    try:
                        while len(batch) < size and (frame := next(frames, None)) is not None:
                            batch.append(frame)
                    except DataError as error:
                        broken = error  # raised after the frames before it
                    if not batch:
                        break
                    predictions = to_host(
                        self.predict_images([frame.pixels for frame in batch], classes, detecting)
                    )
                    for frame, prediction in zip(batch, predictions, strict=True):
                        found = Detections(prediction, vocabulary.reported)
                        if tracker is not None:
                            found = tracker.update(found, frame.pixels, frame.seconds)
                        yield FrameResult(frame=frame, found=found)
                if broken is not None:
                    raise broken

        return results()

    def predict_images(
        self,
        images: Sequence[Pixels | ScaledImage],
        vocabulary: Vocabulary | None = None,
        settings: InferenceConfig | None = None,
    ) -> list[Prediction]:
        """Detect objects in decoded images: the one way that evaluation and prediction share.

        Args:
            images: uint8 (H, W, 3) RGB at their original sizes; or what `scaled` made of them with the same settings.
            vocabulary: What to detect, taken as it is; None: the classes of the training.
            settings: Thresholds and limits; None: those of the run.

        Returns:
            Boxes, and masks where the settings ask for them and the network has a mask head, in the pixels of the given
            images, on the network's device.
        """
        training = vocabulary is None or vocabulary == self.vocabulary
        classes = None if training else vocabulary
        settings = settings or self.inference
        scaled = [
            image if isinstance(image, ScaledImage) else self.scaled(image, settings)
            for image in images
        ]
        if any(image.tiled is not None for image in scaled):
            return [self._detect_in_tiles(image, classes, settings) for image in scaled]
        return self._detect(scaled, classes, settings)

    def _detect(
        self, scaled: Sequence[ScaledImage], classes: Vocabulary | None, settings: InferenceConfig
    ) -> list[Prediction]:
        network = self._prepared(settings.precision, str(self.network.device))
        if not settings.augmented:
            return network.detect(
                [image.views[0].image for image in scaled],
                classes,
                original_sizes=[image.size for image in scaled],
                settings=settings,
            )
        return [
            network.detect_views(image.views, classes, original_size=image.size, settings=settings)
            for image in scaled
        ]

    def _detect_in_tiles(
        self, image: ScaledImage, classes: Vocabulary | None, settings: InferenceConfig
    ) -> Prediction:
        if image.tiled is None:
            return self._detect([image], classes, settings)[0]
        merger = TileMerger(image.size, settings, classes)
        classes, detecting = merger.classes, merger.detecting
        if settings.whole_image:
            (found,) = to_host(self._detect([image], classes, detecting))
            merger.add(found, Window(0, 0, *image.size))
        remaining = iter(tile_windows(image.size, settings.tiles, settings.tile_overlap))
        while windows := list(islice(remaining, _TILES_AT_ONCE)):
            tiles = [self.scaled(window.of(image.tiled), detecting) for window in windows]
            for found, window in zip(
                to_host(self._detect(tiles, classes, detecting)), windows, strict=True
            ):
                merger.add(found, window)
        return merger.merged().to(self.network.device)

    def embed(
        self, images: Sequence[Pixels | ScaledImage], settings: InferenceConfig | None = None
    ) -> RegionEmbeddings:
        """Embed the regions of decoded images, before any class is named: what an index keeps of them.

        `proxydet.modeling.postprocess.detect_classes` makes of it what `predict_images` finds, for any vocabulary.

        Args:
            images: As for `predict_images`, at least one.
            settings: Say the number format; None: those of the run.

        Returns:
            Regions with boxes in the pixels of the scaled images, on the network's device.

        Raises:
            ConfigError: The settings ask for tiles or test-time augmentation, whose regions have several embeddings.
        """
        settings = settings or self.inference
        require_one_view(settings)
        scaled = [
            image if isinstance(image, ScaledImage) else self.scaled(image, settings)
            for image in images
        ]
        network = self._prepared(settings.precision, str(self.network.device))
        return network.embed([image.views[0].image for image in scaled], settings=settings)

    def embed_boxes(
        self,
        images: Sequence[ImageInput],
        boxes: Sequence[npt.ArrayLike],
        *,
        channel_order: ChannelOrder = "rgb",
    ) -> list[FloatArray]:
        """Embed given regions: what the steps of the detection branch see in them, whatever the classes.

        Args:
            images: As for `predict`; they are in the network at once.
            boxes: Boxes (N, 4) of each image, xyxy in its pixels; what reaches out of it is cut off.
            channel_order: As for `predict`.

        Returns:
            Region embeddings of length 1 of each image: float32 (N, S, D) of the S steps.

        Raises:
            InputError: An image cannot be used, or a box of it is not four finite numbers or has no pixel in it.
            NumericsError: The network gave values that are not finite.
        """
        if len(images) != len(boxes):
            raise InputError(
                f"{len(images)} images, but boxes of {len(boxes)}",
                hint="give a list of boxes for each image, an empty one where it has none",
            )
        views, scaled = [], []
        for number, (image, given) in enumerate(zip(images, boxes, strict=True)):
            pixels_HW3 = as_pixels(image, channel_order)
            height, width = pixels_HW3.shape[:2]
            box_N4 = checked_boxes(given, (height, width), f"image {number} (counted from 0)")
            view = to_network(pixels_HW3, self.sides)
            by_4 = np.tile([view.shape[2] / width, view.shape[1] / height], 2)
            views.append(view)
            scaled.append(torch.from_numpy((box_N4 * by_4).astype(np.float32)))
        if not sum(map(len, scaled)):
            steps = len(self.network.classifiers()) - (self.network.roi_heads.mixup is not None)
            return [np.zeros((0, steps, self.vocabulary.dimension), np.float32) for _ in scaled]
        settings = self.inference
        network = self._prepared(settings.precision, str(self.network.device))
        regions = network.embed(views, scaled, settings=settings)
        steps_BRSD = torch.stack(regions.detection, dim=2).float().cpu()
        require_finite([steps_BRSD])
        both = zip(steps_BRSD.numpy(), scaled, strict=True)
        return [own_RSD[: len(own)] for own_RSD, own in both]

    def scaled(self, pixels_HW3: Pixels, settings: InferenceConfig | None = None) -> ScaledImage:
        """Scale an image for the network, once for each view of it: the part of `predict_images` that any thread can do.

        Args:
            pixels_HW3: uint8, RGB.
            settings: Say which views; None: those of the run.
        """
        settings = settings or self.inference
        height, width = pixels_HW3.shape[:2]
        tiled = 0 < settings.tiles < max(height, width)
        views = []
        whole = settings.whole_image or not tiled
        for scale in (settings.scales if settings.augmented else (1.0,)) if whole else ():
            shortest, longest = (max(round(side * scale), 1) for side in self.sides)
            image = to_network(pixels_HW3, (shortest, longest))
            views.append(ImageView(image=image))
            if settings.augmented and settings.flip:
                views.append(ImageView(image=image.flip(2), mirrored=True))
        return ScaledImage(
            views=tuple(views), size=(height, width), tiled=pixels_HW3 if tiled else None
        )

    # --- Settings ----------------------------------------------------------------------------------------------------

    def settings(self, **changes: bool | float | str | Sequence[float] | None) -> InferenceConfig:
        """Return the run's settings with some of them changed.

        Args:
            **changes: As for `with_settings`.

        Raises:
            ConfigError: There is no such setting, its value is out of range, or masks are asked of a detector without a
                mask head.
        """
        if changes.get("masks") and not self.network.has_mask_head:
            raise ConfigError(
                "this detector has no mask head: it was trained on boxes, and predicts boxes only",
                hint="leave masks out; for masks, train on objects that have them",
            )
        given = {name: value for name, value in changes.items() if value is not None}
        return merge(self.inference, given, "inference")

    def with_settings(self, **changes: bool | float | str | Sequence[float] | None) -> Detector:
        """Return a detector with other settings that shares this one's network.

        Args:
            **changes: Fields of `proxydet.modeling.config.InferenceConfig`, such as ``masks=False``,
                ``agnostic_nms=True`` (of overlapping detections of any classes only the best),
                ``tiles=640, tile_overlap=0.3, whole_image=False`` (large images in tiles; ``whole_image``: also as a whole),
                ``precision="auto"`` (see `faster_precision`), or ``flip=True, scales=(0.75, 1.0, 1.25)`` (test-time augmentation). None
                keeps the run's.

        Raises:
            ConfigError: As `settings`, or the device has no units for this precision.
        """
        settings = self.settings(**changes)
        if changes.get("precision") is not None:
            usable_precision(settings.precision, self.network.device)
        other = Detector(
            self.network,
            inference=settings,
            shortest=self.sides[0],
            longest=self.sides[1],
            encoder=self._encoder,
            folder=self.folder,
        )
        other._prepared = self._prepared
        return other

    def faster_precision(self) -> str | None:
        """Return a sentence about a number format that is faster on this device than that of the settings; None: there is none."""
        device = self.network.device
        if self.inference.precision != "fp32" or usable_precision("auto", device) == "fp32":
            return None
        found = usable_precision("auto", device)
        return (
            f"this {'CPU' if device.type == 'cpu' else 'GPU'} multiplies {half_speed(found, device.type):.1f} times as fast in "
            f"{found} as in fp32: --precision {found} runs faster and moves scores a little (bf16 the "
            "quickstart's by 0.001 on average, by 0.05 at most)"
        )

    def with_augmentation(self) -> Detector:
        """Return a detector that runs on each image mirrored too, and in three sizes (``--tta``)."""
        return self.with_settings(flip=True, scales=TTA_SCALES)


# --- Inputs ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScaledImage:
    """An image as the network sees it."""

    views: tuple[ImageView, ...]
    """Each is uint8 (3, h, w), RGB; none where only tiles are run on."""
    size: tuple[int, int]
    """Height and width of the original."""
    tiled: Pixels | None = None
    """The original, uint8 (H, W, 3) RGB, where tiles of it are run on too; they are cut and scaled when their turn comes."""


def to_network(pixels_HW3: Pixels, sides: tuple[int, int]) -> torch.Tensor:
    """Scale an image for the network.

    Args:
        pixels_HW3: uint8, RGB.
        sides: Desired shortest side, and largest longest side, in pixels.

    Returns:
        uint8 (3, h, w).
    """
    height, width = pixels_HW3.shape[:2]
    view = shortest_side(height, width, shortest=sides[0], longest=sides[1])
    return torch.from_numpy(view.image(pixels_HW3)).permute(2, 0, 1)


def require_one_view(settings: InferenceConfig) -> None:
    """Refuse settings with which regions have several embeddings.

    Raises:
        ConfigError: They ask for tiles or test-time augmentation.
    """
    if settings.augmented or settings.tiles:
        raise ConfigError(
            "regions are embedded in one view of an image",
            hint="leave out test-time augmentation and tiles: --tta, or inference.flip, inference.scales and inference.tiles of the run",
        )


def require_finite(values: Iterable[torch.Tensor]) -> None:
    """Refuse what a network with damaged weights gives.

    Raises:
        NumericsError: A value is not finite.
    """
    if not all(bool(each.isfinite().all()) for each in values):
        raise NumericsError(
            "the box heads returned values that are not finite",
            hint="the weights are damaged, or half precision is too narrow for them: use float32",
        )


def choose_device(device: str) -> torch.device:
    """Return the device of that name; ``"auto"`` is a GPU where there is one.

    Raises:
        ConfigError: There is no such kind of device.
        RuntimeEnvironmentError: It is not there, or cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device {device!r}", hint="choose auto, cpu, cuda, or cuda:1, ..."
        ) from error
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise RuntimeEnvironmentError(
            f"the device {device!r} cannot be used: {reason}",
            hint="try cpu, or auto; proxydet env reports the state of the GPU",
        ) from error
    return chosen


# --- Run folders, checkpoints, published models ------------------------------------------------------------------------


def open_named(named: NamedDetector, *, device: str = "auto") -> Detector:
    """Open the detector that a command line names; nothing is downloaded.

    Args:
        named: What `find_detector` found.
        device: As `choose_device` takes it.

    Raises:
        InputError: It cannot be opened.
        ArtifactError: Files of the published model are not there.
    """
    if named.run is not None:
        choose_device(device)
        with damage_explained(named.repository, named.run):
            return Detector.from_run(named.run, checkpoint=named.weights, device=device)
    if named.weights is not None:
        return Detector.from_checkpoint(named.weights, config=named.config, device=device)
    name = named.published or DEFAULT_MODEL
    weights, chosen = locate_published(name), choose_device(device)
    trained = trained_classes(NamedDetector(published=name))
    return Detector._open(PUBLISHED_MODELS[name], trained, weights, chosen)
