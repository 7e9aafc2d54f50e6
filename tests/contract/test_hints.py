"""Every error about what a user gave says what to do next.

Left out are errors of configuration values, whose message names the allowed values, and those inside ``artifacts``, which are
collected and get their hint where the download as a whole is reported.
"""

from __future__ import annotations

import ast

WITH_HINTS = {
    "CheckpointError",
    "DataError",
    "DiskFullError",
    "RuntimeEnvironmentError",
    "InputError",
    "MissingDependencyError",
    "NumericsError",
    "TrainingError",
    "VocabularyError",
}


def raised_without_hint(source: str) -> list[int]:
    """Return the lines that make such an error without a hint."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in WITH_HINTS
        and not any(keyword.arg in ("hint", None) for keyword in node.keywords)
    ]


def test_errors_have_hints(repository):
    files = [
        file
        for package in ("proxydet", "proxydet_cli")
        for file in sorted((repository / package).rglob("*.py"))
        if file.parent.name != "artifacts"
    ]
    assert len(files) > 100
    found = [
        f"{file.relative_to(repository)}:{line}"
        for file in files
        for line in raised_without_hint(file.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_the_check_sees_what_it_looks_for():
    source = 'raise DataError("no")\nraise DataError("no", hint="yes")\nraise ValueError("no")\n'
    assert raised_without_hint(source) == [1]
