"""The environment report: each field with its value, the published one, a verdict and its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from proxydet.errors import InputError

Verdict = Literal["same", "harmless", "may change results", "will fail", "not judged"]
"""What a difference from the published environment means, from the mildest to the worst; ``not judged`` where there
is nothing to compare or nothing to say."""

ORDER: tuple[Verdict, ...] = (
    "not judged",
    "same",
    "harmless",
    "may change results",
    "will fail",
)
"""Verdicts from the mildest to the worst."""

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Field:
    """One line of the report."""

    key: str
    """Its name in JSON and in comparisons."""

    section: str
    """The heading that it stands under."""

    label: str
    """Its name for people; those of detectron2's own report where it has the field."""

    value: str | None
    """What was found; None where nothing was."""

    problem: str = ""
    """Why there is no value, or what is wrong with it."""

    published: str | None = None
    """The value in the published training; None where it was not recorded."""

    verdict: Verdict = "not judged"
    """What the difference means."""

    reason: str = ""
    """Why it means that."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport:
    """What is there, next to what the published results were made with."""

    fields: tuple[Field, ...]
    """All fields, section by section."""

    created: str
    """UTC time, ISO 8601."""

    quick: bool
    """Whether torch was left unasked."""

    @property
    def worst(self) -> Verdict:
        """The worst verdict of all fields."""
        return max((field.verdict for field in self.fields), key=ORDER.index, default="not judged")

    @property
    def failures(self) -> tuple[Field, ...]:
        """The fields with which something will fail."""
        return tuple(field for field in self.fields if field.verdict == "will fail")

    def sections(self) -> dict[str, list[Field]]:
        """Return the fields by section, in order."""
        grouped: dict[str, list[Field]] = {}
        for field in self.fields:
            grouped.setdefault(field.section, []).append(field)
        return grouped

    def value(self, key: str) -> str | None:
        """Return the value of a field; None where it is missing."""
        return next((field.value for field in self.fields if field.key == key), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "format": FORMAT,
            "created": self.created,
            "quick": self.quick,
            "worst": self.worst,
            "fields": [asdict(field) for field in self.fields],
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> EnvironmentReport:
        """Read a report that :meth:`to_dict` wrote.

        Raises:
            InputError: It is of another format, or not a whole one.
        """
        if mapping.get("format") != FORMAT:
            raise InputError(
                f"The environment report has format {mapping.get('format')!r}, not {FORMAT}.",
                hint="it was written by another version of proxydet",
            )
        try:
            return cls(
                fields=tuple(Field(**field) for field in mapping["fields"]),
                created=mapping["created"],
                quick=mapping["quick"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"The environment report has other keys than proxydet writes: {error}.",
                hint="give an environment.json that proxydet wrote",
            ) from error

    def to_markdown(self) -> str:
        """Return a block to paste into an issue; the home folder is written ``~``."""
        lines = ["<details><summary>proxydet env</summary>", ""]
        blocks = [field for field in self.fields if field.value is not None and "\n" in field.value]
        for section, fields in self.sections().items():
            rows = [_row(field) for field in fields if field not in blocks]
            if rows:
                heading = [f"**{section}**", "", "| field | here | published | verdict |"]
                lines += [*heading, "|---|---|---|---|", *rows, ""]
        for field in blocks:
            lines += [f"**{field.label}**", "", "```", field.value or "", "```", ""]
        return without_home("\n".join([*lines, "</details>"]))


def without_home(text: str) -> str:
    """Write ``~`` for the user's home folder, where a path of the text begins with it."""
    home = re.escape(str(Path.home()))
    return re.sub(rf"(?<![\w./~-]){home}(?![\w-])", "~", text)


def _row(field: Field) -> str:
    here = field.value or "missing"
    if field.problem:
        here += f" ({field.problem})"
    verdict = f"{field.verdict}: {field.reason}" if field.reason else field.verdict
    cells = (field.label, here, field.published or "", verdict)
    escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(escaped)} |"
