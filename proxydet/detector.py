"""The detector as a Python user sees it: pictures in, detections out, any words as classes.

::

    from proxydet import Detector

    detector = Detector.from_run("runs/quickstart")
    found = detector.predict("photo.jpg", vocabulary=["red striped circle", "blue plain star"])
    for item in found.above(0.5):
        print(item.label, item.score, item.box_xyxy)

Dimensions: H, W a picture.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from proxydet.data.images import convert_image, read_image
from proxydet.data.transforms import shortest_side
from proxydet.detections import Detections
from proxydet.errors import ConfigError, InputError
from proxydet.modeling.config import InferenceConfig, ModelConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.prediction import Prediction
from proxydet.vocabulary.encoder import TextEncoder, build_vocabulary, open_encoder
from proxydet.vocabulary.files import open_vocabulary
from proxydet.vocabulary.prompts import PUBLISHED
from proxydet.vocabulary.vocabulary import Vocabulary

Pixels = npt.NDArray[np.uint8]
Picture = str | Path | Image.Image | Pixels
"""A file, an opened Pillow image, or uint8 (H, W, 3)."""

Classes = Vocabulary | Sequence[str] | str | Path | None
"""What to look for: a vocabulary, class names, a published vocabulary's name or a file (see
`proxydet.vocabulary.files.open_vocabulary`), or None for the classes of the training."""

_REMEMBERED = 16


class Detector:
    """A trained network with what it needs to look at pictures.

    Predicting changes nothing in it: threads may share one, each with a vocabulary of its own.

    Attributes:
        network: The network, in evaluation mode.
        vocabulary: The classes of the training.
        inference: Settings of evaluation; `predict` changes thresholds only.
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
        self.network = network.eval()
        self.vocabulary = network.vocabulary
        self.inference = inference or InferenceConfig()
        self.sides = (shortest, longest)
        self._encoder = encoder
        self._lock = threading.Lock()
        self._named = lru_cache(maxsize=_REMEMBERED)(self._embed)

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
            vocabulary: The classes of its training; None: those of LVIS, from the downloaded metadata.
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

    # -- predicting ------------------------------------------------------------------------------------------------

    def predict(
        self,
        image: Picture,
        vocabulary: Classes = None,
        *,
        score_threshold: float = 0.3,
        max_detections: int = 300,
        channel_order: Literal["rgb", "bgr"] = "rgb",
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
        channel_order: Literal["rgb", "bgr"] = "rgb",
        batch_size: int = 8,
    ) -> list[Detections]:
        """Find objects in several pictures, which may differ in size.

        Args:
            images: As for `predict`.
            vocabulary: As for `predict`.
            score_threshold: As for `predict`.
            max_detections: As for `predict`.
            channel_order: As for `predict`.
            batch_size: Pictures that are in memory and in the network at once.

        Returns:
            What was found, in the order of the pictures.
        """
        classes = self.resolve(vocabulary)
        settings = self.settings(score_threshold=score_threshold, max_detections=max_detections)
        found: list[Detections] = []
        for batch in _batches(images, batch_size):
            pixels = [as_pixels(image, channel_order) for image in batch]
            predictions = self.predict_images(pixels, classes, settings)
            found += [Detections(prediction, classes.names) for prediction in predictions]
        return found

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
            Boxes and masks in the pixels of the given pictures, on the network's device.
        """
        training = vocabulary is None or vocabulary == self.vocabulary
        shortest, longest = self.sides
        resized = []
        for pixels_HW3 in images:
            height, width = pixels_HW3.shape[:2]
            view = shortest_side(height, width, shortest=shortest, longest=longest)
            resized.append(torch.from_numpy(view.image(pixels_HW3)).permute(2, 0, 1))
        return self.network.detect(
            resized,
            None if training else vocabulary,
            original_sizes=[(pixels.shape[0], pixels.shape[1]) for pixels in images],
            settings=settings or self.inference,
        )

    def settings(self, *, score_threshold: float, max_detections: int) -> InferenceConfig:
        """Return the run's settings with other thresholds.

        Raises:
            InputError: A threshold is out of range.
        """
        return dataclasses.replace(
            self.inference, score_threshold=score_threshold, max_detections=max_detections
        )

    def with_settings(self, **changes: bool | float) -> Detector:
        """Return a detector with other settings that shares this one's network.

        Args:
            **changes: Fields of `proxydet.modeling.config.InferenceConfig`, such as ``masks=False`` or
                ``one_class_per_proposal=True`` (only the best class of each box, as the published demos show it).

        Raises:
            ConfigError: There is no such field, or its value is out of range.
        """
        known = {field.name for field in dataclasses.fields(InferenceConfig)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ConfigError(
                f"there is no setting {unknown[0]!r}", hint=f"there are {', '.join(sorted(known))}"
            )
        return Detector(
            self.network,
            inference=dataclasses.replace(self.inference, **changes),  # type: ignore[arg-type]
            shortest=self.sides[0],
            longest=self.sides[1],
            encoder=self._encoder,
        )

    # -- vocabularies ----------------------------------------------------------------------------------------------

    def resolve(self, vocabulary: Classes) -> Vocabulary:
        """Turn what a user gives as vocabulary into one.

        Names, files and published vocabularies are split into base and novel by `with_base`; a `Vocabulary` object
        is taken as it is.

        Raises:
            InputError: It cannot be used.
        """
        if vocabulary is None:
            return self.vocabulary
        if isinstance(vocabulary, Vocabulary):
            return vocabulary
        if isinstance(vocabulary, str | Path):
            return self.with_base(open_vocabulary(vocabulary, encoder=lambda: self.encoder))
        return self.vocabulary_of(vocabulary)

    def vocabulary_of(
        self, names: Sequence[str], *, prompts: str | Sequence[str] = PUBLISHED
    ) -> Vocabulary:
        """Embed class names by the text encoder of the training, and say which count as base.

        Args:
            names: Class names.
            prompts: Sentences with ``{}`` in the name's place, or the name of a prompt set.

        Raises:
            VocabularyError: A name is empty or there twice, or the encoder cannot read it or is not there.
        """
        return self._named(tuple(names), prompts if isinstance(prompts, str) else tuple(prompts))

    def with_base(self, vocabulary: Vocabulary, threshold: float = 0.9) -> Vocabulary:
        """Say which classes of a vocabulary count as base: the published rule.

        Args:
            vocabulary: Any classes.
            threshold: A class is base where its largest cosine with a base class of the training is above this.
        """
        base_CD = self.vocabulary.embeddings[self.vocabulary.base]
        return vocabulary.base_by_similarity(base_CD, threshold)

    def _embed(self, names: tuple[str, ...], prompts: str | tuple[str, ...]) -> Vocabulary:
        return self.with_base(build_vocabulary(names, self.encoder, prompts=prompts))

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder, opened when first used.

        Raises:
            VocabularyError: Its weights are not there.
        """
        with self._lock:
            if self._encoder is None or isinstance(self._encoder, Path):
                self._encoder = open_encoder(self._encoder)
            return self._encoder


def as_pixels(image: Picture, channel_order: Literal["rgb", "bgr"] = "rgb") -> Pixels:
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
        return convert_image(image)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"a picture must be a path, a Pillow image or a numpy array, not {type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"a picture as an array must be uint8 of shape (height, width, 3), not {image.dtype} {image.shape}"
        )
    return image if channel_order == "rgb" else np.ascontiguousarray(image[:, :, ::-1])


def choose_device(device: str) -> torch.device:
    """Return the device of that name; ``"auto"`` is a GPU where there is one.

    Raises:
        ConfigError: There is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the device {device!r} cannot be used: {reason}", hint="try cpu"
        ) from error
    return chosen


def _batches(images: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    if size < 1:
        raise ConfigError(f"batch_size is {size}; it must be at least 1")
    if isinstance(images, str | Path | Image.Image):
        raise InputError(
            "predict_batch takes several pictures", hint="use predict for a single one"
        )
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch
