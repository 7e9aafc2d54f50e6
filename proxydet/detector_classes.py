"""Turns what a user gives as classes into a vocabulary that fits a training."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from proxydet.detector_inputs import Classes
from proxydet.vocabulary.encoder import TextEncoder, open_encoder
from proxydet.vocabulary.names import PUBLISHED
from proxydet.vocabulary.sources import complete_vocabulary, open_vocabulary
from proxydet.vocabulary.vocabulary import Vocabulary

_REMEMBERED = 16


class ClassResolver:
    """What a detector knows of words; threads may share one.

    Attributes:
        vocabulary: The classes of the training.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: TextEncoder | Path | None) -> None:
        """Remember what there is.

        Args:
            vocabulary: The classes of the training.
            encoder: The text encoder, its file, or None for CLIP's; opened when names are first given.
        """
        self.vocabulary = vocabulary
        self._encoder = encoder
        self._lock = threading.Lock()
        self._named = lru_cache(maxsize=_REMEMBERED)(self._embed)

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
            opened = open_vocabulary(
                vocabulary, encoder=lambda: self.encoder, known=self.vocabulary
            )
            return self.with_base(opened)
        return self.vocabulary_of(vocabulary)

    def vocabulary_of(
        self, names: Sequence[str], *, prompts: str | Sequence[str] = PUBLISHED
    ) -> Vocabulary:
        """Embed class names by the text encoder of the training, and say which count as base.

        Names of classes that the training knew have their embedding already, unless other prompts are asked for.

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
        made = complete_vocabulary(names, self.vocabulary, lambda: self.encoder, prompts=prompts)
        return self.with_base(made)

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
