"""Which class names are longer than CLIP's tokenizer reads: an encoder that cuts them sees only their beginning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proxydet.vocabulary.prompts import PUBLISHED, fill

READ = 77
"""Tokens that CLIP's text towers read, start and end included."""

_MARKS = 2


@dataclass(frozen=True, kw_only=True)
class LongName:
    """A name that does not fit."""

    name: str
    tokens: int
    """Tokens of the name in the published prompt, start and end included."""
    read: int = READ
    """Tokens that are read."""


def names_too_long(names: Iterable[str]) -> tuple[LongName, ...]:
    """Find the names that CLIP would cut, in the published prompt.

    Args:
        names: Class names.
    """
    texts = {name: fill(PUBLISHED[0], name) for name in names}
    # A token stands for a byte at least, so only long names need the tokenizer, which takes seconds to import.
    suspects = {name: text for name, text in texts.items() if len(text.encode()) + _MARKS > READ}
    if not suspects:
        return ()
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    counts = {name: len(tokenizer.encode(text)) + _MARKS for name, text in suspects.items()}
    return tuple(
        LongName(name=name, tokens=count) for name, count in counts.items() if count > READ
    )
