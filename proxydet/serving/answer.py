"""What a server knows and answers: the same result as ``proxydet predict --json`` for one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from proxydet._version import __version__
from proxydet.detections import Detections
from proxydet.detector import Detector
from proxydet.errors import EnvironmentProblem, VocabularyError
from proxydet.inference.predict_files import ImageResult
from proxydet.modeling.config import InferenceConfig
from proxydet.serving.pictures import accepted_formats, decode
from proxydet.serving.question import Question
from proxydet.serving.settings import ServingSettings
from proxydet.serving.upload import Upload
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import json_text


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A detector, and the words that it looks for when a request names none."""

    detector: Detector
    vocabulary: Vocabulary
    name: str
    """What the model is called on the page."""
    base_above: float = 0.9
    """Words of a request count as base above this cosine with a base class of the training."""

    def look(self, upload: Upload, question: Question, max_pixels: int) -> bytes:
        """Look at a picture; called in the one thread that computes.

        Pictures are looked at one by one: several at once are padded to one size, and would differ in the last bits
        from what `Detector.predict` finds.

        Returns:
            JSON: ``file``, ``width``, ``height`` and ``detections``, as ``proxydet predict --json`` gives them.

        Raises:
            ProxydetError: The picture or the words cannot be used, or there is not enough memory.
        """
        vocabulary = self._vocabulary_of(question)
        settings = self.settings_of(question)
        try:
            pixels_HW3 = decode(upload.data, upload.name, max_pixels)
            (prediction,) = self.detector.predict_images([pixels_HW3], vocabulary, settings)
            found = Detections(prediction, vocabulary.names)
            result = ImageResult(file=Path(upload.name), found=found).to_dict()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise EnvironmentProblem(
                "There is not enough memory for this picture and these words.",
                hint="send a smaller picture or fewer words",
            ) from error
        return json_text(result, allow_nan=False).encode()

    def settings_of(self, question: Question) -> InferenceConfig:
        """Return the settings that a request asks for.

        Raises:
            ConfigError: It asks for masks, and the detector has no mask head.
        """
        return self.detector.settings(
            score_threshold=question.score_threshold,
            max_detections=question.top,
            masks=question.masks,
            one_class_per_proposal=question.one_label,
        )

    def _vocabulary_of(self, question: Question) -> Vocabulary:
        if question.words is None:
            return self.vocabulary
        return self.detector.with_base(self.detector.resolve(question.words), self.base_above)

    def describe(self, settings: ServingSettings) -> dict[str, Any]:
        """What ``GET /api/info`` tells: model, words and limits."""
        free, why_not, known = self._free_words()
        limits = ("max_upload_bytes", "max_pixels", "max_words", "max_word_length")
        waiting = ("max_detections", "queue_places", "wait_seconds", "upload_seconds")
        return {
            "version": __version__,
            "model": {
                "name": self.name,
                "device": str(self.detector.network.device),
                "training_classes": len(self.detector.vocabulary),
                "masks": self.detector.inference.masks,
            },
            "words": {
                "default": list(self.vocabulary.names),
                "free": free,
                "why_not": why_not,
                "known": known,
            },
            "limits": {name: getattr(settings, name) for name in (*limits, *waiting)},
            "formats": list(accepted_formats()),
        }

    def _free_words(self) -> tuple[bool, str | None, list[str] | None]:
        """Whether own words can be asked for, why not, and the encoder's words where those are few."""
        try:
            encoder = self.detector.encoder
        except VocabularyError as error:
            return False, f"{error.message}; {error.hint}" if error.hint else error.message, None
        known = list(encoder.words) if isinstance(encoder, CompositionalEncoder) else None
        return True, None, known
