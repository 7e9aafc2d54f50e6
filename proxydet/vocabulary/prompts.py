"""Sentences that class names are put into before a text encoder reads them."""

from __future__ import annotations

from collections.abc import Sequence

from proxydet.errors import VocabularyError

PUBLISHED = ("a {}",)
"""The prompt of all published embeddings (and of ProxyDet's training)."""

PROMPT_SETS: dict[str, tuple[str, ...]] = {
    "published": PUBLISHED,
    "photo": ("a photo of a {}.",),
    "ensemble": (
        "a {}",
        "a photo of a {}.",
        "a photo of the {}.",
        "a close-up photo of a {}.",
        "a photo of a small {}.",
        "a photo of a large {}.",
        "there is a {} in the scene.",
    ),
}
"""Prompts by name; where there are several, a class's embedding is their mean."""


def find_prompts(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Give the prompts of a named set, or check prompts that were written out.

    Args:
        wanted: A key of `PROMPT_SETS`, one prompt such as ``"a picture of a {}"``, or several.

    Returns:
        At least one prompt, each with ``{}`` in the name's place.

    Raises:
        VocabularyError: There is no such set, or a prompt does not hold ``{}`` exactly once.
    """
    if isinstance(wanted, str):
        if wanted in PROMPT_SETS:
            return PROMPT_SETS[wanted]
        wanted = (wanted,)
    for prompt in wanted:
        if prompt.count("{}") != 1:
            raise VocabularyError(
                f"the prompt {prompt!r} does not hold {{}} exactly once",
                hint=f"write a sentence with {{}} in the name's place, or one of {', '.join(PROMPT_SETS)}",
            )
    if not wanted:
        raise VocabularyError("there are no prompts", hint='give at least one, such as "a {}"')
    return tuple(wanted)


def fill(prompt: str, name: str) -> str:
    """Put a name into a prompt; braces in the name stay as they are."""
    return prompt.replace("{}", name, 1)
