"""What a request asks: its parameters, read and checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from proxydet.serving.refusals import Refusal
from proxydet.serving.settings import ServingSettings
from proxydet.vocabulary.names import split_names

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to look for, and what to keep; the defaults are those of ``proxydet predict``."""

    words: tuple[str, ...] | None = None
    """Class names; None: the server's default words."""
    score_threshold: float = 0.3
    """Only what scores above this, 0 to 1."""
    top: int = 300
    """At most this many detections, the best."""
    masks: bool | None = None
    """Masks too, or boxes only; None: masks where the detector has a mask head."""
    one_label: bool = False
    """Only the best class of each box."""


def read_question(pairs: Iterable[tuple[str, str]], settings: ServingSettings) -> Question:
    """Read the parameters of a request.

    Args:
        pairs: Names and values, of the address and of the form; ``words`` may be there several times.
        settings: Limits.

    Raises:
        Refusal: 400, a parameter is unknown, there twice, or has a value that it cannot have.
        VocabularyError: The words cannot be split.
    """
    words: list[str] = []
    given: dict[str, str] = {}
    for key, value in pairs:
        if key == "words":
            words += split_names(value) if value.strip() else []
        elif key in given:
            raise _wrong(f"the parameter {key!r} is there twice", "give it once")
        elif key in _READERS:
            given[key] = value
        else:
            known = ("words", *_READERS)
            near = difflib.get_close_matches(key[:80], known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise _wrong(f"there is no parameter {key[:80]!r}", hint)
    question = Question(
        words=tuple(_checked(words, settings)) if words else None,
        **{key: _READERS[key](key, value) for key, value in given.items()},  # type: ignore[arg-type]
    )
    if question.top > settings.max_detections:
        raise _wrong(
            f"top is {question.top}; at most {settings.max_detections} are given", "ask for fewer"
        )
    return question


def _checked(words: list[str], settings: ServingSettings) -> list[str]:
    if len(words) > settings.max_words:
        raise Refusal(
            400,
            "words",
            f"there are {len(words)} words; at most {settings.max_words} are accepted",
            hint="ask for fewer at a time, or use proxydet predict --vocabulary",
        )
    for word in words:
        if len(word) > settings.max_word_length:
            raise Refusal(
                400,
                "words",
                f"the word {word[:40] + '...'!r} has {len(word)} characters; at most "
                f"{settings.max_word_length} are accepted",
                hint="separate words by commas",
            )
    return words


def _share(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise _wrong(f"{key} is {text[:40]!r}; it must be a number from 0 to 1", "such as 0.3")
    return value


def _count(key: str, text: str) -> int:
    # At most nine digits: longer ones are refused here and not by Python's own limit.
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if value < 1:
        raise _wrong(f"{key} is {text[:40]!r}; it must be a whole number from 1", "such as 100")
    return value


def _truth(key: str, text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise _wrong(
            f"{key} is {text[:40]!r}; it must be true or false", "leave it out for the default"
        )
    return text.lower() in _TRUE


_READERS = {"score_threshold": _share, "top": _count, "masks": _truth, "one_label": _truth}


def _wrong(message: str, hint: str) -> Refusal:
    return Refusal(400, "parameter", message, hint=hint)
