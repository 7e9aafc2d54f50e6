"""The detector as a Python user sees it: pictures in, detections out, any words as classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proxydet.config import merge
from proxydet.detections import Detections
from proxydet.detector_classes import ClassResolver
from proxydet.detector_inputs import (
    ChannelOrder,
    Classes,
    Picture,
    Pixels,
    as_pixels,
    choose_device,
    in_batches,
    to_network,
    views_of,
)
from proxydet.errors import ConfigError
from proxydet.modeling.config import TTA_SCALES, InferenceConfig, ModelConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.prediction import Prediction, to_host
from proxydet.vocabulary.encoder import TextEncoder
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from proxydet.video.frames import FrameResult
    from proxydet.video.reading import VideoSource


class Detector(ClassResolver):
    """A trained network with what it needs to look at pictures.

    Predicting changes nothing in it: threads may share one, each with a vocabulary of its own.

    Attributes:
        network: The network, in evaluation mode.
        vocabulary: The classes of the training.
        inference: Settings of evaluation; `predict` changes thresholds only. Without a mask head, ``masks`` is False.
        sides: The shortest and the longest side, in pixels, that pictures are scaled to.
    """

    def __init__(
        self,
        network: ProxyDetNetwork,
        *,
        inference: InferenceConfig | None = None,
        shortest: int = 800,
        longest: int = 1333,
        encoder: TextEncoder | Path | None = None,
    ) -> None:
        """Wrap a network.

        Args:
            network: Network with its weights, where it shall compute.
            inference: Settings; the published ones where None.
            shortest: Pictures are scaled so that their shortest side has this many pixels,
            longest: but the longest at most this many.
            encoder: Embeds class names: an encoder, its file, or None for CLIP ViT-B/32's weights where ``proxydet
                download`` puts them. It is opened when names are first given.
        """
        super().__init__(network.vocabulary, encoder)
        self.network = network.eval()
        settings = inference or InferenceConfig()
        self.inference = (
            settings if network.has_mask_head else dataclasses.replace(settings, masks=False)
        )
        self.sides = (shortest, longest)

    @classmethod
    def from_run(
        cls, folder: Path | str, *, checkpoint: Path | None = None, device: str = "auto"
    ) -> Detector:
        """Open what ``proxydet train`` or ``proxydet quickstart`` made.

        Args:
            folder: The run folder.
            checkpoint: A checkpoint of the run; None: the final weights, or the newest checkpoint of a run that is
                not finished.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"``: a GPU where there is one.

        Raises:
            InputError: The folder is no run, or a file in it is damaged.
        """
        from proxydet.detector_files import open_run

        return open_run(cls, Path(folder), checkpoint, choose_device(device))

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
        """
        from proxydet.detector_files import open_checkpoint

        return open_checkpoint(cls, Path(path), config, vocabulary, choose_device(device))

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "auto") -> Detector:
        """Open a published model, downloading it first where it is not there.

        Args:
            name: ``proxydet-r50``, ``proxydet-r50-inl``, ``proxydet-swinb-inl``, ``detic-r50``, ``detic-swinb``,
                ``boxsup-r50`` or ``boxsup-swinb``.
            device: See `from_run`.

        Raises:
            InputError: There is no such model.
            ArtifactError: It cannot be downloaded, or its digest is wrong.
        """
        from proxydet.detector_files import open_pretrained

        return open_pretrained(cls, name, choose_device(device))

    def predict(
        self,
        image: Picture,
        vocabulary: Classes = None,
        *,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        channel_order: ChannelOrder = "rgb",
    ) -> Detections:
        """Find objects in a picture.

        Args:
            image: A file, a Pillow image, or uint8 (H, W, 3); files and Pillow images may be of any mode and are
                turned as their EXIF orientation says.
            vocabulary: What to look for, see `Classes`; names are embedded by `vocabulary_of`.
            score_threshold: Only detections that score above this, 0 to 1.
            max_detections: At most this many, the best.
            channel_order: ``"bgr"`` for arrays from OpenCV.

        Raises:
            InputError: The picture or the vocabulary cannot be used.
        """
        (found,) = self.predict_batch(
            [image],
            vocabulary,
            score_threshold=score_threshold,
            max_detections=max_detections,
            channel_order=channel_order,
        )
        return found

    def predict_batch(
        self,
        images: Iterable[Picture],
        vocabulary: Classes = None,
        *,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        channel_order: ChannelOrder = "rgb",
        batch_size: int = 8,
    ) -> list[Detections]:
        """Find objects in several pictures, which may differ in size; results are in their order.

        Args:
            images: As for `predict`.
            vocabulary: As for `predict`.
            score_threshold: As for `predict`.
            max_detections: As for `predict`.
            channel_order: As for `predict`.
            batch_size: Pictures that are in memory and in the network at once.

        """
        classes = self.resolve(vocabulary)
        settings = self.settings(score_threshold=score_threshold, max_detections=max_detections)
        found: list[Detections] = []
        for batch in in_batches(images, batch_size):
            pixels = [as_pixels(image, channel_order) for image in batch]
            predictions = to_host(self.predict_images(pixels, classes, settings))
            found += [Detections(prediction, classes.names) for prediction in predictions]
        return found

    def predict_video(
        self,
        source: str | Path | VideoSource,
        vocabulary: Classes = None,
        *,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        every: int = 1,
        batch_size: int = 4,
    ) -> Iterator[FrameResult]:
        """Find objects in the frames of a video or a camera, which a thread decodes ahead.

        Args:
            source: A file; ``"webcam"`` or ``"webcam:1"``, of which only the newest frames are looked at.
            vocabulary: As for `predict`.
            score_threshold: As for `predict`.
            max_detections: As for `predict`.
            every: Look at each frame (1), each second one (2), ...
            batch_size: Frames in the network at once; a camera's go one by one.

        Returns:
            For each frame its number ``index``, its time ``seconds``, its ``frame.pixels``, and what was ``found``. The
            video is open until the iterator ends or is closed.

        Raises:
            MissingDependencyError: PyAV is not installed.
            DataError: The video cannot be opened; from the iterator, after the frames before: it is damaged there.
        """
        from proxydet.video.frames import look_at_frames
        from proxydet.video.reading import VideoReader

        classes = self.resolve(vocabulary)
        settings = self.settings(score_threshold=score_threshold, max_detections=max_detections)
        reader = VideoReader(source, every=every)
        return look_at_frames(self, reader, classes, settings, batch_size=batch_size)

    def predict_images(
        self,
        images: Sequence[Pixels],
        vocabulary: Vocabulary | None = None,
        settings: InferenceConfig | None = None,
    ) -> list[Prediction]:
        """Find objects in decoded pictures: the one way that evaluation and prediction share.

        Args:
            images: uint8 (H, W, 3) RGB at their original sizes.
            vocabulary: What to look for, taken as it is; None: the classes of the training.
            settings: Thresholds and limits; None: those of the run.

        Returns:
            Boxes, and masks where the settings ask for them and the network has a mask head, in the pixels of the given
            pictures, on the network's device.
        """
        training = vocabulary is None or vocabulary == self.vocabulary
        classes = None if training else vocabulary
        settings = settings or self.inference
        sizes = [(pixels.shape[0], pixels.shape[1]) for pixels in images]
        if settings.augmented:
            return [
                self.network.detect_views(
                    views_of(pixels_HW3, self.sides, settings),
                    classes,
                    original_size=size,
                    settings=settings,
                )
                for pixels_HW3, size in zip(images, sizes, strict=True)
            ]
        return self.network.detect(
            [to_network(pixels_HW3, self.sides) for pixels_HW3 in images],
            classes,
            original_sizes=sizes,
            settings=settings,
        )

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
                "this detector has no mask head: it was trained on boxes, and finds boxes only",
                hint="leave masks out; for masks, train on objects that have them",
            )
        given = {name: value for name, value in changes.items() if value is not None}
        return merge(self.inference, given, "inference")

    def with_settings(self, **changes: bool | float | str | Sequence[float] | None) -> Detector:
        """Return a detector with other settings that shares this one's network.

        Args:
            **changes: Fields of `proxydet.modeling.config.InferenceConfig`, such as ``masks=False``,
                ``one_class_per_proposal=True`` (only the best class of each box, as the published demos show it),
                ``precision="fp16"`` on a GPU, or ``flip=True, scales=(0.75, 1.0, 1.25)`` (test-time augmentation). None
                keeps the run's.

        Raises:
            ConfigError: As `settings`.
        """
        return Detector(
            self.network,
            inference=self.settings(**changes),
            shortest=self.sides[0],
            longest=self.sides[1],
            encoder=self._encoder,
        )

    def with_augmentation(self) -> Detector:
        """Return a detector that looks at each picture mirrored too, and in three sizes (``--tta``)."""
        return self.with_settings(flip=True, scales=TTA_SCALES)
