"""The environment report and the comparison of two runs as text for people."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxydet.runtime.report import EnvironmentReport, Field
    from proxydet.runtime.run_comparison import RunComparison

_WIDTH = 100
_INDENT = 26


def report_text(report: EnvironmentReport) -> str:
    """Lay the report out: one line a field, and below it how it differs from the published training."""
    lines = []
    for section, fields in report.sections().items():
        lines += ["", section, "-" * len(section)]
        for field in fields:
            lines += _field_lines(field)
    lines += ["", _summary(report)]
    return "\n".join(lines[1:])


def failures_text(report: EnvironmentReport) -> str:
    """List only what will fail, a line each."""
    return "\n".join(f"{field.label}: {_here(field)}: {field.reason}" for field in report.failures)


def comparison_text(found: RunComparison, *, limit: int | None = 20) -> str:
    """Lay the differences of two runs out, the likeliest causes first.

    Args:
        found: The comparison.
        limit: How many differences to show; None for all.
    """
    lines = []
    for difference in found.differences[:limit]:
        lines.append(f"{difference.suspicion}: {difference.key} ({difference.reason})")
        for value in (difference.first, difference.second):
            lines.append(textwrap.shorten(f"    {value}", _WIDTH, initial_indent="    "))
    hidden = len(found.differences) - len(found.differences[:limit])
    if hidden:
        lines.append(f"and {hidden} more, none of them likelier (--json shows all)")
    if not found.differences:
        lines.append("No recorded difference.")
    return "\n".join([*lines, "", found.conclusion])


def _field_lines(field: Field) -> list[str]:
    value = _here(field)
    if "\n" in value:
        return [field.label, textwrap.indent(value, "    ")]
    lines = _wrapped(f"{field.label:<{_INDENT - 2}}  ", value)
    if field.verdict in {"same", "not judged"}:
        return lines
    there = f"published {field.published}: " if field.published else ""
    return lines + _wrapped(" " * _INDENT, f"{there}{field.verdict}: {field.reason}")


def _here(field: Field) -> str:
    value = field.value or "missing"
    return f"{value} ({field.problem})" if field.problem else value


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * (_INDENT + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(report: EnvironmentReport) -> str:
    counts = {
        verdict: sum(field.verdict == verdict for field in report.fields)
        for verdict in ("will fail", "may change results", "harmless", "same")
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"Compared with the published training: {told}."
