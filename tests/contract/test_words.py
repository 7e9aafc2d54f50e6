"""Docs, help, messages and docstrings use the field's words: a few that are not its own must not come back."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

WORDS = {
    r"\bpictures?\b": "image",
    r"\bdrawn (set|data set|dataset)s?\b": "synthetic dataset",
    r"\bdata descriptions?\b": "dataset config",
    r"\b(go|goes|going|went) on\b": "resume, continue",
    r"\banew\b": "again",
    r"\bbec[ao]me of\b": "result",
    r"\bcould not be had\b": "failed to download, is missing",
    r"\blook(s|ed|ing)? (at|into)\b": "inspect, run inference on",
    r"\b(tells|told)\b": "reports, prints",
    r"\b(?!there\b)\w+ is no\b(?! longer)": "is not a",
    r"\bbeside\b": "next to",
    r"\bin turn\b": "alternately, in order",
    r"\bby any words\b": "from any class names",
    r"\bthings? (is|are) wrong\b": "problems",
    r"\bof no kind\b": "must end in",
    r"\bsomething else than\b": "is not, disagrees with",
    r"\bnot what was written\b": "SHA-256 mismatch, changed since it was written",
    r"\bthrown away\b": "deleted, discarded",
    r"\bbelongs? to --": "requires --",
}
"""What to write instead of each, by pattern."""

OF_OLD_NAMES = {"moving-from-0.1.md"}
"""Pages that quote names which are gone."""

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    page
    for page in [*REPOSITORY.glob("*.md"), *sorted((REPOSITORY / "docs").rglob("*.md"))]
    if page.name not in OF_OLD_NAMES
]


def prose(text: str) -> str:
    """Markdown without code, link targets and HTML; lines keep their number."""
    text = re.sub(
        r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"``[^`]*``|`[^`]*`|\]\([^)]*\)|<[^>\n]*>", "", text)


def found_words(text: str) -> list[str]:
    """Each word that should not be there, with its line and what to write instead; a line break counts as a space."""
    found = []
    for pattern, instead in WORDS.items():
        for match in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"line {line}: {' '.join(match[0].split())!r}, write: {instead}")
    return found


def test_pages_use_the_words_of_the_field():
    found = {page.name: found_words(prose(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert {page: words for page, words in found.items() if words} == {}


def test_code_uses_the_words_of_the_field(trees):
    """In every text of more than one word: docstrings, help and messages."""
    found = [
        f"{path}:{node.lineno}: {word}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
        # A field of the server.
        for word in found_words(prose(node.value).replace("-F picture=", ""))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "two pictures", "a drawn data set", "the data\ndescription", "it went on", "begin anew", "what became of it",
        "4 files could not be had", "Look at it", "the log tells why", "it was told", "X is no checkpoint", "beside it",
        "one in turn", "Find objects by any words.", "1 things are wrong", "a.txt is of no kind that can be written",
        "holds something else than an index", "the file is not what was written", "it was thrown away", "--names belongs to --data",
    ],
)  # fmt: skip
def test_each_word_is_found(text):
    assert len(found_words(text)) == 1


@pytest.mark.parametrize(
    "text", ["There is no mask.", "the image is no longer read", "`predict --save pictures`", "besides"]
)  # fmt: skip
def test_other_uses_are_left_alone(text):
    assert found_words(prose(text)) == []
