"""A small text encoder for names that are made of a few known words.

It stands in for CLIP's text tower where no CLIP weights are at hand, as in the quickstart's synthetic
dataset: the embedding of "red striped circle" is the sum of a direction common to all names, a
direction for each word, and a short direction of the name's own. Names that share words are therefore
close, as CLIP's embeddings of related names are, and any new combination of the words can be embedded.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from proxydet.errors import VocabularyError
from proxydet.files import read_json, write_text
from proxydet.paths import how_to_restore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Floats = npt.NDArray[np.float32]

_FORMAT = "proxydet compositional text encoder 1"
_FILLERS = frozenset({"a", "an", "the", "of", "with", "and", "which", "is"})


@dataclass(frozen=True, eq=False)
class CompositionalEncoder:
    """Embeds names made of known words."""

    common_D: Floats
    """Direction that every name has, (D,)."""
    words: Mapping[str, Floats]
    """A direction (D,) for each known word."""
    aliases: Mapping[str, str]
    """Other spellings of known words."""
    noise: float
    """Length of a name's own direction."""

    @classmethod
    def create(
        cls,
        words: Sequence[str],
        *,
        dim: int,
        noise: float,
        seed: int,
        aliases: Mapping[str, str] | None = None,
    ) -> CompositionalEncoder:
        """Give each word a direction at right angles to all the others.

        Args:
            words: The words, all different.
            dim: Width D of the embeddings; more than the number of words.
            noise: Length of each name's own direction, next to the words' length of 1.
            seed: Decides the directions.
            aliases: Other spellings, each with the word it stands for.
        """
        rng = np.random.default_rng(seed)
        axes_DN, _ = np.linalg.qr(rng.standard_normal((dim, len(words) + 1)))
        # Kept to what float16 holds, so that saved files give the same numbers back everywhere.
        axes_ND = axes_DN.T.astype(np.float16).astype(np.float32)
        known = {word: axes_ND[i + 1] for i, word in enumerate(words)}
        kept = {alias: word for alias, word in (aliases or {}).items() if word in known}
        return cls(axes_ND[0], known, kept, noise)

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return len(self.common_D)

    def encode(self, names: Sequence[str]) -> Floats:
        """Embed names.

        Args:
            names: Such as "red striped circle" or "a striped red disc"; word order does not matter.

        Returns:
            (C, D) float32, not normalised.

        Raises:
            VocabularyError: A name holds no known word, or a word that is not known.
        """
        return np.stack([self._encode_one(name) for name in names])

    def _encode_one(self, name: str) -> Floats:
        found = [self.aliases.get(word, word) for word in re.findall(r"[^\W_]+", name.lower())]
        wanted = sorted({word for word in found if word not in _FILLERS})
        unknown = [word for word in wanted if word not in self.words]
        if unknown or not wanted:
            what = f"does not know {', '.join(map(repr, unknown))}" if unknown else "finds no word"
            raise VocabularyError(
                f"the text encoder of this data set {what} in the class name {name!r}",
                hint=f"it stands in for CLIP and knows only the words {', '.join(self.words)}",
            )
        own_D = _direction_of(" ".join(wanted), self.dim)
        parts = [self.common_D, *(self.words[word] for word in wanted), self.noise * own_D]
        total: Floats = np.sum(parts, axis=0).astype(np.float16).astype(np.float32)
        return total

    def save(self, path: Path) -> None:
        """Write the encoder as a JSON file."""
        content = {
            "format": _FORMAT,
            "noise": self.noise,
            "aliases": dict(self.aliases),
            "common": self.common_D.tolist(),
            "words": {word: direction.tolist() for word, direction in self.words.items()},
        }
        write_text(path, json.dumps(content))

    @classmethod
    def load(cls, path: Path) -> CompositionalEncoder:
        """Read an encoder that ``save`` wrote.

        Raises:
            VocabularyError: The file is not such an encoder.
        """
        hint = how_to_restore(
            path, "give the text_encoder.json of a run or of proxydet quickstart's data"
        )
        content = read_json(path, what="text encoder", hint=hint, error=VocabularyError)
        if content.get("format") != _FORMAT:
            raise VocabularyError(
                f"{path} is not a file of the form {_FORMAT!r}", hint=hint, path=path
            )
        try:
            return cls(
                np.asarray(content["common"], np.float32),
                {word: np.asarray(v, np.float32) for word, v in content["words"].items()},
                dict(content["aliases"]),
                float(content["noise"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise VocabularyError(
                f"the text encoder {path} is damaged: {error!r}", hint=hint, path=path
            ) from error


def _direction_of(text: str, dim: int) -> Floats:
    """A direction of length 1 that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    direction = np.random.default_rng(seed).standard_normal(dim)
    unit: Floats = (direction / np.linalg.norm(direction)).astype(np.float32)
    return unit
