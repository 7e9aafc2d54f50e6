"""Text encoders: from class names to embeddings.

Dimensions: C classes, T texts, L tokens, D embedding.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from proxydet.errors import VocabularyError
from proxydet.paths import cache_folder, models_folder
from proxydet.reporting import SILENT
from proxydet.vocabulary.compositional import CompositionalEncoder
from proxydet.vocabulary.embedding_cache import EmbeddingCache
from proxydet.vocabulary.names import ClassWords, check_classes
from proxydet.vocabulary.prompts import PUBLISHED, fill, find_prompts
from proxydet.vocabulary.text_tower import causal_mask, load_tower, tower_settings
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

    from proxydet.reporting import Progress

Floats = npt.NDArray[np.float32]

DEFAULT_MODEL = "ViT-B-32-quickgelu"
"""The text tower of the published embeddings: OpenAI's CLIP ViT-B/32."""

_CHUNK = 256
_LENGTH_STEP = 8


class TextEncoder(Protocol):
    """Anything that embeds texts."""

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""

    def encode(self, names: Sequence[str]) -> Floats:
        """Embed texts: (T, D) float32, not normalised."""


def default_clip_weights() -> Path:
    """Where ``proxydet download clip-vit-b32`` puts CLIP's weights."""
    return models_folder() / "clip" / "ViT-B-32.pt"


def open_encoder(
    path: Path | None = None, *, model: str = DEFAULT_MODEL, progress: Progress = SILENT
) -> TextEncoder:
    """Open a text encoder.

    Args:
        path: CLIP weights, or the ``.json`` of a `CompositionalEncoder`; None: CLIP ViT-B/32 where
            ``proxydet download`` puts it.
        model: open_clip's name of the model that the weights belong to.
        progress: Where long encodings are shown.

    Raises:
        VocabularyError: There are no weights.
    """
    if path is not None and path.suffix == ".json":
        return CompositionalEncoder.load(path)
    weights = path or default_clip_weights()
    if not weights.is_file():
        raise VocabularyError(
            f"embedding new class names needs the weights of CLIP's text encoder, and {weights} is not there",
            hint="run: proxydet download clip-vit-b32 (or give embeddings of your own as a .npy file)",
            path=weights,
        )
    return ClipTextEncoder(weights, model=model, progress=progress)


def build_vocabulary(
    classes: Sequence[str | ClassWords],
    encoder: TextEncoder,
    *,
    prompts: str | Sequence[str] = PUBLISHED,
) -> Vocabulary:
    """Embed class names.

    A class with one word and one prompt has the text's embedding as it is. With synonyms or several
    prompts it has the mean of the texts' embeddings, each normalised first, as CLIP's authors do.

    Args:
        classes: Names, or names with synonyms.
        encoder: Turns texts into embeddings.
        prompts: Sentences or the name of a prompt set; a `CompositionalEncoder` reads names without prompts.

    Raises:
        VocabularyError: A name is empty or there twice, or cannot be encoded.
    """
    entries = check_classes(classes)
    filled = find_prompts(prompts)
    if isinstance(encoder, CompositionalEncoder):
        filled = ("{}",)
    texts = [[fill(prompt, word) for word in entry.words for prompt in filled] for entry in entries]
    rows_TD = encoder.encode([text for group in texts for text in group])
    ends = np.cumsum([len(group) for group in texts])
    rows_CD = [_merged(part) for part in np.split(rows_TD, ends[:-1])]
    return Vocabulary.from_arrays([entry.name for entry in entries], np.stack(rows_CD))


def _merged(rows_TD: Floats) -> Floats:
    if len(rows_TD) == 1:
        single: Floats = rows_TD[0]
        return single
    mean_D: Floats = (rows_TD / np.linalg.norm(rows_TD, axis=1, keepdims=True)).mean(axis=0)
    return mean_D


class ClipTextEncoder:
    """CLIP's text tower through open_clip, loaded when a text is not in the cache.

    Args:
        weights: CLIP checkpoint.
        model: open_clip's name of the model; only models with a text transformer of open_clip's own serve.
        device: Where the tower runs.
        cache: Where embeddings are kept; None: a file in the user's cache folder.
        progress: Where long encodings are shown.

    Raises:
        VocabularyError: open_clip has no such model, or its text tower is of another kind.
    """

    def __init__(
        self,
        weights: Path,
        *,
        model: str = DEFAULT_MODEL,
        device: str = "cpu",
        cache: EmbeddingCache | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.weights = weights
        self.model = model
        self.device = device
        self.cache = cache or EmbeddingCache(cache_folder("embeddings") / "texts.sqlite")
        self.progress = progress
        self._lock = threading.Lock()

    @cached_property
    def digest(self) -> str:
        """What the embeddings depend on besides the text: the model's name and the weights' SHA-256."""
        return f"{self.model}:{self.cache.digest_of(self.weights)}"

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return int(self._settings["output_dim"])

    def encode(self, names: Sequence[str]) -> Floats:
        """Embed texts.

        Args:
            names: Texts, as they are (put names into prompts before).

        Returns:
            (T, D) float32, not normalised.

        Raises:
            VocabularyError: A text is longer than the model's context.
            CheckpointError: The weights are not those of the model.
        """
        known = self.cache.get(self.digest, names)
        missing = [text for text in dict.fromkeys(names) if text not in known]
        if missing:
            with self._lock:
                fresh = self._encode_texts(missing)
            self.cache.put(self.digest, fresh)
            known.update(fresh)
        return np.stack([known[text] for text in names])

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, start and end included; more than `context_length` cannot be encoded."""
        return [len(self._tokenizer.encode(text)) + 2 for text in texts]

    @property
    def context_length(self) -> int:
        """Most tokens a text may have, start and end included."""
        return int(self._settings["context_length"])

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return tower_settings(self.model)

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        return open_clip.SimpleTokenizer(context_length=self.context_length)

    @cached_property
    def _tower(self) -> torch.nn.Module:
        return load_tower(self._settings, self.weights, self.model).to(self.device)

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Floats]:
        counts = self.token_counts(texts)
        long = [
            text for text, count in zip(texts, counts, strict=True) if count > self.context_length
        ]
        if long:
            raise VocabularyError(
                f"{len(long)} of the texts are longer than the {self.context_length} tokens that {self.model} "
                f"reads, the first: {long[0][:120]!r}",
                hint="shorten the name or the prompt",
            )
        # Texts of about the same length go together, so that none is padded far beyond its own length; and a
        # text's padding depends on itself alone, so that its embedding depends on its company by rounding at most.
        lengths = [self._padded(count) for count in counts]
        rows: dict[str, Floats] = {}
        with self.progress.task("embedding class names", total=len(texts), unit="texts") as task:
            for length in sorted(set(lengths)):
                group = [t for t, padded in zip(texts, lengths, strict=True) if padded == length]
                for start in range(0, len(group), _CHUNK):
                    chunk = group[start : start + _CHUNK]
                    rows.update(zip(chunk, self._run(chunk, length), strict=True))
                    task.advance(len(chunk))
        return rows

    def _padded(self, count: int) -> int:
        """Length to which a text of ``count`` tokens is padded."""
        if not self._settings["cut"]:
            return self.context_length
        return min(-(-count // _LENGTH_STEP) * _LENGTH_STEP, self.context_length)

    def _run(self, texts: Sequence[str], length: int) -> Floats:
        import torch

        tokens_TL = self._tokenizer(list(texts), context_length=length).to(self.device)
        # open_clip's tower adds a mask of its full context; a cut one is passed in instead of changing the tower.
        masks = {"attn_mask": causal_mask(length).to(self.device)} if self._settings["cut"] else {}
        with torch.inference_mode():
            rows_TD = torch.func.functional_call(self._tower, masks, (tokens_TL,))
        encoded: Floats = rows_TD.float().cpu().numpy()
        return encoded
